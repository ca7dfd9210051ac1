"""Logs and saves outputs of the training step other than the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import torch

from noether.core.callbacks.dataset_results import BatchResult
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.callbacks.metric_functions import mean_of_output, to_tensor
from noether.core.callbacks.rank_results import pack_batches, unpack_batches
from noether.core.effect import Effect, SaveTensors
from noether.core.errors import OutputError, Problem, check_choice, suggest
from noether.core.event import AfterUpdate
from noether.core.metric_keys import patterns_containing
from noether.core.metrics import log
from noether.core.tensors.module import device_of
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

    On several ranks it combines the outputs of all, by one exchange: at every update for a mean and for an interval in
    epochs, else when it fires.

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
        outputs = self._reduce(state, event)
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
            outputs = self._reduce(state, event)
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

    def _reduce(self, state: TrainState, event: AfterUpdate) -> FrozenDict:
        """Return sum, number of samples and, if it will be saved whole, the tensor of each chosen output, by name."""
        steps = self._gather_steps(state, event)
        samples = event.samples if self.reduce == "mean" else 1
        reduced: dict[str, FrozenDict] = {}
        for name in self._chosen_names([step.names for step in steps]):
            present = [step for step in steps if name in step.means]
            sizes = [step.samples for step in present]
            # Not all steps may have it: it is the mean of those that do.
            weight: float = samples
            if len(present) < len(steps):
                weight = samples * sum(sizes) / sum(step.samples for step in steps)
            terms = [step.means[name] * (step.samples / sum(sizes)) for step in present]
            reduced[name] = FrozenDict(sum=torch.stack(terms).sum() * weight, samples=weight)
            if name in present[0].values and present[0].values[name].ndim:
                reduced[name] = reduced[name] | {"whole": torch.cat([step.values[name] for step in present])}
        return FrozenDict(reduced)

    def _gather_steps(self, state: TrainState, event: AfterUpdate) -> list[_StepOutputs]:
        """Return the outputs of the accumulation steps of all ranks, in their order."""
        outputs = event.outputs
        steps = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        if event.run.world_size > 1 and outputs is None:
            steps = ()  # a rank may have no samples
        others = [step for step in steps if not isinstance(step, Mapping)]
        if others or (not steps and event.run.world_size == 1):
            found = "nothing" if not others or others[0] is None else f"a {type(others[0]).__name__}"
            raise OutputError(f"{self.name}: the model returns {found}; to track outputs, return a dict")
        sizes = event.accumulated or (1,) * len(steps)
        # A step without samples has outputs without a mean.
        own = [self._read_step(step, size) for step, size in zip(steps, sizes, strict=True) if size]
        if event.run.world_size == 1:
            return own
        content = {"names": tuple(step.names for step in own), "steps": pack_batches([step.pack() for step in own])}
        gathered = event.run.gather(f"{self.name}: outputs of the update", content)
        device = device_of(state.params.values())
        return [
            _StepOutputs.unpack(names, size, results)
            for each in gathered
            for names, (size, results) in zip(each["names"], unpack_batches(each["steps"], device), strict=True)
        ]

    def _read_step(self, outputs: Mapping[str, Any], samples: int) -> _StepOutputs:
        chosen = [name for name in outputs if self._chooses(name)]
        is_whole = self.reduce == "last" and self.save_output
        return _StepOutputs(
            samples=samples,
            names=tuple(outputs),
            means={name: mean_of_output(name, outputs[name]) for name in chosen},
            values={name: to_tensor(outputs[name]) for name in chosen if is_whole},
        )

    def _chooses(self, name: str) -> bool:
        return name in self.keys or any(pattern in name for pattern in self.patterns)

    def _chosen_names(self, names_of_steps: Sequence[Sequence[str]]) -> list[str]:
        """Return the names of the chosen outputs; all `keys` are among them."""
        outputs = {name: None for names in names_of_steps for name in names}
        for key in self.keys:
            if names_of_steps and key not in outputs:
                known = ", ".join(map(repr, outputs)) or "none"
                fix = suggest(key, outputs) or f"; if only some updates have it, write patterns: [{key}]"
                raise OutputError(f"{self.name}: the model returns no {key!r}; it returns {known}{fix}")
        return [name for name in outputs if self._chooses(name)]


class _StepOutputs(NamedTuple):
    """What is tracked of the outputs of one accumulation step.

    Args:
        samples: Its samples.
        names: Names of all outputs.
        means: Mean of each chosen output.
        values: Each chosen output that is saved whole.
    """

    samples: int
    names: Sequence[str]
    means: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]

    def pack(self) -> tuple[int, dict[str, BatchResult]]:
        """Return it as `pack_batches` takes it."""
        parts = {"mean": self.means, "value": self.values}
        return self.samples, {
            f"{part}/{name}": BatchResult(part, tensor)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    @classmethod
    def unpack(cls, names: Sequence[str], samples: int, results: Mapping[str, BatchResult]) -> _StepOutputs:
        """Return the step of which another rank has gathered this."""
        means, values = (
            {name.removeprefix(f"{part}/"): each.tensor for name, each in results.items() if each.kind == part}
            for part in ("mean", "value")
        )
        return cls(samples, names, means, values)


def _add(totals: Mapping[str, Any], outputs: Mapping[str, Any]) -> FrozenDict:
    """Return the totals with the outputs of one more update; an output may be absent from some updates."""
    both = {
        name: FrozenDict(sum=totals[name]["sum"] + new["sum"], samples=totals[name]["samples"] + new["samples"])
        for name, new in outputs.items()
        if name in totals
    }
    return FrozenDict({**totals, **outputs, **both})


TrackAdditionalOutputsCallback = TrackOutputsCallback
"""Alias for YAML that was written for a class-based framework."""
