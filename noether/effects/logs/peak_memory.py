"""How much memory a process has used at most."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.effect import MeasurePeakMemory
    from noether.core.event import Event
    from noether.core.state import TrainState


@final
class PeakMemory:
    """Measures peak memory; each key has a peak of its own, so that two intervals do not disturb each other."""

    def __init__(self) -> None:
        self._ever = 0
        self._since: dict[str, int] = {}

    def measure(self, effect: MeasurePeakMemory, state: TrainState, event: Event) -> Mapping[str, float]:  # noqa: ARG002  # a measure
        """Return the peak in bytes since the key was last measured, or since the process began, by key."""
        device = next((tensor.device for tensor in state.params.values()), torch.device("cpu"))
        now = peak_memory_bytes(device)
        self._ever = max(self._ever, now)
        peaks = {key: max(peak, now) for key, peak in self._since.items()}
        self._since = {**peaks, effect.key: 0}
        return {effect.key: peaks.get(effect.key, self._ever)}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory on `device` since the last call, in bytes; on the CPU the process's peak resident memory.

    Resident memory cannot be asked for since a moment: on the CPU it is the peak since the process began.

    Example:
        >>> peak_memory_bytes(torch.device("cpu")) > 1_000_000
        True
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
