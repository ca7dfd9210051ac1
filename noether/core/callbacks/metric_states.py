"""States of torchmetrics metrics, accumulated over the batches of an evaluation; no metric of the user is changed.

torchmetrics is not imported here: its metrics bring what they need.
"""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, final

import torch

from noether.core.errors import CallNote, NoetherError
from noether.core.tensors.calls import describe_value
from noether.core.tensors.tree import freeze, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Merge = Callable[[Any, Any], Any]

_HOME: Final = "torchmetrics"
_BASE_ATTRIBUTES: Final = ("_update_count", "_computed", "_forward_cache", "_is_synced", "_cache")
"""Attributes with which the base class of torchmetrics counts updates and keeps results."""


class Accumulator(Protocol):
    """Accumulates one result over the batches of an evaluation.

    Each rank adds its batches, the ranks exchange their `parts`, and each of them merges those of all.
    """

    def add(self, result: Any, /) -> None:
        """Add the result of a batch."""

    def parts(self) -> tuple[Any, ...]:
        """Return what the batches contribute, in their order: trees of JSON scalars, tuples, mappings and tensors."""

    def merge(self, parts: Iterable[Any], /) -> None:
        """Replace what was added by the parts of all ranks, in the order of the batches."""

    def value(self) -> Any:
        """Return the result of all batches."""


def add_to(accumulators: Mapping[str, Accumulator], results: Mapping[str, Any]) -> dict[str, Any]:
    """Add the results of a batch to the accumulators of their names, and return the other results."""
    for name, accumulator in accumulators.items():
        accumulator.add(results[name])
    return {name: value for name, value in results.items() if name not in accumulators}


class MetricStateError(NoetherError, ValueError):
    """What a metric remembers cannot be accumulated over batches."""


