"""Finds losses over a dataset that a list of callbacks measures twice, as lists of the class-based framework do."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from noether.config.compatibility import ConfigWarning
from noether.config.errors import LocatedProblem
from noether.core.schedules.schedule import INTERVALS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.config.source import Source
    from noether.core.callbacks.evaluation import OfflineLossCallback
    from noether.core.run import Run


def find_repeated(callbacks: Sequence[Any], run: Run) -> dict[int, int]:
    """Return each `OfflineLossCallback` that measures nothing beyond an earlier one with a shorter interval.

    Args:
        callbacks: The list of callbacks.
        run: The run; its sizes are used if they are known.

    Returns:
        Index of the earlier callback by index of the later one.

    Example:
        >>> from noether import OfflineLossCallback, Run
        >>> often, seldom = (OfflineLossCallback(every_n_epochs=n, dataset_key="val") for n in (1, 2))
        >>> find_repeated([often, seldom], Run()), find_repeated([seldom, often], Run())
        ({1: 0}, {})
    """
    from noether.core.callbacks.evaluation import OfflineLossCallback
    from noether.core.declarations import covers

    losses = {index: each for index, each in enumerate(callbacks) if isinstance(each, OfflineLossCallback)}
    repeated: dict[int, int] = {}
    for index, later in losses.items():
        for other, earlier in losses.items():
            differs_in_interval = _without_interval(earlier) == _without_interval(later) and earlier != later
            if (
                other < index
                and other not in repeated
                and differs_in_interval
                and covers(earlier.gate, later.gate, run)
            ):
                repeated[index] = other
                break
    return repeated


def warn_of_repeated(callbacks: Sequence[Any], repeated: dict[int, int], source: Source | None) -> None:
    """Warn of each callback that is left out because an earlier one measures the same."""
    for index, earlier in repeated.items():
        message = f"measures only what {callbacks[earlier].name} measures at the same events, and is left out"
        path = ("callbacks", index)
        text = message if source is None else str(LocatedProblem(source.place(path), path, message))
        warnings.warn(text, ConfigWarning, stacklevel=2)


def _without_interval(callback: OfflineLossCallback) -> dict[str, Any]:
    names = [each.name for each in fields(callback) if each.name not in (*INTERVALS, "at_end", "id")]
    return {name: getattr(callback, name) for name in names}
