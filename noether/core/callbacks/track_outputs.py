"""What the model returns in training, beside the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import Effect, SaveTensors
from noether.core.errors import OutputError, Problem, nearest, one_of
from noether.core.event import AfterUpdate
from noether.core.metrics import log
from noether.core.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.gate import Interval
    from noether.core.state import Memory, TrainState

Tensors = Mapping[str, torch.Tensor]


@final
class TrackOutputsCallback(PeriodicCallback):
    """Logs `{key}/{interval}` for outputs of the training step: entries of the mapping that the model returns.

    Over accumulation steps an output is weighted by samples, and one with dimensions is averaged over its entries.
    Updates that were skipped as non-finite do not count.

    Args:
        keys: Outputs to track, by their exact name.
        patterns: Outputs to track, by a part of their name; keys or patterns are given, or both.
        reduce: `mean` over all updates since the last firing, or `last`: that of the last update.
        log_output: Whether to log them.
        save_output: Whether to save them to `tensors/outputs/`: with `mean` the means, with `last` the outputs of the
            last update as they are, its accumulation steps joined.
        verbose: Whether they are shown on the console, too.
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

    Raises:
        OutputError: If the model returns no such output, naming those that it returns, or no mapping.

    ```yaml
    - kind: noether.core.callbacks.TrackOutputsCallback
      every_n_updates: 50
      keys: [residual]
      patterns: [attention]
      reduce: mean
    ```

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> event = AfterUpdate(samples=4, outputs={"residual": torch.tensor([1.0, 3.0])})
        >>> callback = TrackOutputsCallback(every_n_updates=1, keys=("residual",))
        >>> _, effects = callback(TrainState().advance(samples=4), event)
        >>> effects[0].values["residual/U1"]
        tensor(2., dtype=torch.float64)
    """

    keys: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    reduce: Literal["mean", "last"] = "mean"
    log_output: bool = True
    save_output: bool = False
    verbose: bool = False

    def problems(self) -> Iterator[Problem | None]:
        """Yield what is wrong with the settings."""
        yield from super().problems()
        if not self.keys and not self.patterns:
            yield Problem("", "nothing is tracked; give keys or patterns")
        yield one_of("reduce", self.reduce, ("mean", "last"))
        if not self.log_output and not self.save_output:
            yield Problem("", "log_output and save_output are both false: nothing would come of it")

    def distinction(self) -> tuple[str, ...]:
        """Return interval and what is tracked."""
        return (*super().distinction(), ",".join((*self.keys, *self.patterns)))

    @property
    def produces(self) -> tuple[str, ...]:
        """A key for each output."""
        names = (*self.keys, *(f"*{pattern}*" for pattern in self.patterns)) if self.log_output else ()
        return tuple(f"{name}/{self.interval_name}" for name in names)

    @property
    def tracks(self) -> bool:
        """Whether it looks at every update: for a mean, and where the firing's own event carries no outputs."""
        return self.reduce == "mean" or self.every_n_epochs is not None or self.at_end

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return nothing seen yet."""
        return {self.name: FrozenDict(values=FrozenDict(), samples=0)} if self.tracks else {}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the update's outputs, or with `last` remember them."""
        if event.skipped:
            return state, ()
        if self.reduce == "last":
            seen = FrozenDict(values=FrozenDict(self._last(event)), samples=event.samples)
            return state.remember(self.name, seen), ()
        sums, samples = self.memory(state)["values"], self.memory(state)["samples"]
        added = {name: mean * event.samples for name, mean in self._means(event).items()}
        added = {name: sums[name] + value if name in sums else value for name, value in added.items()}
        counted = FrozenDict(values=FrozenDict({**sums, **added}), samples=samples + event.samples)
        return state.remember(self.name, counted), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log and save, and begin anew."""
        if not self.tracks:
            return self._told(state, event, self._last(event) if isinstance(event, AfterUpdate) else {})
        memory = self.memory(state)
        values = memory["values"]
        if self.reduce == "mean":
            values = {name: total / memory["samples"] for name, total in values.items()}
            state = state.remember(self.name, self.init(state)[self.name])
        return self._told(state, event, values)

    def _told(self, state: TrainState, event: Event, values: Tensors) -> tuple[TrainState, Effects]:
        if not values:
            return state, ()
        effects: tuple[Effect, ...] = ()
        if self.log_output:
            scalars = {f"{name}/{self.interval_name}": value.double().mean() for name, value in values.items()}
            state, effects = log(state, event, scalars, quiet=not self.verbose)
        if self.save_output:
            name = f"outputs/{self.interval_name}/{state.iteration}"
            effects = (*effects, SaveTensors(name=name, tensors=FrozenDict(values)))
        return state, effects

    def _means(self, event: AfterUpdate) -> Tensors:
        """Return the mean of each output over the samples of the update."""
        steps = self._steps(event)
        return {name: _weighted_mean([step[name] for step in steps], event) for name in self._matching(steps[0])}

    def _last(self, event: AfterUpdate) -> Tensors:
        """Return each output of the update, its accumulation steps joined."""
        steps = self._steps(event)
        return {name: _joined([step[name] for step in steps], event) for name in self._matching(steps[0])}

    def _steps(self, event: AfterUpdate) -> Sequence[Mapping[str, Any]]:
        steps = [event.outputs] if isinstance(event.outputs, Mapping) else list(event.outputs or ())
        odd = next((step for step in steps if not isinstance(step, Mapping)), None)
        if odd is not None or not steps:
            said = "nothing" if odd is None else f"a {type(odd).__name__}"
            raise OutputError(f"{self.name}: the model returns {said}; to have outputs tracked, return a dict of them")
        return steps

    def _matching(self, outputs: Mapping[str, Any]) -> list[str]:
        for key in self.keys:
            if key not in outputs:
                known = ", ".join(map(repr, outputs)) or "none"
                raise OutputError(
                    f"{self.name}: the model returns no {key!r}; it returns {known}{nearest(key, outputs)}"
                )
        return [name for name in outputs if name in self.keys or any(pattern in name for pattern in self.patterns)]


def _weighted_mean(values: Sequence[Any], event: AfterUpdate) -> torch.Tensor:
    sizes = event.accumulated or (1,) * len(values)
    terms = [_tensor(value).double().mean() * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True)]
    return torch.stack(terms).sum()


def _joined(values: Sequence[Any], event: AfterUpdate) -> torch.Tensor:
    tensors = list(map(_tensor, values))
    return torch.cat(tensors) if tensors[0].ndim else _weighted_mean(values, event)


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach()


TrackAdditionalOutputsCallback = TrackOutputsCallback
"""The name that the class-based framework gives it."""
