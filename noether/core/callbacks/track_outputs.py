"""What the model returns in training, beside the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import Effect, SaveTensors
from noether.core.errors import OutputError, Problem, check_choice, suggest
from noether.core.event import AfterUpdate
from noether.core.metrics import log, patterns_containing
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


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
        yield check_choice("reduce", self.reduce, ("mean", "last"))
        if not self.log_output and not self.save_output:
            yield Problem("", "log_output and save_output are both false: nothing would come of it")

    def distinction(self) -> tuple[str, ...]:
        """Return interval and what is tracked."""
        return (*super().distinction(), ",".join((*self.keys, *self.patterns)))

    @property
    def produces(self) -> tuple[str, ...]:
        """A key for each output; of patterns, those with one `/` in their name at most."""
        names = (*self.keys, *(name for pattern in self.patterns for name in patterns_containing(pattern)))
        return tuple(f"{name}/{self.interval_name}" for name in names) if self.log_output else ()

    @property
    def _tracks(self) -> bool:
        """Whether it looks at every update: for a mean, and where the firing's own event carries no outputs."""
        return self.reduce == "mean" or self.every_n_epochs is not None or self.at_end

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return nothing seen yet."""
        return {self.name: FrozenDict()} if self._tracks else {}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the update's outputs, or with `last` remember them."""
        if event.skipped:
            return state, ()
        seen = self._seen(event)
        if self.reduce == "mean":
            seen = _added(self.memory(state), seen)
        return state.remember(self.name, seen), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log and save, and begin anew."""
        seen = FrozenDict()
        if self._tracks:
            seen = self.memory(state)
            state = state.remember(self.name, FrozenDict())
        elif isinstance(event, AfterUpdate) and not event.skipped:
            seen = self._seen(event)
        if not seen:
            return state, ()
        means = {name: output["sum"] / output["samples"] for name, output in seen.items()}
        effects: tuple[Effect, ...] = ()
        if self.log_output:
            scalars = {f"{name}/{self.interval_name}": mean for name, mean in means.items()}
            state, effects = log(state, event, scalars, quiet=not self.verbose)
        if self.save_output:
            tensors = {name: output.get("whole", means[name]) for name, output in seen.items()}
            name = f"outputs/{self.interval_name}/{state.iteration}"
            effects = (*effects, SaveTensors(name=name, tensors=FrozenDict(tensors)))
        return state, effects

    def _seen(self, event: AfterUpdate) -> FrozenDict:
        """Return by name the sum of an output over its samples, their number, and where it is saved the whole of it."""
        steps = self._steps(event)
        samples = event.samples if self.reduce == "mean" else 1  # the last one is as it is
        seen: dict[str, FrozenDict] = {}
        for name in self._matching(steps):
            values = [step[name] for step in steps]
            seen[name] = FrozenDict(sum=_mean(values, event) * samples, samples=samples)
            if self.reduce == "last" and self.save_output and _tensor(values[0]).ndim:
                seen[name] = seen[name] | {"whole": torch.cat(list(map(_tensor, values)))}
        return FrozenDict(seen)

    def _steps(self, event: AfterUpdate) -> Sequence[Mapping[str, Any]]:
        outputs = event.outputs
        steps = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        odd = [step for step in steps if not isinstance(step, Mapping)]
        if odd or not steps:
            said = "nothing" if not steps or odd[0] is None else f"a {type(odd[0]).__name__}"
            raise OutputError(f"{self.name}: the model returns {said}; to have outputs tracked, return a dict of them")
        return steps

    def _matching(self, steps: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the names of the tracked outputs; each accumulation step returns them."""
        names = [n for n in steps[0] if n in self.keys or any(pattern in n for pattern in self.patterns)]
        for name in (*self.keys, *names):
            for outputs in steps:
                if name not in outputs:
                    known = ", ".join(map(repr, outputs)) or "none"
                    like = suggest(name, outputs)
                    raise OutputError(f"{self.name}: the model returns no {name!r}; it returns {known}{like}")
        return names


def _added(held: Mapping[str, Any], seen: Mapping[str, Any]) -> FrozenDict:
    """Return the outputs with those of one more update; an output need not come with every update."""
    both = {
        name: FrozenDict(sum=held[name]["sum"] + new["sum"], samples=held[name]["samples"] + new["samples"])
        for name, new in seen.items()
        if name in held
    }
    return FrozenDict({**held, **seen, **both})


def _mean(values: Sequence[Any], event: AfterUpdate) -> torch.Tensor:
    """Return the mean of an output over the samples of an update, given by accumulation step."""
    sizes = event.accumulated or (1,) * len(values)
    terms = [_tensor(value).double().mean() * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True)]
    return torch.stack(terms).sum()


def _tensor(value: Any) -> torch.Tensor:
    exact = torch.float64 if isinstance(value, float) else None
    return torch.as_tensor(value, dtype=exact).detach()


TrackAdditionalOutputsCallback = TrackOutputsCallback
"""The name that the class-based framework gives it."""
