"""Metrics for a callback that consumes some: whoever tests it need not bring the one that measures them."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Final

from noether.core.callback import declaration_of, label_of
from noether.core.combinators import callback, on
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval
from noether.core.metrics import keys_overlap, log
from noether.core.reducer import Reducer, compose, identity
from noether.core.tensors.stored_weights import names_weights

if TYPE_CHECKING:
    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState

_VALUES: Final = (0.0, 0.25, 0.5, 1.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf)
_MEASURED: Final = (AfterUpdate, AfterEpoch, AfterTraining, AtEval)


def add_metric_source(tested: Callback) -> Reducer:
    """Return a callback behind one that measures the metrics that it consumes and nobody in it produces.

    Raises:
        TypeError: If it consumes what is no metric.

    Example:
        >>> from noether import TrainState
        >>> from noether.core.callbacks import MetricEarlyStopping
        >>> stopping = MetricEarlyStopping(every_n_updates=1, metric_key="loss/val/total", tolerance=2)
        >>> reducer = add_metric_source(stopping)
        >>> state, _ = reducer(TrainState().advance(samples=4), AfterUpdate(samples=4))
        >>> list(state.metrics)
        ['loss/val/total']
    """
    return compose(metric_source(tested), tested)


def metric_source(tested: Callback) -> Callback:
    """Return what measures the metrics that a callback consumes and nobody in it produces; `identity` for none."""
    members = tested.members if isinstance(tested, Reducer) else (tested,)
    produced = [pattern for member in members for pattern in declaration_of(member).produces or ()]
    consumed = dict.fromkeys(key for member in members for key in declaration_of(member).required)
    keys = tuple(key for key in consumed if not any(keys_overlap(pattern, key) for pattern in produced))
    for key in keys:
        if names_weights(key):
            who = f"{label_of(tested)} consumes {key!r}, which is no metric"
            raise TypeError(f"{who}: compose it with who keeps it, e.g. compose(EMACallback(...), {label_of(tested)})")

    @callback("measured", produces=keys)
    @on(*_MEASURED)
    def measure(state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        return log(state, event, {key: _value(key, state, event) for key in keys})

    return measure if keys else identity


def _value(key: str, state: TrainState, event: Event) -> float:
    """Return a number that looks like chance and is a function of where the run is."""
    text = f"{key} {state.seed} {type(event).__name__} {state.iteration}"
    return _VALUES[zlib.crc32(text.encode()) % len(_VALUES)]
