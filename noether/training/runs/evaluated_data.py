"""Which datasets a standalone evaluation iterates: those of the callbacks, or others that the user names."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final

from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.core.callback import leaves_of
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.callbacks.evaluation import EvaluateCallback
from noether.core.errors import suggest
from noether.core.reducer import compose

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from noether.core.callback import Callback
    from noether.core.reducer import Reducer
    from noether.training.experiment import Experiment

_WITHOUT_MEANING: Final = ("id", "batch_size", "every_n_epochs", "every_n_updates", "every_n_samples", "at_end")
"""Settings that do not change what a callback measures at a standalone evaluation."""


def check_datasets(keys: Iterable[str], experiment: Experiment) -> None:
    """Refuse names that are not those of datasets which an evaluation can read.

    Raises:
        ConfigError: With the datasets that exist.
    """
    configured, readable = experiment.config.data, experiment.run.data
    for key in keys:
        known = ", ".join(map(repr, readable))
        if key not in configured:
            message = f"data has no {key!r}, it has {known}{suggest(key, readable)}"
        elif key not in readable:
            message = f"{key!r} is the stream on which the run trains, and has one reader; the others are {known}"
        else:
            continue
        raise ConfigError([LocatedProblem(Place(f"--data {key}"), (), message)])


def evaluate_on(callbacks: Sequence[Callback], key: str) -> list[Reducer]:
    """Return the callbacks with all data iterators on one dataset, as reducers to call one after the other.

    The data iterators that have this dataset stay as they are, and those of other datasets get it in place of theirs:
    what the run measures on `val` is measured on `test`, as `test/accuracy`. What several of them measure is measured
    once; a second reducer has those that share only a part of their keys. Without data iterators the losses are
    measured.

    Args:
        callbacks: The callbacks of the run.
        key: Name of the dataset.

    Example:
        >>> from noether.core.callbacks import MetricCallback
        >>> val = MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy")
        >>> train = MetricCallback(every_n_epochs=5, dataset_key="train", metric="accuracy")
        >>> [[each.key("accuracy") for each in reducer.members] for reducer in evaluate_on([val, train], "test")]
        [['test/accuracy']]
    """
    iterators = [leaf for leaf in leaves_of(compose(*callbacks)) if isinstance(leaf, PeriodicDataIteratorCallback)]
    others = [each for each in callbacks if not any(leaf in iterators for leaf in leaves_of(each))]
    passes: list[list[PeriodicDataIteratorCallback]] = [[]]
    own_first = sorted(iterators, key=lambda each: each.dataset_key != key)
    moved = [each if each.dataset_key == key else replace(each, dataset_key=key) for each in own_first]
    for callback in moved or [EvaluateCallback(every_n_epochs=1, dataset_key=key, measures=("loss",))]:
        _add(callback, passes)
    first, *more = passes
    return [compose(*first, *others), *(compose(*each) for each in more)]


def _add(callback: PeriodicDataIteratorCallback, passes: list[list[PeriodicDataIteratorCallback]]) -> None:
    """Add a callback to the first pass in which no other has one of its keys, unless all is measured already."""
    keys = _measured_keys(callback)
    others = [each for members in passes for each in members]
    measured = {key for each in others for key in _measured_keys(each)}
    if (keys and keys <= measured) or any(_measure_the_same(callback, each) for each in others):
        return
    for members in passes:
        if not any(keys & _measured_keys(each) for each in members):
            members.append(callback)
            return
    passes.append([callback])


def _measured_keys(callback: PeriodicDataIteratorCallback) -> set[str]:
    """Return the declared keys, without differences to training losses, which no evaluation has."""
    return {key for key in callback.produces or () if not key.startswith("lossdiff/")}


def _measure_the_same(a: PeriodicDataIteratorCallback, b: PeriodicDataIteratorCallback) -> bool:
    def settings(callback: Any) -> list[tuple[str, str]]:
        named = (each.name for each in fields(callback) if each.name not in _WITHOUT_MEANING)
        return [(name, repr(getattr(callback, name))) for name in named]

    return type(a) is type(b) and settings(a) == settings(b)
