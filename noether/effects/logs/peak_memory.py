"""Peak memory of the process or accelerator, measured for `MeasurePeakMemory`."""

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
    """Measures peak memory separately for each key, so that intervals of different length do not affect each other."""

    def __init__(self) -> None:
        self._overall = 0
        self._since_last: dict[str, int] = {}

    def measure(self, effect: MeasurePeakMemory, state: TrainState, event: Event) -> Mapping[str, float]:  # noqa: ARG002  # a measure
        """Return the peak in bytes, by key, since the key was last measured or since the process started."""
        peak = peak_memory_bytes(_device_of(state))
        self._overall = max(self._overall, peak)
        peaks = {key: max(earlier, peak) for key, earlier in self._since_last.items()}
        self._since_last = {**peaks, effect.key: 0}
        return {effect.key: peaks.get(effect.key, self._overall)}

    def read(self, state: TrainState) -> int:
        """Return the peak in bytes since the process started, and leave every measurement as it is."""
        device = _device_of(state)
        if device.type == "cuda":
            return max(self._overall, int(torch.cuda.max_memory_allocated(device)))
        return peak_memory_bytes(device)


def _device_of(state: TrainState) -> torch.device:
    return next((tensor.device for tensor in state.params.values()), torch.device("cpu"))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory on `device` since the last call, in bytes; on the CPU since the process started.

    On the CPU it is the peak resident memory of the process, which cannot be reset.

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
