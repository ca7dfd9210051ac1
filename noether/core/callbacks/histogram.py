"""Logs histograms of weights, of gradients, and of the momentum of the optimizer."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Literal, final

from noether.core.artifacts import LogHistogram
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import LogText
from noether.core.errors import Problem, check_choice, check_whole, raise_problems, suggest
from noether.core.event import AfterUpdate
from noether.core.tensors.dtensors import whole_tensor
from noether.core.tensors.histograms import count_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from noether.core.callback import Effects
    from noether.core.event import BeforeTraining, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import TrainState

_KINDS: Final = ("weights", "gradients", "momentum")
_MOMENTUM: Final = ("exp_avg", "momentum_buffer", "momentum")  # names in optimizers of torch and Keras


@final
class HistogramCallback(PeriodicCallback):
    """Logs a histogram of each chosen param, of its gradient, and of the momentum that the optimizer keeps for it.

    The keys are `weights/{param}`, `gradients/{param}` and `momentum/{param}`. Weights are those after the update.
    Gradients are those of the update at which it fires, before clipping. The trainer copies all gradients at that
    update; with `trainer.compile`, and in a `Session`, at every update. Momentum is the running mean of the gradients,
    `exp_avg` of Adam or `momentum_buffer` of SGD, which is also known at the end of an epoch. Values that are not
    finite are counted apart. Without gradients, as at a skipped update, or without momentum, a firing logs a line.

    A tied weight has one histogram, under its first name; a pattern may match any of its names.

    A firing reads each chosen tensor twice. Params of a sharded state are gathered, one after the other.

    Args:
        patterns: Names of params, in which `*` stands for any text, such as `head.*`.
        of: One or more of `weights`, `gradients` and `momentum`. Gradients need an interval of updates or samples, and
            have no histogram that `at_end` logs.
        bins: Number of bins, all of one width between the least and the largest finite value.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        SettingsError: If a setting is out of range; before training, if no param matches one of `patterns`.

    ```yaml
    - kind: noether.core.callbacks.HistogramCallback
      every_n_updates: 500
      patterns: ["head.*"]
      of: [weights, gradients]
    ```

    Example:
        >>> import torch
        >>> from noether import AfterEpoch, TrainState
        >>> state = TrainState(params={"head.weight": torch.tensor([0.0, 1.0, 1.0])}).next_epoch()
        >>> state, effects = HistogramCallback(every_n_epochs=1, bins=2)(state, AfterEpoch())
        >>> effects[0].key, effects[0].counts
        ('weights/head.weight', tensor([1, 2]))
    """

    patterns: tuple[str, ...] = ("*",)
    of: tuple[Literal["weights", "gradients", "momentum"], ...] = ("weights",)
    bins: int = 64

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield None if self.patterns else Problem("patterns", "no params are chosen; write ['*'] for all")
        yield None if self.of else Problem("of", f"nothing is chosen; give one or more of {', '.join(_KINDS)}")
        yield from (check_choice("of", kind, _KINDS) for kind in self.of)
        if "gradients" in self.of and self.every_n_epochs is not None:
            yield Problem("of", "gradients belong to an update: give every_n_updates or every_n_samples")
        if set(self.of) == {"gradients"} and self.at_end:
            yield Problem("at_end", "after training there are no gradients: leave it out, or add weights to of")
        yield check_whole("bins", self.bins)

    @property
    def readings(self) -> tuple[str, ...]:
        """The gradients, if it logs them."""
        return ("gradients",) if "gradients" in self.of else ()

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def name_parts(self) -> tuple[str, ...]:
        """Return the interval, the patterns and what the histograms are of."""
        return (*super().name_parts(), ",".join(self.patterns), ",".join(self.of))

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Refuse patterns that match no param."""
        names = (*state.params, *state.tied_names)
        unknown = [each for each in self.patterns if not any(fnmatchcase(name, each) for name in names)]
        problems = [Problem("patterns", f"no param matches {each!r}{suggest(each, names)}") for each in unknown]
        raise_problems(problems)
        return state, ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log the histograms; say so if there are no gradients or no momentum."""
        effects: list[LogHistogram | LogText] = []
        for kind in self.of:
            chosen = self._choose(self._tensors(kind, state, event), state)
            effects += [self._histogram(f"{kind}/{name}", tensor) for name, tensor in chosen.items()]
            if not chosen and (reason := _explain_absence(kind, event)):
                effects.append(LogText(f"{self.name}: {reason}"))
        return state, tuple(effects)

    def _tensors(self, kind: str, state: TrainState, event: Event) -> Mapping[str, torch.Tensor]:
        if kind == "weights":
            return state.params
        if kind == "momentum":
            return _momentum_by_name(state.opt_state)
        is_read = isinstance(event, AfterUpdate) and not event.skipped
        return (event.gradients or {}) if is_read else {}  # type: ignore[attr-defined]  # of an AfterUpdate

    def _choose(self, tensors: Mapping[str, torch.Tensor], state: TrainState) -> dict[str, torch.Tensor]:
        chosen = {name for alias, name in state.tied_names.items() if self._matches(alias)}
        return {name: tensor for name, tensor in tensors.items() if name in chosen or self._matches(name)}

    def _matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def _histogram(self, key: str, tensor: torch.Tensor) -> LogHistogram:
        counted = count_values(whole_tensor(tensor.detach()), self.bins)
        return LogHistogram(key, counts=counted.counts, edges=counted.edges, nan=counted.nan, infinite=counted.infinite)


def _explain_absence(kind: str, event: Event) -> str | None:
    """Return why there is no tensor of a kind; None after training, where there are no gradients."""
    if kind == "momentum":
        fix = "leave momentum out of `of`, or use an optimizer that has one, such as torch.optim.AdamW"
        return f"the optimizer keeps no momentum of these params; {fix}"
    if not isinstance(event, AfterUpdate):
        return None
    if event.skipped:
        return "the update was skipped, so it has no gradients"
    if event.gradients is None:  # where a resumed run repeats an update, its loop had no reason to copy them
        return "no gradients were copied in this update; a loop without Session passes AfterUpdate(gradients=...)"
    return "these params have no gradients"


def _momentum_by_name(opt_state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the momentum of each param that has one; a state of several optimizers has one part for each."""
    if "state" not in opt_state:
        return {name: each for part in opt_state.values() for name, each in _momentum_by_name(part).items()}
    memories = opt_state["state"]
    found = {
        name: next((memory[kind] for kind in _MOMENTUM if kind in memory), None) for name, memory in memories.items()
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}
