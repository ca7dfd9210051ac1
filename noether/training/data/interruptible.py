"""Data that an interruption leaves: an evaluation before its next batch, a wait for workers at once at a signal."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from noether.core.run import Run


class DataInterrupt(BaseException):
    """Leaves an evaluation or a wait for a batch at an interruption; no `except Exception` of a callback catches it."""


@final
class _Waiting:
    """Lets a signal end the wait for a worker, which may hang; Python calls signal handlers in the main thread."""

    def __init__(self) -> None:
        self.interrupted: Callable[[], bool] = lambda: False
        """Returns whether the run is interrupted; set while signals are caught."""
        self._is_waiting = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `DataInterrupt` if the run is interrupted before the block, or by a signal in it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._is_waiting = True
        try:
            if self.interrupted():  # after the assignment, so that no signal is missed
                raise DataInterrupt
            yield
        finally:
            self._is_waiting = False

    def leave(self) -> None:
        """Raise `DataInterrupt` if the main thread waits; for signal handlers.

        Raises:
            DataInterrupt: If it does.
        """
        if self._is_waiting:
            self._is_waiting = False
            raise DataInterrupt


WAITING: Final = _Waiting()


@final
class InterruptibleData:
    """A dataset in batches that raises `DataInterrupt` before the first batch after an interruption.

    Args:
        data: The batches.
        interrupted: Returns whether the run is interrupted.

    Example:
        >>> data = InterruptibleData([1, 2], interrupted=lambda: False)
        >>> list(data), len(data)
        ([1, 2], 2)
    """

    def __init__(self, data: Any, interrupted: Callable[[], bool]) -> None:
        self._data, self._interrupted = data, interrupted

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        return self._interrupt(self._data)

    def _interrupt(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._interrupted():
                raise DataInterrupt
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._data, name)
        if name == "with_sizes":
            return lambda: self._interrupt(found())
        return found if name != "batched" else lambda size: InterruptibleData(found(size), self._interrupted)


def interruptible(run: Run, interrupted: Callable[[], bool]) -> Run:
    """Return the run with datasets that raise `DataInterrupt` before the first batch after an interruption."""
    return run.replace(data={key: InterruptibleData(data, interrupted) for key, data in run.data.items()})
