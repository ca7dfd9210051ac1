"""Data that an interruption leaves: an evaluation before its next batch, a wait for workers at once at a signal.

Several ranks leave an evaluation together: the one that is interrupted stops reading its share, and says so at the next
exchange, where all of them leave.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.progress import track_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from noether.core.run import Run

    Watch = Callable[[Iterable[Any]], Iterator[Any]]


class DataInterrupt(BaseException):
    """Leaves an evaluation or a wait for a batch at an interruption; no `except Exception` of a callback catches it."""


@final
class _Waiting:
    """Lets a signal end the wait for a worker, which may hang; Python calls signal handlers in the main thread."""

    def __init__(self) -> None:
        self.interrupted: Callable[[], bool] = lambda: False
        """Returns whether the run is interrupted; set while signals are caught."""
        self._is_waiting = False
        self._is_uninterrupted = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `DataInterrupt` if the run is interrupted before the block, or by a signal in it."""
        if self._is_uninterrupted or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._is_waiting = True
        try:
            if self.interrupted():  # after the assignment, so that no signal is missed
                raise DataInterrupt
            yield
        finally:
            self._is_waiting = False

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Let no signal interrupt a wait inside the block."""
        before, self._is_uninterrupted = self._is_uninterrupted, True
        try:
            yield
        finally:
            self._is_uninterrupted = before

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

    On several ranks, the share of a rank ends there, and a rank that iterates all batches is not interrupted: no rank
    may leave alone.

    Args:
        data: The batches.
        interrupted: Returns whether the run is interrupted.
        gather: Says to all ranks that this rank has left its share; None for one process.
        watch: Returns an iterator over batches, which may measure it.
        description: What the display of the run says while the batches are iterated.

    Example:
        >>> data = InterruptibleData([1, 2], interrupted=lambda: False)
        >>> list(data), len(data)
        ([1, 2], 2)
    """

    def __init__(
        self,
        data: Any,
        interrupted: Callable[[], bool],
        gather: InterruptibleGather | None = None,
        watch: Watch = iter,
        description: str = "evaluating",
    ) -> None:
        self._data, self._interrupted, self._gather, self._watch = data, interrupted, gather, watch
        self._description = description

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        return self._iterate(self._data)

    def _iterate(self, batches: Iterable[Any]) -> Iterator[Any]:
        return self._interrupt(batches) if self._gather is None else _iterate_to_end(self._show(batches))

    def _show(self, batches: Iterable[Any]) -> Iterator[Any]:
        return track_progress(self._watch(batches), self._description, _length_of(self._data))

    def _interrupt(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in self._show(batches):
            if self._interrupted():
                raise DataInterrupt
            yield batch

    def _iterate_share(self, batches: Iterable[Any], gather: InterruptibleGather) -> Iterator[Any]:
        try:
            yield from self._interrupt(batches)
        except DataInterrupt:
            gather.has_left = True

    def _with_sizes(self, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        batches = self._data.with_sizes(rank, world_size)
        if world_size == 1 or self._gather is None:
            return self._iterate(batches)
        return self._iterate_share(batches, self._gather)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._data, name)
        if name == "with_sizes":
            return self._with_sizes
        if name == "batched":
            return lambda size: InterruptibleData(
                found(size), self._interrupted, self._gather, self._watch, self._description
            )
        return found


def _iterate_to_end(batches: Iterable[Any]) -> Iterator[Any]:
    iterator = iter(batches)
    while True:
        with WAITING.uninterrupted():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


@final
class InterruptibleGather:
    """A `gather` at which all ranks leave an evaluation once one of them has left its share of the data.

    Args:
        gather: As `Run.gather`.

    Example:
        >>> interruptible = InterruptibleGather(lambda what, value: [value, {"has_left": True, "value": 0}])
        >>> interruptible.gather("results", 1)
        Traceback (most recent call last):
        noether.training.data.interruptible.DataInterrupt
    """

    def __init__(self, gather: Callable[[str, Any], Sequence[Any]]) -> None:
        self._gather = gather
        self.has_left = False
        """Whether this rank has left its share."""

    def gather(self, what: str, value: Any) -> Sequence[Any]:
        """Return the values of all ranks.

        Raises:
            DataInterrupt: On all ranks, if one has left its share.
        """
        answers = self._gather(what, {"has_left": self.has_left, "value": value})
        if any(answer["has_left"] for answer in answers):
            raise DataInterrupt
        return [answer["value"] for answer in answers]


def interruptible(run: Run, interrupted: Callable[[], bool], watch: Watch = iter) -> Run:
    """Return the run with datasets that raise `DataInterrupt` before the first batch after an interruption.

    On several ranks its `gather` raises it, on all of them, once one has left its share of the data.

    Args:
        run: The run.
        interrupted: Returns whether the run is interrupted.
        watch: Returns an iterator over the batches of a dataset that a callback iterates.
    """
    gather = None if run.world_size == 1 else InterruptibleGather(run.gather)
    data = {
        key: InterruptibleData(data, interrupted, gather, watch, f"evaluating {key}") for key, data in run.data.items()
    }
    return run.replace(data=data) if gather is None else run.replace(data=data, gather=gather.gather)


def _length_of(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # a stream
        return None
