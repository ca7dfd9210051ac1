"""Seconds of the parts of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@final
class PartTimes:
    """Seconds of the parts of one update, summed over micro-batches; the first part starts at construction.

    Args:
        elapsed_s: A monotonic clock in seconds, such as `time.perf_counter`.

    Example:
        >>> clock = iter([0.0, 1.0, 1.5])
        >>> times = PartTimes(lambda: next(clock))
        >>> _ = times.stop("forward_s")
        >>> times.stop("backward_s")
        {'forward_s': 1.0, 'backward_s': 0.5}
    """

    def __init__(self, elapsed_s: Callable[[], float]) -> None:
        self._elapsed_s = elapsed_s
        self.seconds: dict[str, float] = {}
        """Seconds of each part so far."""
        self.start()

    def start(self) -> None:
        """Start a part."""
        self._since_s = self._elapsed_s()

    def stop(self, part: str) -> Mapping[str, float]:
        """Count the time since the last start or stop as `part`, and return the seconds of all parts so far."""
        now_s = self._elapsed_s()
        self.seconds[part] = self.seconds.get(part, 0.0) + now_s - self._since_s
        self._since_s = now_s
        return self.seconds
