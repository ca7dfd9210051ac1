"""A source of metrics for tested callbacks, so that a test needs no callback that measures them."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Final

from noether.core.callback import SkippableKey, declaration_of, label_of, merge_keys
from noether.core.combinators import callback, on
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval
from noether.core.metric_keys import keys_overlap
from noether.core.metrics import log
from noether.core.reducer import Reducer, compose, identity
from noether.core.tensors.stored_weights import names_weights

if TYPE_CHECKING:
    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState

_VALUES: Final = (0.0, 0.25, 0.5, 1.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf)
_METRIC_EVENTS: Final = (AfterUpdate, AfterEpoch, AfterTraining, AtEval)


def add_metric_source(tested: Callback, *, finite: bool = False) -> Reducer:
    """Return a callback composed with a source of the metrics that it consumes and does not produce.

    Args:
        tested: Any callback.
        finite: Whether all values of the metrics are finite.

    Raises:
        TypeError: If it consumes stored weights instead of a metric.

    Example:
        >>> from noether import TrainState
        >>> from noether.core.callbacks import MetricEarlyStopping
        >>> stopping = MetricEarlyStopping(every_n_updates=1, metric_key="loss/val/total", tolerance=2)
        >>> reducer = add_metric_source(stopping)
        >>> state, _ = reducer(TrainState().advance(samples=4), AfterUpdate(samples=4))
        >>> list(state.metrics)
        ['loss/val/total']
    """
    return compose(metric_source(tested, finite=finite), tested)


def metric_source(tested: Callback, *, finite: bool = False) -> Callback:
    """Return a callback that logs the metrics that `tested` consumes and does not produce; `identity` if none.

    It leaves out a metric that the callback can do without (a `SkippableKey`) at some of the events.

    Args:
        tested: Any callback.
        finite: Whether all values are finite.

    Raises:
        TypeError: If `tested` consumes stored weights instead of a metric.
    """
    known = tuple(filter(math.isfinite, _VALUES)) if finite else _VALUES
    members = tested.members if isinstance(tested, Reducer) else (tested,)
    produced = [pattern for member in members for pattern in declaration_of(member).produces or ()]
    consumed = merge_keys(*(key for member in members for key in declaration_of(member).required))
    keys = tuple(key for key in consumed if not any(keys_overlap(pattern, key) for pattern in produced))
    for key in keys:
        if names_weights(key):
            label = label_of(tested)
            raise TypeError(
                f"{label} consumes {key!r}, which is no metric: test it together with the callback that stores these "
                f"weights, e.g. compose(EMACallback(...), {label})"
            )

    @callback("measured", produces=keys)
    @on(*_METRIC_EVENTS)
    def measure(state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        present = [
            key for key in keys if not isinstance(key, SkippableKey) or _hash(f"{key} is logged", state, event) % 2
        ]
        values = {str(key): known[_hash(key, state, event) % len(known)] for key in present}
        return log(state, event, values) if values else (state, ())

    return measure if keys else identity


def _hash(key: str, state: TrainState, event: Event) -> int:
    """Return a number that looks random but is a function of the key, the seed, the event and the iteration."""
    return zlib.crc32(f"{key} {state.seed} {type(event).__name__} {state.iteration}".encode())
