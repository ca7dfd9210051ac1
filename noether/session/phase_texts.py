"""The phases of a run as text: where its time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.text import format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

_LEAST_S: Final = 0.005  # a phase that would be shown as 0.00 s is left out
PHASE_TEXTS: Final = {
    "step_s": "steps",
    "data_s": "waiting for data",
    "evaluation_s": "evaluation",
    "saving_s": "saving",
}
"""The name that a person sees for each phase in `summary.json`."""
OTHER_PHASES: Final = "callbacks and other"
"""The name for the rest of the time."""


def describe_phases(phases: Mapping[str, Any]) -> list[str]:
    """Return the phases of a run with their seconds and shares, the longest first.

    Args:
        phases: Seconds per phase, as `PhaseTimes.read` returns them.

    Example:
        >>> times = {"total_s": 10.0, "step_s": 7.0, "data_s": 0.0, "evaluation_s": 2.5, "saving_s": 0.0}
        >>> describe_phases(times)
        ['steps 7.0 s (70 %)', 'evaluation 2.5 s (25 %)', 'callbacks and other 0.50 s (5 %)']
    """
    total_s = phases["total_s"]
    times = {label: phases.get(name) or 0.0 for name, label in PHASE_TEXTS.items()}
    times[OTHER_PHASES] = max(total_s - sum(times.values()), 0.0)
    if not total_s:
        return []
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return [
        f"{label} {format_seconds(each)} ({100 * each / total_s:.0f} %)" for label, each in ordered if each >= _LEAST_S
    ]
