"""Which log lines stay where a run resumes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.state import TrainState


class LogError(NoetherError):
    """A log file is damaged."""


def lines_before_resume(lines: list[bytes], state: TrainState | None, saved: int, path: Path) -> list[bytes]:
    """Return the lines logged before the point where a run resumes.

    Raises:
        LogError: If one of the first `saved` lines, or a line before another that stays, is damaged. A last line
            without a line end was only cut off.
    """
    positions = [_parse_position(line) for line in lines]
    resumed_at, ended = (None, False) if state is None else (state.iteration, state.ended)
    remaining = [
        index
        for index, position in enumerate(positions)
        if position is not None and is_kept_on_resume(*position, resumed_at, ended=ended)
    ]
    # Later lines may be partial, or damaged by a power loss.
    whole = len(lines) - 1 if lines and not lines[-1].endswith(b"\n") else len(lines)
    intact = max(min(saved, whole), remaining[-1] if remaining else 0)
    for index, line in enumerate(lines[:intact]):
        if positions[index] is None:
            text = line[:80].decode(errors="replace")
            raise LogError(f"{path}:{index + 1}: not a log line: {text!r}; remove this line, and resume again")
    return [lines[index] for index in remaining]


def _parse_position(line: bytes) -> tuple[str, TrainingIteration] | None:
    """Return the event name and the counters of a log line, or None if it is damaged."""
    try:
        fields = json.loads(line)
        event, counts = fields["event"], TrainingIteration(fields["epoch"], fields["update"], fields["sample"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (event, counts) if line.endswith(b"\n") and isinstance(event, str) else None


def is_kept_on_resume(
    event: str, logged_at: TrainingIteration, resumed_at: TrainingIteration | None, *, ended: bool
) -> bool:
    """Return whether a resumed run keeps a log line, because it does not dispatch that event again.

    Args:
        event: Name of the event, such as `after_update`.
        logged_at: Counters at the event.
        resumed_at: Counters where the run resumes; None for a new run.
        ended: Whether training had ended there.
    """
    if resumed_at is None or not resumed_at.reached(logged_at):
        return False
    # These events follow an update or epoch whose counters they share.
    if event == "after_accumulation_step" and logged_at == resumed_at:
        return False
    return ended or event != "after_training" or logged_at != resumed_at
