"""How much memory a process has used at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory on `device` since the last call, in bytes; on the CPU the process's peak resident memory.

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
