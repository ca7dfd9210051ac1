"""Data that a signal interrupts: an evaluation may take long, and is left before its next batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from noether.core.run import Run


class EvaluationInterrupt(BaseException):
    """Leaves an evaluation after a signal; no error, so that no `except Exception` of a callback catches it."""


@final
class InterruptibleData:
    """A dataset in batches that raises `EvaluationInterrupt` before the first batch after a signal.

    Args:
        data: The batches.
        interrupted: Returns whether a signal was received.

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
        batches: Iterable[Any] = self._data
        for batch in batches:
            if self._interrupted():
                raise EvaluationInterrupt
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._data, name)
        return found if name != "batched" else lambda size: InterruptibleData(found(size), self._interrupted)


def interruptible(run: Run, interrupted: Callable[[], bool]) -> Run:
    """Return the run with datasets that raise `EvaluationInterrupt` before the first batch after a signal."""
    return run.replace(data={key: InterruptibleData(data, interrupted) for key, data in run.data.items()})
