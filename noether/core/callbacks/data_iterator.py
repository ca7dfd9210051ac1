"""Base class for callbacks that iterate a dataset at an interval, with the model in evaluation mode."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from noether.core.callbacks.dataset_results import DatasetResults
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.callbacks.metric_states import add_to
from noether.core.callbacks.rank_results import results_over_ranks
from noether.core.effect import LogText
from noether.core.errors import Problem, check_whole, raise_problems, suggest
from noether.core.shards import check_not_sharded
from noether.core.tensors.module import device_of
from noether.core.tensors.stored_weights import memory_of, use_weights
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from noether.core.callback import Effects
    from noether.core.callbacks.metric_states import Accumulator
    from noether.core.event import AtEval, BeforeTraining, Event
    from noether.core.run import Run
    from noether.core.schedules.gate import Interval
    from noether.core.state import TrainState
    from noether.core.tensors.means import Mean, Sum


class PeriodicDataIteratorCallback(PeriodicCallback):
    """Base class of periodic callbacks that iterate a dataset with the model in evaluation mode.

    A subclass defines `process_data`, which is called for each batch that has samples, and `process_results`, which is
    called once with the results of all batches. It also fires at every standalone evaluation.

    On several ranks, each calls `process_data` for its share of the batches, and `process_results` with the results of
    all ranks, which have the bits of one process. A subclass that overrides `periodic_callback` and iterates
    `event.data` by itself gets all batches on every rank.

    Args:
        dataset_key: Name of the dataset in `event.data`.
        batch_size: Samples per batch, >= 1; None for the batches of the dataset.
        weights: Name of the weights to evaluate, such as `ema=0.999`; None for the weights in training.

    Raises:
        SettingsError: As for `PeriodicCallback`, and if `batch_size` is not a whole number >= 1.

    Example:
        >>> import torch
        >>> from noether import AfterEpoch, Mean, Run, TrainState, log
        >>> class Average(PeriodicDataIteratorCallback):
        ...     def process_data(self, state, batch, forward):
        ...         return {"mean": Mean(batch.mean())}
        ...     def process_results(self, state, event, results):
        ...         return log(state, event, {self.key("mean"): results["mean"]})
        >>> run = Run(data={"val": [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]}, forward=None)
        >>> average = Average(every_n_epochs=1, dataset_key="val")
        >>> state, effects = average(TrainState().next_epoch(), AfterEpoch(run=run))
        >>> effects[0].values["val/mean"]
        tensor(3., dtype=torch.float64)
    """

    dataset_key: str
    batch_size: int | None = None
    weights: str | None = None

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        if self.batch_size is not None:
            yield check_whole("batch_size", self.batch_size)

    def _hook_names(self) -> tuple[str, ...]:
        return (*super()._hook_names(), "process_data", "process_results")

    def _check_hooks(self) -> Problem | None:
        hooks = ("process_data", "periodic_callback", "process_results")
        overrides = any(self.overrides(hook, PeriodicDataIteratorCallback) for hook in hooks)
        return None if overrides else self._no_hook(hooks[-1])

    def name_parts(self) -> tuple[str, ...]:
        """Return the interval, the dataset and the weights."""
        return (*super().name_parts(), self.dataset_key, *((self.weights,) if self.weights else ()))

    def key(self, metric: str) -> str:
        """Return the metric key of `metric` for this dataset and these weights, such as `val/accuracy`."""
        return "/".join((self.dataset_key, metric, *((self.weights,) if self.weights else ())))

    @property
    def consumes(self) -> tuple[str, ...]:
        """The weights that it evaluates, unless they are those in training."""
        return () if self.weights is None else (memory_of(self.weights),)

    def process_data(
        self, state: TrainState, batch: Any, forward: Callable[..., Any]
    ) -> Mapping[str, torch.Tensor | int | Mean | Sum]:
        """Return the results of one batch.

        Args:
            state: The state, with the weights to evaluate as `state.params`.
            batch: A batch of the dataset.
            forward: `(state, batch) -> (losses, outputs)`, without gradients.

        Returns:
            Results by name. A `Mean` becomes the mean over the batches that have it, weighted by their samples or by
            its weights. A `Sum`, and a whole number such as a count, is summed over the dataset. A bare 0-dimensional
            tensor of floating point is refused, because it may be either. Other tensors are concatenated along their
            first dimension in the order of the dataset.
        """
        return {}

    def process_results(
        self,
        state: TrainState,
        event: Event,
        results: Mapping[str, Any],
    ) -> tuple[TrainState, Effects]:
        """Return the state and effects for the results of the whole dataset; `results["samples"]` is its size."""
        return state, ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Iterate the dataset, and call `process_results` with its results."""
        evaluated = state if self.weights is None else use_weights(state, self.weights)
        run, data, forward = event.run, self._batches(event), event.run.forward
        accumulators = self._accumulators(run)

        def process(batch: Any) -> Any:
            results = self.process_data(evaluated, batch, forward)
            return add_to(accumulators, results) if accumulators else results

        with getattr(forward, "evaluating", nullcontext)(evaluated):
            if run.world_size == 1:
                results = DatasetResults(self.name)
                for batch, size in run.sized_batches(data):
                    if size:
                        results.add(process(batch), size)
            else:
                device = device_of(evaluated.params.values())
                results = results_over_ranks(run, self.dataset_key, data, process, self.name, device, accumulators)
        values = results.values()
        if not values["samples"]:
            return state, (LogText(f"{self.name}: no batch of {self.dataset_key} has samples, so nothing is measured"),)
        accumulated = {name: each.value() for name, each in accumulators.items()}
        return self.process_results(state, event, FrozenDict({**values, **accumulated}) if accumulated else values)

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Refuse a run without what `periodic_callback` reads, which would fail only at the first firing."""
        if not self.overrides("periodic_callback", PeriodicDataIteratorCallback):
            self._check_run(event.run)
        return state, ()

    def _check_run(self, run: Run) -> None:
        """Refuse a run without the dataset, or without a forward pass."""
        given = vars(run)
        known = given.get("data", {})
        if self.dataset_key not in known:
            fix = f"pass Run(data={{{self.dataset_key!r}: loader}}, forward=...)"
            found = f"{', '.join(map(repr, known)) or 'no data'}{suggest(self.dataset_key, known)}"
            raise_problems([Problem("", f"{self.name} iterates {self.dataset_key!r}, and the run has {found}: {fix}")])
        if "forward" not in given:
            fix = "pass Run(forward=...), a function (state, batch) -> (losses, outputs), or use a Session"
            raise_problems([Problem("", f"{self.name} evaluates the model, and the run has no forward: {fix}")])
        check_not_sharded(known[self.dataset_key], self.dataset_key)

    def at_eval(self, state: TrainState, event: AtEval) -> tuple[TrainState, Effects]:
        """Fire at every standalone evaluation."""
        if self.dataset_key in event.data:
            check_not_sharded(event.data[self.dataset_key], self.dataset_key)
        return self.periodic_callback(state, event, "eval")

    def _accumulators(self, run: Run) -> Mapping[str, Accumulator]:
        """Return what accumulates the results of these names, in place of means, sums and concatenations."""
        return {}

    def _batches(self, event: Event) -> Iterable[Any]:
        if self.dataset_key not in event.data:
            known = ", ".join(map(repr, event.data)) or "none"
            raise KeyError(f"no dataset {self.dataset_key!r}; datasets: {known}{suggest(self.dataset_key, event.data)}")
        data = event.data[self.dataset_key]
        if self.batch_size is None:
            batches: Iterable[Any] = data
            return batches
        if not hasattr(data, "batched"):
            missing = f"dataset {self.dataset_key!r} has no method `batched(batch_size)`"
            raise TypeError(f"{self.name}: batch_size: {missing}; leave batch_size out")
        rebatched: Iterable[Any] = data.batched(self.batch_size)
        return rebatched
