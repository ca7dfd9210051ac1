"""Logs histograms of weights and of the momentum of the optimizer."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Literal, final

from noether.core.artifacts import LogHistogram
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import LogText
from noether.core.errors import Problem, check_choice, check_whole, raise_problems, suggest
from noether.core.tensors.dtensors import whole_tensor
from noether.core.tensors.histograms import count_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from noether.core.callback import Effects
    from noether.core.event import BeforeTraining, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import TrainState

_KINDS: Final = ("weights", "momentum")
_MOMENTUM: Final = ("exp_avg", "momentum_buffer", "momentum")  # names in optimizers of torch and Keras


@final
class HistogramCallback(PeriodicCallback):
    """Logs a histogram of each chosen param, and of the momentum that the optimizer keeps for it.

    The keys are `weights/{param}` and `momentum/{param}`. Momentum is the running mean of the gradients, `exp_avg` of
    Adam or `momentum_buffer` of SGD; a firing says so if there is none. Gradients of single updates are not available
    to callbacks, so that no update becomes slower; a firing reads each chosen tensor twice. Values that are not finite
    are counted apart. Params of a sharded state are gathered, one after the other.

    Args:
        patterns: Names of params, in which `*` stands for any text, such as `head.*`.
        of: `weights`, `momentum` or both.
        bins: Number of bins, all of one width between the least and the largest finite value.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        SettingsError: If a setting is out of range; before training, if no param has a name like one of `patterns`.

    ```yaml
    - kind: noether.core.callbacks.HistogramCallback
      every_n_epochs: 5
      patterns: ["head.*"]
      of: [weights, momentum]
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
    of: tuple[Literal["weights", "momentum"], ...] = ("weights",)
    bins: int = 64

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield None if self.patterns else Problem("patterns", "no params are chosen; write ['*'] for all")
        yield None if self.of else Problem("of", f"nothing is chosen; give one or both of {', '.join(_KINDS)}")
        yield from (check_choice("of", kind, _KINDS) for kind in self.of)
        yield check_whole("bins", self.bins)

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def name_parts(self) -> tuple[str, ...]:
        """Return the interval, the patterns and what the histograms are of."""
        return (*super().name_parts(), ",".join(self.patterns), ",".join(self.of))

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Refuse patterns that no param has."""
        unknown = [each for each in self.patterns if not any(fnmatchcase(name, each) for name in state.params)]
        problems = [
            Problem("patterns", f"no param has a name like {each!r}{suggest(each, state.params)}") for each in unknown
        ]
        raise_problems(problems)
        return state, ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log the histograms; say so if the optimizer keeps no momentum."""
        histograms = tuple(self._histogram(key, tensor) for key, tensor in self._choose(state).items())
        if "momentum" in self.of and not any(each.key.startswith("momentum/") for each in histograms):
            fix = "write of: [weights], or use an optimizer that has one, such as torch.optim.AdamW"
            return state, (*histograms, LogText(f"{self.name}: the optimizer keeps no momentum of these params; {fix}"))
        return state, histograms

    def _choose(self, state: TrainState) -> dict[str, torch.Tensor]:
        sources = {"weights": state.params, "momentum": _momentum_by_name(state.opt_state)}
        return {
            f"{kind}/{name}": tensor
            for kind in self.of
            for name, tensor in sources[kind].items()
            if any(fnmatchcase(name, pattern) for pattern in self.patterns)
        }

    def _histogram(self, key: str, tensor: torch.Tensor) -> LogHistogram:
        counted = count_values(whole_tensor(tensor.detach()), self.bins)
        return LogHistogram(key, counts=counted.counts, edges=counted.edges, nan=counted.nan, infinite=counted.infinite)


def _momentum_by_name(opt_state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the momentum of each param that has one; a state of several optimizers has one part for each."""
    if "state" not in opt_state:
        return {name: each for part in opt_state.values() for name, each in _momentum_by_name(part).items()}
    memories = opt_state["state"]
    found = {
        name: next((memory[kind] for kind in _MOMENTUM if kind in memory), None) for name, memory in memories.items()
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}
