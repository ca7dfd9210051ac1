"""Callbacks that run at an interval, and those among them that iterate a dataset."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, final

import torch

from noether.core.callbacks.base import HOOKS, CallbackBase
from noether.core.errors import Problem, check_whole, suggest
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, AtEval, Event
from noether.core.schedules.gate import Gate, Interval
from noether.core.schedules.schedule import INTERVALS
from noether.core.tensors.stored_weights import memory_of, use_weights
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from noether.core.callback import Callback, Effects
    from noether.core.schedules.schedule import Schedule
    from noether.core.state import TrainState

_TRACKS: Final = ("track_after_accumulation_step", "track_after_update_step")


class PeriodicCallback(CallbackBase):
    """A callback that runs every n epochs, updates or samples.

    A subclass fills in `periodic_callback`, called when the interval is due, and may fill in the two `track_` hooks,
    called at every accumulation step and update.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.
        at_end: Whether to run after training too, unless it was due at the last update or epoch.

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
        """Yield what is wrong with the settings; a subclass adds its own."""
        yield from super().problems()
        yield self._idle()
        given = {name: value for name in INTERVALS if (value := getattr(self, name)) is not None}
        names = ", ".join(INTERVALS)
        if not given:
            yield Problem("", f"no interval is set; give exactly one of {names}")
        if len(given) > 1:
            both = " and ".join(f"{name}: {value!r}" for name, value in given.items())
            yield Problem(list(given)[-1], f"{both} are both set; give exactly one of {names}")
        yield from (check_whole(name, value) for name, value in given.items())

    def _idle(self) -> Problem | None:
        """Return the problem of a class that fills in no hook, most often for a misspelt name."""
        hooks = (*_TRACKS, *HOOKS.values(), "periodic_callback")
        if any(self.fills_in(hook, PeriodicCallback) for hook in hooks):
            return None
        return _does_nothing(type(self), "periodic_callback")

    @property
    def schedule(self) -> Schedule:
        """When it is due."""
        name, n = next((name, n) for name in INTERVALS if (n := getattr(self, name)) is not None)
        return INTERVALS[name](n)

    @cached_property
    def gate(self) -> Gate:
        """When it runs."""
        return Gate(self.schedule, self.at_end)

    @cached_property
    def interval_name(self) -> str:
        """Short name of the interval, such as `E1`, `U100` or `S512`."""
        name, n = next((name, n) for name in INTERVALS if (n := getattr(self, name)) is not None)
        return f"{name.removeprefix('every_n_')[0].upper()}{n}"

    def distinction(self) -> tuple[str, ...]:
        """Return the interval."""
        return (self.interval_name,)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Return what happens when it is due.

        Args:
            state: The state at the event.
            event: `AfterUpdate`, `AfterEpoch`, `AfterTraining` or `AtEval`, as `interval` says.
            interval: `epoch`, `update` or `sample` as its interval is one of; `end` after training with `at_end`;
                `eval` at an evaluation outside of training.
        """
        return state, ()

    def track_after_accumulation_step(
        self,
        state: TrainState,
        event: AfterAccumulationStep,
    ) -> tuple[TrainState, Effects]:
        """Return what happens after every accumulation step; effects are refused here."""
        return state, ()

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Return what happens after every update, before `periodic_callback` if that is due."""
        return state, ()

    def after_accumulation_step(self, state: TrainState, event: AfterAccumulationStep) -> tuple[TrainState, Effects]:
        """Track the accumulation step."""
        return self.track_after_accumulation_step(state, event)

    def after_update(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Track the update, and run if updates or samples are due."""
        state, tracked = self.track_after_update_step(state, event) if self._tracks else (state, ())
        state, effects = self._run_if_due(state, event)
        return state, tracked + effects

    def after_epoch(self, state: TrainState, event: AfterEpoch) -> tuple[TrainState, Effects]:
        """Run if epochs are due."""
        return self._run_if_due(state, event)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Run if `at_end` asks for it."""
        return self._run_if_due(state, event)

    def _run_if_due(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        interval = self.gate.due(type(event), state)
        return (state, ()) if interval is None else self.periodic_callback(state, event, interval)

    @cached_property
    def _tracks(self) -> bool:
        """Whether it has to see every update, its gate open or closed."""
        return any(self.fills_in(hook, PeriodicCallback) for hook in ("track_after_update_step", "after_update"))

    @property
    def _tracker(self) -> Callback | None:
        if self.fills_in("after_update", PeriodicCallback) or self.fills_in("__call__", PeriodicCallback):
            return self
        return self.track_after_update_step if self._tracks else None  # type: ignore[return-value]  # only for updates

    def _listens(self, event_type: type[Event]) -> bool:
        if event_type is AfterAccumulationStep:
            return self.fills_in("track_after_accumulation_step", PeriodicCallback)
        hook = HOOKS.get(event_type, "__call__")
        return (
            self.fills_in(hook, PeriodicCallback)
            or self.gate.listens(event_type)
            or (event_type is AfterUpdate and self._tracks)
        )


@final
@dataclass(frozen=True)
class Mean:
    """A result of a batch that becomes a mean over the samples of the dataset.

    Args:
        of_batch: 0-dimensional, the mean over the batch, which is weighted by its number of samples; or `(batch,)`, a
            value for each sample, whose mean does not depend on how the dataset is cut into batches.
    """

    of_batch: torch.Tensor


class PeriodicDataIteratorCallback(PeriodicCallback):
    """A periodic callback that iterates a dataset with the model in evaluation mode, and then looks at the results.

    A subclass fills in `process_data`, called for each batch, and `process_results`, called once. It also runs at an
    evaluation outside of training, whatever its interval.

    Args:
        dataset_key: Which of `event.data` to iterate.
        batch_size: Samples in a batch, >= 1; None takes the batches as they come.
        weights: Whose weights to evaluate, such as `ema=0.999`; None takes those in training.

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

    def _idle(self) -> Problem | None:
        hooks = ("process_data", "process_results", "periodic_callback")
        if any(self.fills_in(hook, PeriodicDataIteratorCallback) for hook in hooks):
            return None
        return _does_nothing(type(self), "process_results")

    def distinction(self) -> tuple[str, ...]:
        """Return interval, dataset and weights."""
        return (*super().distinction(), self.dataset_key, *((self.weights,) if self.weights else ()))

    def key(self, metric: str) -> str:
        """Return the metric key for `metric` on this dataset and these weights, such as `val/accuracy`."""
        return "/".join((self.dataset_key, metric, *((self.weights,) if self.weights else ())))

    @property
    def consumes(self) -> tuple[str, ...]:
        """The weights that it evaluates, if not those in training."""
        return () if self.weights is None else (memory_of(self.weights),)

    def process_data(
        self, state: TrainState, batch: Any, forward: Callable[..., Any]
    ) -> Mapping[str, torch.Tensor | Mean]:
        """Return the results of one batch.

        Args:
            state: The state, holding the weights to evaluate.
            batch: What the dataset yields.
            forward: `(state, batch) -> (losses, outputs)`, without gradients.

        Returns:
            Tensor by name: a 0-dimensional one is summed over the dataset, in double precision if it is floating
            point; a `Mean` becomes the mean over the dataset; any other is concatenated in the dataset's order along
            its first dimension.
        """
        return {}

    def process_results(
        self,
        state: TrainState,
        event: Event,
        results: Mapping[str, Any],
    ) -> tuple[TrainState, Effects]:
        """Return what happens with the results of the whole dataset, and `results["samples"]`, their number."""
        return state, ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Iterate the dataset, and hand on the results."""
        evaluated = state if self.weights is None else use_weights(state, self.weights)
        collected, forward = _Collected(), event.run.forward
        with getattr(forward, "evaluating", nullcontext)():
            for batch in self._batches(event):
                collected.add(self.process_data(evaluated, batch, forward), event.run.batch_size(batch))
        return self.process_results(state, event, collected.results())

    def at_eval(self, state: TrainState, event: AtEval) -> tuple[TrainState, Effects]:
        """Run, whatever the interval."""
        return self.periodic_callback(state, event, "eval")

    def _batches(self, event: Event) -> Iterable[Any]:
        if self.dataset_key not in event.data:
            known = ", ".join(map(repr, event.data)) or "none"
            raise KeyError(f"no dataset {self.dataset_key!r}; datasets: {known}{suggest(self.dataset_key, event.data)}")
        data = event.data[self.dataset_key]
        if self.batch_size is None:
            batches: Iterable[Any] = data
            return batches
        if not hasattr(data, "batched"):
            raise TypeError(
                f"{self.name}: batch_size: dataset {self.dataset_key!r} cannot be batched anew; leave it out"
            )
        rebatched: Iterable[Any] = data.batched(self.batch_size)
        return rebatched


def _does_nothing(kind: type, hook: str) -> Problem:
    like = suggest(hook, vars(kind))
    return Problem("", f"{kind.__name__} does nothing: fill in {hook}{like}")


class _Collected:
    """Results of batches as they come in; a value of one call, never kept by a callback."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._means: dict[str, torch.Tensor] = {}
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._samples = 0

    def add(self, results: Mapping[str, torch.Tensor | Mean], samples: int) -> None:
        self._samples += samples
        for name, value in results.items():
            if name == "samples":
                raise ValueError("process_data returned a result named 'samples', which is the number of samples")
            if isinstance(value, Mean):
                _add(self._means, name, *_summed(name, value.of_batch, samples))
            elif value.ndim:
                self._parts.setdefault(name, []).append(value)
            else:
                _add(self._sums, name, value)

    def results(self) -> Mapping[str, Any]:
        means = {name: total / self._samples for name, total in self._means.items()}
        parts = {name: torch.cat(values) for name, values in self._parts.items()}
        return FrozenDict({**self._sums, **means, **parts, "samples": self._samples})


def _summed(name: str, of_batch: torch.Tensor, samples: int) -> tuple[torch.Tensor, int]:
    """Return a tensor and the factor with which it is the sum over the samples of a batch."""
    if not of_batch.ndim:
        return of_batch if of_batch.is_floating_point() else of_batch.double(), samples
    if of_batch.shape != (samples,):
        right = "return one value for each sample, (batch,), or their mean, ()"
        raise ValueError(f"{name!r} has shape {tuple(of_batch.shape)} for {samples} samples; {right}")
    return of_batch.sum(dtype=torch.float64), 1


def _add(sums: dict[str, torch.Tensor], name: str, term: torch.Tensor, factor: int = 1) -> None:
    """Add to a sum; it is held in double precision where it is floating point."""
    if name in sums:
        sums[name] = torch.add(sums[name], term, alpha=factor)
    else:
        sums[name] = (term.double() if term.is_floating_point() else term) * factor
