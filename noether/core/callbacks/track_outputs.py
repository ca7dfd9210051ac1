"""Logs and saves outputs of the training step other than the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from noether.core.callbacks.metric_functions import mean_of_output, to_tensor
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
    """Logs `{key}/{interval}` for entries of the dict that the model returns in training.

    An output with several entries is averaged over them, and accumulation steps are weighted by their samples; those
    without the output do not count, nor do updates that were skipped because they were not finite.

    Args:
        keys: Exact names of the outputs to track, which every update has.
        patterns: Parts of names of outputs to track, which some updates may have. Give `keys`, `patterns` or both.
        reduce: `mean` over all updates since the last firing, or `last` for the last update only.
        log_output: Whether to log the outputs.
        save_output: Whether to save the outputs to `tensors/outputs/`: with `mean` their means, with `last` the whole
            outputs of the last update, concatenated over its accumulation steps.
        verbose: Whether to show the outputs on the console, too.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        OutputError: If the model returns no dict, or no output of this name; the message lists the outputs.

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
        """Yield the problems of the settings."""
        yield from super().problems()
        if not self.keys and not self.patterns:
            yield Problem("", "no outputs are chosen; give keys or patterns")
        yield check_choice("reduce", self.reduce, ("mean", "last"))
        if not self.log_output and not self.save_output:
            yield Problem("", "log_output and save_output are both false; set at least one of them to true")

    def name_parts(self) -> tuple[str, ...]:
        """Return the interval and the chosen outputs."""
        return (*super().name_parts(), ",".join((*self.keys, *self.patterns)))

    @property
    def produces(self) -> tuple[str, ...]:
        """The key of each output; for patterns, of outputs with at most one `/` in their name."""
        names = (*self.keys, *(name for pattern in self.patterns for name in patterns_containing(pattern)))
        return tuple(f"{name}/{self.interval_name}" for name in names) if self.log_output else ()

    @cached_property
    def _tracks(self) -> bool:
        """Whether it reads every update: for a mean, and where it fires at an event without outputs."""
        return self.reduce == "mean" or self.every_n_epochs is not None or self.at_end

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return an empty memory if the callback has to remember outputs."""
        return {self.name: FrozenDict()} if self._tracks else {}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the outputs of the update, or remember them if `reduce` is `last`."""
        if event.skipped:
            return state, ()
        outputs = self._reduce(event)
        if self.reduce == "mean":
            outputs = _add(self.memory(state), outputs)
        return state.remember(self.name, outputs), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log and save the outputs, and start a new interval."""
        outputs = FrozenDict()
        if self._tracks:
            outputs = self.memory(state)
            state = state.remember(self.name, FrozenDict())
        elif isinstance(event, AfterUpdate) and not event.skipped:
            outputs = self._reduce(event)
        if not outputs:
            return state, ()
        means = {name: output["sum"] / output["samples"] for name, output in outputs.items()}
        effects: tuple[Effect, ...] = ()
        if self.log_output:
            scalars = {f"{name}/{self.interval_name}": mean for name, mean in means.items()}
            state, effects = log(state, event, scalars, quiet=not self.verbose)
        if self.save_output:
            tensors = {name: output.get("whole", means[name]) for name, output in outputs.items()}
            name = f"outputs/{self.interval_name}/{state.iteration}"
            effects = (*effects, SaveTensors(name=name, tensors=FrozenDict(tensors)))
        return state, effects

    def _reduce(self, event: AfterUpdate) -> FrozenDict:
        """Return sum, number of samples and, if it will be saved whole, the tensor of each chosen output, by name."""
        steps = self._outputs_of_steps(event)
        sizes = event.accumulated or (1,) * len(steps)
        # A step without samples has outputs without a mean.
        steps = [step for step, size in zip(steps, sizes, strict=True) if size]
        sizes = tuple(filter(None, sizes))
        samples = event.samples if self.reduce == "mean" else 1
        reduced: dict[str, FrozenDict] = {}
        for name in self._chosen_names(steps):
            values = [step[name] for step in steps if name in step]
            parts = tuple(size for step, size in zip(steps, sizes, strict=True) if name in step)
            # Not all steps may have it: it is the mean of those that do.
            weight = samples if len(parts) == len(sizes) else samples * sum(parts) / sum(sizes)
            reduced[name] = FrozenDict(sum=_mean(name, values, parts) * weight, samples=weight)
            if self.reduce == "last" and self.save_output and to_tensor(values[0]).ndim:
                reduced[name] = reduced[name] | {"whole": torch.cat(list(map(to_tensor, values)))}
        return FrozenDict(reduced)

    def _outputs_of_steps(self, event: AfterUpdate) -> Sequence[Mapping[str, Any]]:
        outputs = event.outputs
        steps = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        others = [step for step in steps if not isinstance(step, Mapping)]
        if others or not steps:
            found = "nothing" if not steps or others[0] is None else f"a {type(others[0]).__name__}"
            raise OutputError(f"{self.name}: the model returns {found}; to track outputs, return a dict")
        return steps

    def _chosen_names(self, steps: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the names of the chosen outputs; all `keys` are among them."""
        outputs = {name: None for step in steps for name in step}
        for key in self.keys:
            if steps and key not in outputs:
                known = ", ".join(map(repr, outputs)) or "none"
                fix = suggest(key, outputs) or f"; if only some updates have it, write patterns: [{key}]"
                raise OutputError(f"{self.name}: the model returns no {key!r}; it returns {known}{fix}")
        return [name for name in outputs if name in self.keys or any(pattern in name for pattern in self.patterns)]


def _add(totals: Mapping[str, Any], outputs: Mapping[str, Any]) -> FrozenDict:
    """Return the totals with the outputs of one more update; an output may be absent from some updates."""
    both = {
        name: FrozenDict(sum=totals[name]["sum"] + new["sum"], samples=totals[name]["samples"] + new["samples"])
        for name, new in outputs.items()
        if name in totals
    }
    return FrozenDict({**totals, **outputs, **both})


def _mean(name: str, values: Sequence[Any], sizes: Sequence[int]) -> torch.Tensor:
    """Return the mean of an output over the samples of an update, from its values at each accumulation step."""
    terms = [mean_of_output(name, each) * (size / sum(sizes)) for each, size in zip(values, sizes, strict=True)]
    return torch.stack(terms).sum()


TrackAdditionalOutputsCallback = TrackOutputsCallback
"""Alias for YAML that was written for a class-based framework."""