class Arguments(NamedTuple):
    """What the `update` of a metric gets for a batch."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


def is_own_class(kind: type) -> bool:
    """Return whether torchmetrics defines a class."""
    return kind.__module__.startswith(f"{_HOME}.")


def is_metric_class(kind: type, base: str = "Metric") -> bool:
    """Return whether a class derives from that of torchmetrics of this name.

    Example:
        >>> is_metric_class(torch.nn.Linear)
        False
    """
    return any(each.__name__ == base and is_own_class(each) for each in kind.__mro__)


def is_metric(value: object) -> bool:
    """Return whether `value` is one metric of torchmetrics, which a `MetricCollection` is not."""
    return is_metric_class(type(value))


def copy_metric(metric: Any) -> Any:
    """Return a copy of a metric without what it accumulated, which never exchanges anything with other processes."""
    copied = copy.deepcopy(metric)
    copied.reset()
    for each in filter(is_metric, copied.modules()):
        each.sync_on_compute = each._to_sync = each.dist_sync_on_step = False  # noqa: SLF001  # read by `compute`
    return copied


@final
class MetricStates:
    """Accumulates the states of a metric over the batches of an evaluation.

    The states of each batch start at their defaults, and are merged in the order of the batches by the reductions that
    the metric declares. So the result has the same bits however many ranks share the batches. torchmetrics does not
    say how to merge the states of a metric with `full_state_update` other than False, with metrics inside of it, or
    with other reductions: such a metric gets the arguments of all batches, one after the other, on every rank.

    Args:
        metric: The metric, which is copied.
        what: What the metric is, for errors.
        keep: Whether to keep what the batches contribute for `parts`, because several ranks share the batches.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> mean = MeanMetric()
        >>> states = MetricStates(mean)
        >>> for values in (torch.tensor([1.0, 2.0]), torch.tensor([6.0])):
        ...     states.add(Arguments((values,), {}))
        >>> states.value(), mean.update_called
        (tensor(3.), False)
    """

    def __init__(self, metric: Any, what: str = "a metric", *, keep: bool = False) -> None:
        self._what = what
        self._metric = copy_metric(metric)
        self._merges = _merges_of(self._metric)
        self._keep = keep
        self._parts: list[Any] = []
        self._is_random = any(is_metric_class(type(each), "BootStrapper") for each in self._metric.modules())
        self._updates = 0

    def add(self, arguments: Arguments) -> None:
        """Add the arguments of a batch.

        Raises:
            MetricStateError: If `update` changes what is no state of the metric, so that the states are not all that
                it remembers.
        """
        self._add_part(freeze(arguments) if self._merges is None else self._states_after(arguments))

    def parts(self) -> tuple[Any, ...]:
        """Return the states of the batches, of which those that merge exactly are one part; or their arguments."""
        return tuple(self._parts)

    def merge(self, parts: Iterable[Any]) -> None:
        """Replace what was added by the parts of all ranks, in the order of the batches."""
        self._keep, self._parts = False, []
        for part in parts:
            self._add_part(part)

    def value(self) -> Any:
        """Return what `compute` returns for all batches."""
        if self._keep:
            self.merge(self.parts())
        if self._merges is not None:
            self._restore(self._parts[0])
        return self._metric.compute()

    def _add_part(self, part: Any) -> None:
        if self._merges is None and not self._keep:
            self._update_in_order(Arguments(*part))
        elif self._merges is None or not self._parts or (self._keep and not _merges_exactly(self._merges, part)):
            self._parts.append(part)
        else:
            last = self._parts[-1]
            self._parts[-1] = {name: merge(last[name], part[name]) for name, merge in self._merges.items()}

    def _states_after(self, arguments: Arguments) -> dict[str, Any]:
        """Return the states of one batch."""
        self._metric.reset()
        before = _plain_attributes(self._metric)
        self._update(arguments)
        changed = [name for name, value in _plain_attributes(self._metric).items() if before.get(name) != value]
        if changed:
            kind = type(self._metric).__name__
            raise MetricStateError(
                f"{kind}.update changes {', '.join(changed)}, which is no state of the metric: make it one by "
                f"add_state, or write full_state_update = True in {kind}"
            )
        states = {name: getattr(self._metric, name) for name in self._merges or ()}
        return {name: tuple(state) if isinstance(state, list) else state for name, state in states.items()}

    def _update_in_order(self, arguments: Arguments) -> None:
        """Update with the next batch, with the same random numbers on all ranks."""
        self._updates += 1
        if not self._is_random:
            self._update(arguments)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._updates)
            self._update(arguments)

    def _update(self, arguments: Arguments) -> None:
        try:
            self._move_to(arguments)
            self._metric.update(*arguments.positional, **arguments.named)
        except Exception as error:
            called = ", ".join(map(describe_value, (*arguments.positional, *arguments.named.values())))
            error.add_note(CallNote(f"in {self._what}, whose update got {called}"))
            raise

    def _restore(self, states: Mapping[str, Any]) -> None:
        self._move_to(states)
        self._metric.reset()
        for name, state in states.items():
            setattr(self._metric, name, list(state) if isinstance(state, tuple) else state)
        self._metric._update_count = 1  # noqa: SLF001  # this rank may have had no batch

    def _move_to(self, tree: Any) -> None:
        """Move the metric to the device of the first tensor in `tree`."""
        found = next((tensor.device for _, tensor in tensors(tree)), self._metric.device)
        if found != self._metric.device:
            self._metric.to(found)


def _merges_of(metric: Any) -> dict[str, Merge] | None:
    """Return for each state the function that merges those of two batches; None if torchmetrics does not say how."""
    # `full_state_update` says whether `update` may depend on earlier batches. Wrappers keep states in other metrics.
    if metric.full_state_update is not False or any(map(is_metric, metric.children())):
        return None
    reductions = metric._reductions  # noqa: SLF001  # it has no public name
    merges = {name: _merge_of(default, reductions[name]) for name, default in metric._defaults.items()}  # noqa: SLF001  # torchmetrics has no public list of states
    known = {name: merge for name, merge in merges.items() if merge is not None}
    return known if known and len(known) == len(merges) else None


def _merge_of(default: Any, reduction: Any) -> Merge | None:
    name = getattr(reduction, "__name__", "") if getattr(reduction, "__module__", "").startswith(f"{_HOME}.") else ""
    if isinstance(default, list):
        return operator.add if reduction is None or name == "dim_zero_cat" else None
    if name == "dim_zero_sum" and not default.any():  # else the default would be added for each batch
        return torch.add
    return {"dim_zero_max": torch.maximum, "dim_zero_min": torch.minimum}.get(name)


def _merges_exactly(merges: Mapping[str, Merge], part: Mapping[str, Any]) -> bool:
    """Return whether the states have the same bits in whichever groups they are merged."""
    return not any(
        merge is torch.add and (part[name].is_floating_point() or part[name].is_complex())
        for name, merge in merges.items()
    )


def _plain_attributes(metric: Any) -> dict[str, Any]:
    """Return the attributes that are numbers, text or None, other than those of torchmetrics itself."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value for name, value in vars(metric).items() if type(value) in plain and name not in _BASE_ATTRIBUTES
    }
