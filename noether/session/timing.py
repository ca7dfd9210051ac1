"""The clock of a loop, and the split of an update's time into waiting and stepping."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable


@final
@dataclass(frozen=True)
class Clock:
    """Reads the time.

    Args:
        wall_s: Returns seconds since 1970.
        elapsed_s: Returns seconds since any moment; never decreases.
    """

    wall_s: Callable[[], float] = time.time
    elapsed_s: Callable[[], float] = time.perf_counter


@final
class Stopwatch:
    """The seconds of one update: all of them, those spent waiting for data, and those spent in steps.

    Args:
        elapsed_s: Returns seconds.

    Example:
        >>> seconds = iter([0.0, 1.0, 5.0, 5.5])
        >>> watch = Stopwatch(lambda: next(seconds))
        >>> watch.data_arrived(); watch.step_made(); watch.read()
        {'duration_s': 5.5, 'data_s': 1.0, 'step_s': 4.0}
    """

    def __init__(self, elapsed_s: Callable[[], float]) -> None:
        self._elapsed_s = elapsed_s
        self._began_s = self._marked_s = elapsed_s()
        self._data_s: float | None = None
        self._step_s: float | None = None

    def wait_begins(self) -> None:
        """Start to count the time as waiting for data; without this it counts from the last mark."""
        self._marked_s = self._elapsed_s()

    def data_arrived(self) -> None:
        """Count the time since the last mark as waiting for data."""
        self._data_s = (self._data_s or 0.0) + self._lap_s()

    def step_made(self) -> None:
        """Count the time since the last mark as spent in the step, if the arrival of its data was marked."""
        if self._data_s is not None:
            self._step_s = (self._step_s or 0.0) + self._lap_s()

    def read(self) -> dict[str, float | None]:
        """Return the seconds of the update that ends here, None where they were not marked, and start the next."""
        now_s = self._elapsed_s()
        read = {"duration_s": now_s - self._began_s, "data_s": self._data_s, "step_s": self._step_s}
        self._began_s = self._marked_s = now_s
        self._data_s = self._step_s = None
        return read

    def _lap_s(self) -> float:
        since_s, self._marked_s = self._marked_s, self._elapsed_s()
        return self._marked_s - since_s
