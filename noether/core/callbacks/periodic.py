"""Base classes for callbacks that fire at an interval, with or without a pass over a dataset."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from noether.core.callback_checks import check_result
from noether.core.callbacks.base import HOOKS, CallbackBase
from noether.core.callbacks.dataset_results import DatasetResults
from noether.core.callbacks.metric_states import add_to
from noether.core.callbacks.rank_results import results_over_ranks
from noether.core.effect import LogText
from noether.core.errors import Problem, check_whole, raise_problems, suggest
from noether.core.event import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
    Event,
    kind_of,
)
from noether.core.schedules.gate import Gate, Interval
from noether.core.schedules.schedule import INTERVALS
from noether.core.shards import check_not_sharded
from noether.core.stretch import CompletedUpdate
from noether.core.tensors.means import Mean, Sum
from noether.core.tensors.module import device_of
from noether.core.tensors.stored_weights import memory_of, use_weights
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from noether.core.callback import Callback, Effects
    from noether.core.callbacks.metric_states import Accumulator
    from noether.core.run import Run
    from noether.core.schedules.base import Schedule
    from noether.core.state import TrainState
    from noether.core.update_calls import CallForUpdates

__all__ = ["Mean", "PeriodicCallback", "PeriodicDataIteratorCallback", "Sum"]

_ACTING_HOOKS: Final = (
    "periodic_callback",
    "track_after_accumulation_step",
    "track_after_update_step",
    "track_updates",
)
_PERIODIC_HOOKS: Final = (*_ACTING_HOOKS, "can_wait", "fire_updates")


class PeriodicCallback(CallbackBase):
    """Base class of callbacks that fire every n epochs, updates or samples.

    A subclass defines `periodic_callback`, which is called at the interval. It may define
    `track_after_accumulation_step`, which is called at every accumulation step, and `track_after_update_step`, which is
    called at every update; or `track_updates` in place of the latter, which a loop may call once for several updates.
    `can_wait` and `fire_updates` say which updates these are, and what several firings do. At a standalone evaluation
    (`AtEval`) it does nothing unless it defines `at_eval`.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.
        at_end: Whether to fire after training too, unless the callback fired at the last update or epoch.

    Raises:
        SettingsError: If not exactly one interval is given, or it is not a whole number >= 1.

    Example:
        >>> from noether import LogText, TrainState
        >>> class Count(PeriodicCallback):
        ...     def periodic_callback(self, state, event, interval):
        ...         return state, (LogText(f"{interval} {state.iteration}"),)
        >>> Count(every_n_updates=1)(TrainState().advance(samples=8), AfterUpdate(samples=8))[1]
        (LogText(text='update E0_U1_S8'),)
    """

    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    every_n_samples: int | None = None
    at_end: bool = False

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings; a subclass adds its own after `yield from super().problems()`."""
        yield from super().problems()
        given = {name: value for name in INTERVALS if (value := getattr(self, name)) is not None}
        names = ", ".join(INTERVALS)
        if not given:
            yield Problem("", f"no interval is set; give exactly one of {names}")
        if len(given) > 1:
            both = " and ".join(f"{name}: {value!r}" for name, value in given.items())
            yield Problem(list(given)[-1], f"{both} are both set; give exactly one of {names}")
        yield from (check_whole(name, value) for name, value in given.items())
        if {"track_updates", "track_after_update_step"} <= vars(type(self)).keys():
            label = type(self).__name__
            yield Problem("", f"{label} defines track_updates and track_after_update_step: keep one of them")

    def _hook_names(self) -> tuple[str, ...]:
        return (*super()._hook_names(), *_PERIODIC_HOOKS)

    def _check_hooks(self) -> Problem | None:
        hooks = ("__call__", *HOOKS.values(), *_ACTING_HOOKS)
        overrides = any(self.overrides(hook, PeriodicCallback) for hook in hooks)
        return None if overrides else self._no_hook("periodic_callback")

    def _no_hook(self, hook: str) -> Problem:
        kind = type(self)
        return Problem("", f"{kind.__name__} does nothing: define {hook}{suggest(hook, vars(kind))}")

    @property
    def _interval(self) -> Schedule:
        return next(INTERVALS[name](n) for name in INTERVALS if (n := getattr(self, name)) is not None)

    @property
    def schedule(self) -> Schedule:
        """When it fires, other than at the end."""
        return self._interval

    @cached_property
    def gate(self) -> Gate:
        """When it fires."""
        return Gate(self.schedule, self.at_end)

    @cached_property
    def interval_name(self) -> str:
        """Short name of the interval, such as `E1`, `U100` or `S512`."""
        return str(self._interval)

    def name_parts(self) -> tuple[str, ...]:
        """Return the short name of the interval."""
        return (self.interval_name,)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Return the state and effects of a firing.

        Args:
            state: The state at the event.
            event: `AfterUpdate`, `AfterEpoch` or `AfterTraining`.
            interval: What made it fire: `epoch`, `update` or `sample` for its interval, `end` for `at_end` after
                training. A `PeriodicDataIteratorCallback` also fires at a standalone evaluation, `AtEval`, with
                `eval`; any other callback does nothing there, unless it defines `at_eval`.
        """
        return state, ()

    def track_after_accumulation_step(
        self,
        state: TrainState,
        event: AfterAccumulationStep,
    ) -> tuple[TrainState, Effects]:
        """Return the state after an accumulation step, and no effects: a reducer refuses them here."""
        return state, ()

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Return the state and effects of an update; called at each one, before `periodic_callback` if that is due."""
        if self.overrides("track_updates", PeriodicCallback):
            return self.track_updates(state, (CompletedUpdate(state.iteration, event),))
        return state, ()

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Return the state and effects of one or several updates; in place of `track_after_update_step`.

        A subclass may define it if a call for several updates returns what a call for each of them would, in order: if
        it reads of the state nothing but its own memory and metrics, and of the events neither outputs nor gradients.
        For updates that waited, a reducer refuses any other change of the state, and effects other than `LogUpdates`.
        The updates for which it needs more must not wait: see `can_wait`.

        Args:
            state: The state after the last of the updates, or a later one.
            updates: The updates, in order; the callback has not fired between them.

        Example:
            >>> from noether import AfterUpdate, BeforeTraining, TrainState, compose
            >>> class LongestUpdateCallback(PeriodicCallback):
            ...     def init(self, state):
            ...         return {self.name: 0.0}
            ...     def track_updates(self, state, updates):
            ...         longest_s = max(event.duration_s for _, event in updates)
            ...         return state.remember(self.name, max(self.memory(state), longest_s)), ()
            >>> reducer = compose(LongestUpdateCallback(every_n_epochs=1, id="longest"))
            >>> state = reducer(TrainState(), BeforeTraining())[0].advance(samples=4)
            >>> reducer(state, AfterUpdate(samples=4, duration_s=0.5))[0].memory("longest")
            0.5
        """
        return state, ()

    def can_wait(self, state: TrainState, event: AfterUpdate) -> bool:
        """Return whether `track_updates` may be called later for an update; a subclass may refuse some of them.

        Args:
            state: The state after the update, in which its memory lacks the updates that wait.
            event: The event of the update.
        """
        return True

    def fire_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Return the state and effects of firings at several updates in a row, for an interval of one update.

        A subclass may define it under the conditions of `track_updates`, if its `periodic_callback` requests only
        `LogScalars`; one `LogUpdates` takes the place of those of all updates.
        """
        return state, ()

    def after_accumulation_step(self, state: TrainState, event: AfterAccumulationStep) -> tuple[TrainState, Effects]:
        """Call `track_after_accumulation_step`."""
        return self.track_after_accumulation_step(state, event)

    def after_update(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Call `track_after_update_step`, and fire if the interval counts updates or samples and is due."""
        if not self._tracks:
            return self._fire_if_due(state, event)
        result = self.track_after_update_step(state, event)
        check_result(self, result, "track_after_update_step")
        state, tracked = result
        result = self._fire_if_due(state, event)
        check_result(self, result, "periodic_callback")
        state, effects = result
        return state, tracked + effects

    def after_epoch(self, state: TrainState, event: AfterEpoch) -> tuple[TrainState, Effects]:
        """Fire if the interval counts epochs and is due."""
        return self._fire_if_due(state, event)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Fire if `at_end` is true and the callback did not fire at the last update or epoch."""
        return self._fire_if_due(state, event)

    def _fire_if_due(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        interval = self.gate.due(type(event), state)
        return (state, ()) if interval is None else self.periodic_callback(state, event, interval)

    @cached_property
    def _tracks(self) -> bool:
        """Whether a reducer has to call it at every update, even while its gate is closed."""
        hooks = ("track_after_update_step", "track_updates", "after_update")
        return any(self.overrides(hook, PeriodicCallback) for hook in hooks)

    @cached_property
    def _tracks_several(self) -> bool:
        """Whether a reducer may call `track_updates` once for several updates."""
        others = ("track_after_update_step", "after_update", "__call__")
        return self.overrides("track_updates", PeriodicCallback) and not any(
            self.overrides(hook, PeriodicCallback) for hook in others
        )

    @property
    def _track_updates(self) -> CallForUpdates | None:
        return self.track_updates if self._tracks_several else None

    @property
    def _can_wait(self) -> Callable[[TrainState, AfterUpdate], bool] | None:
        return self.can_wait if self.overrides("can_wait", PeriodicCallback) else None

    @property
    def _fire_updates(self) -> CallForUpdates | None:
        """What a reducer may call in place of firings: not if a subclass changed what a firing does."""
        kind = type(self)
        definer = next(base for base in kind.__mro__ if "fire_updates" in vars(base))
        is_changed = any(
            getattr(kind, hook) is not getattr(definer, hook)
            for hook in ("periodic_callback", "after_update", "__call__")
        )
        return None if definer is PeriodicCallback or self._tracks or is_changed else self.fire_updates

    @property
    def _tracker(self) -> Callback | None:
        if self.overrides("after_update", PeriodicCallback) or self.overrides("__call__", PeriodicCallback):
            return self
        return self.track_after_update_step if self._tracks else None  # type: ignore[return-value]  # only for updates

    def _listens(self, event_type: type[Event]) -> bool:
        kind = kind_of(event_type)
        hooks = ["__call__", HOOKS.get(kind, "__call__")]
        if kind is AfterAccumulationStep:
            hooks.append("track_after_accumulation_step")
        return (
            any(self.overrides(hook, PeriodicCallback) for hook in hooks)
            or self.gate.listens(kind)
            or (kind is AfterUpdate and self._tracks)
        )


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
        >>> from noether import Run, TrainState, log
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
