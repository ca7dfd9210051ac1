"""Metrics: logging, the last value of each key, and whether it is current."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, SupportsFloat

import torch

from noether.core.effect import Effect, LogScalars, LogUpdates, UpdateScalars
from noether.core.errors import NoetherError, suggest
from noether.core.event import BeforeTraining
from noether.core.state import Measured
from noether.core.tensors.tree import SCALARS, FrozenDict, plain_number
from noether.core.text import count_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from noether.core.event import Event
    from noether.core.state import TrainState


class MetricError(NoetherError, LookupError):
    """A callback reads a metric that was never measured or is not current."""


def log(
    state: TrainState, event: Event, values: Mapping[str, torch.Tensor | SupportsFloat], *, quiet: bool = False
) -> tuple[TrainState, tuple[Effect, ...]]:
    """Record `values` as metrics, and return the new state with the effect that logs them.

    On a resumed `BeforeTraining` they are only logged, because a resume does not change the state.

    Args:
        state: The state at the event.
        event: The event at which they were measured.
        values: Number or 0-dimensional tensor by metric key.
        quiet: Whether the console leaves them out.

    Raises:
        ValueError: If a tensor is not 0-dimensional.
        TypeError: If `values` is no mapping, or one of them no number.

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> state, effects = log(TrainState(), AfterUpdate(samples=1), {"loss/train": 0.5})
        >>> effects[0].values["loss/train"], state.metrics["loss/train"].value
        (0.5, 0.5)
    """
    if not isinstance(values, (dict, Mapping)):  # testing for a dict is faster
        raise TypeError(f"log takes values by metric key, such as {{'loss/mine': 0.5}}; got {values!r}")
    numbers = to_numbers(values)
    effects = (LogScalars(numbers, frozenset(numbers) if quiet else _NONE),)
    if isinstance(event, BeforeTraining) and event.resumed:
        return state, effects
    measured = {key: Measured(value, state.iteration) for key, value in numbers.items()}
    return state.replace(metrics=FrozenDict({**state.metrics, **measured})), effects


def log_updates(state: TrainState, rows: Iterable[UpdateScalars]) -> tuple[TrainState, tuple[Effect, ...]]:
    """Record the scalars of several updates as metrics, as `log` at each of them would.

    Args:
        state: The state after the last of the updates, or a later one.
        rows: The scalars of each update, in order, as `to_numbers` returns them; updates without any are left out.

    Returns:
        The new state, with one effect that logs all rows.

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> first, second = TrainState().advance(samples=1), TrainState().advance(samples=1).advance(samples=1)
        >>> rows = [UpdateScalars(each.iteration, AfterUpdate(samples=1), {"x": 0.5}) for each in (first, second)]
        >>> state, effects = log_updates(second, rows)
        >>> str(state.metrics["x"].iteration), len(effects[0].rows)
        ('E0_U2_S2', 2)
    """
    logged = [row for row in rows if row.values]
    if not logged:
        return state, ()
    measured: dict[str, Measured] = {}
    for row, following in zip_longest(logged, logged[1:]):
        if following is None or following.values is not row.values:  # else the next row replaces it
            measured |= {key: Measured(value, row.iteration) for key, value in row.values.items()}
    return state.replace(metrics=FrozenDict({**state.metrics, **measured})), (LogUpdates(tuple(logged)),)


def to_numbers(values: Mapping[str, torch.Tensor | SupportsFloat]) -> FrozenDict:
    """Return metrics in types that can be saved: numbers, and tensors without a graph.

    Raises:
        ValueError: As for `log`.
        TypeError: As for `log`.

    Example:
        >>> to_numbers({"loss": torch.tensor(0.5, requires_grad=True)})
        FrozenDict({'loss': tensor(0.5000)})
    """
    if _NUMBERS.issuperset(map(type, values.values())):
        return FrozenDict(values)
    return FrozenDict({key: _number(key, value) for key, value in values.items()})


_NONE: Final[frozenset[str]] = frozenset()
_NUMBERS: Final = frozenset({float, int})


def _number(key: str, value: torch.Tensor | SupportsFloat) -> torch.Tensor | float:
    """Return a value in a type that can be saved: numpy scalars and the like become floats."""
    plain: SupportsFloat = plain_number(value)
    if isinstance(plain, (float, int)) and type(plain) in SCALARS:
        return plain
    if getattr(value, "ndim", 0):
        shape = tuple(getattr(value, "shape", ()))
        raise ValueError(f"metric {key!r} has shape {shape}; log a number or a 0-dimensional tensor")
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.requires_grad else value  # its graph would stay in memory
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric {key!r} is {value!r}; log a number or a 0-dimensional tensor") from None


def is_current(state: TrainState, key: str) -> bool:
    """Return whether `key` was measured at the update of `state`; the epoch may have been counted since."""
    return key in state.metrics and state.metrics[key].iteration.update == state.iteration.update


def current(state: TrainState, key: str) -> float:
    """Return the value of a metric that was measured at the current update.

    Raises:
        MetricError: If the metric was never measured, or was measured at an earlier update; the message lists the
            metrics that were measured.

    Example:
        >>> from noether import TrainState
        >>> current(TrainState(), "val/accuracy")
        Traceback (most recent call last):
        noether.core.metrics.MetricError: no metric 'val/accuracy' was measured yet; measured: none
    """
    if key not in state.metrics:
        known = ", ".join(map(repr, state.metrics)) or "none"
        raise MetricError(f"no metric {key!r} was measured yet; measured: {known}{suggest(key, state.metrics)}")
    value, measured = state.metrics[key]
    age = state.iteration.update - measured.update
    if age:
        known = ", ".join(repr(name) for name in state.metrics if is_current(state, name)) or "none"
        raise MetricError(
            f"metric {key!r} is {count_of(age, 'update')} old: it was measured at {measured}, and the state is at "
            f"{state.iteration}; current metrics: {known}. Give its producer the same interval, and list it first"
        )
    return float(value)
