"""Writes the sizes of model and data, and the configuration, into the summary before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callbacks.base import CallbackBase
from noether.core.effect import LogText, SetSummary
from noether.core.errors import Problem, raise_problems
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from noether.core.callback import Effects
    from noether.core.event import BeforeTraining
    from noether.core.run import Run
    from noether.core.state import TrainState

_FIXES: Final = {
    "frozen": "the names of the params that the optimizer does not update, or frozenset()",
    "data": "the datasets by key, or data= to a Session",
    "config": "the configuration as plain values, or leave the callback out",
}
"""What a loop has to pass for each field of `Run` that a summary reads."""


class _SummaryCallback(CallbackBase):
    """Writes facts about the run into the summary before training."""

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Write the facts into the summary and, if they are short, to the console."""
        field = self.field
        if field is not None and field not in vars(event.run):
            raise_problems([Problem("", f"{self.name} reads run.{field}: pass Run({field}=...), {_FIXES[field]}")])
        facts = self.facts(state, event.run)
        if not facts:
            return state, ()
        text = "\n".join(f"{name:<{max(map(len, facts))}}  {value}" for name, value in facts.items())
        return state, (*((LogText(text),) if self.on_console else ()), SetSummary(FrozenDict(facts)))

    @property
    def field(self) -> str | None:
        """The field of `Run` that it reads."""
        return None

    @property
    def on_console(self) -> bool:
        """Whether the facts are short enough for the console."""
        return True

    def facts(self, state: TrainState, run: Run) -> Mapping[str, Any]:
        """Return the entries of the summary by key."""
        return {}


@final
class ParamCountCallback(_SummaryCallback):
    """Writes the number of trainable and frozen parameters into the summary, before training.

    The keys are `params/trainable` and `params/frozen`, and for each direct sub-module `params/{module}/trainable` and
    `params/{module}/frozen`.

    ```yaml
    - kind: noether.core.callbacks.ParamCountCallback
    ```

    Example:
        >>> import torch
        >>> from noether import BeforeTraining, Run, TrainState
        >>> state = TrainState(params={"body.weight": torch.zeros(3, 2), "head.weight": torch.zeros(2)})
        >>> _, effects = ParamCountCallback()(state, BeforeTraining(run=Run(frozen=frozenset({"body.weight"}))))
        >>> print(effects[0].text)
        params/trainable       2
        params/frozen          6
        params/body/trainable  0
        params/body/frozen     6
        params/head/trainable  2
        params/head/frozen     0
    """

    @property
    def field(self) -> str | None:
        """The names of the frozen params."""
        return "frozen"

    def facts(self, state: TrainState, run: Run) -> Mapping[str, Any]:
        """Return the counts."""
        return param_counts(state.params, run.frozen)


@final
class DatasetStatsCallback(_SummaryCallback):
    """Writes the number of samples of each dataset into the summary as `samples/{dataset}`, before training.

    A dataset without a length is left out.

    ```yaml
    - kind: noether.core.callbacks.DatasetStatsCallback
    ```

    Example:
        >>> import torch
        >>> from noether import BeforeTraining, Run, TrainState
        >>> run = Run(data={"val": [torch.zeros(4, 2), torch.zeros(3, 2)]})
        >>> print(DatasetStatsCallback()(TrainState(), BeforeTraining(run=run))[1][0].text)
        samples/val  7
    """

    @property
    def field(self) -> str | None:
        """The datasets."""
        return "data"

    def facts(self, state: TrainState, run: Run) -> Mapping[str, Any]:
        """Return the counts."""
        return dataset_lengths(run)


@final
class HyperparamsCallback(_SummaryCallback):
    """Writes the resolved configuration into the summary as `config`, before training.

    ```yaml
    - kind: noether.core.callbacks.HyperparamsCallback
    ```

    Example:
        >>> from noether import BeforeTraining, Run, TrainState
        >>> run = Run(config={"optimizer": {"lr": 0.1}})
        >>> HyperparamsCallback()(TrainState(), BeforeTraining(run=run))[1]
        (SetSummary(values=FrozenDict({'config': {'optimizer': {'lr': 0.1}}})),)
    """

    @property
    def field(self) -> str | None:
        """The configuration."""
        return "config"

    @property
    def on_console(self) -> bool:
        """False: a configuration is long, and `config.yaml` has it, too."""
        return False

    def facts(self, state: TrainState, run: Run) -> Mapping[str, Any]:
        """Return the configuration."""
        return {"config": run.config}


def param_counts(params: Mapping[str, torch.Tensor], frozen: frozenset[str]) -> dict[str, int]:
    """Return the numbers of trainable and frozen parameters, in total and for each direct sub-module."""
    counts = {"params/trainable": 0, "params/frozen": 0}
    for name, tensor in params.items():
        module, _, rest = name.partition(".")
        for owner in ("params", f"params/{module}") if rest else ("params",):
            counts.setdefault(f"{owner}/trainable", 0)
            counts.setdefault(f"{owner}/frozen", 0)
            counts[f"{owner}/{'frozen' if name in frozen else 'trainable'}"] += tensor.numel()
    return counts


def dataset_lengths(run: Run) -> dict[str, int]:
    """Return the number of samples of each dataset of a run, without datasets that have no length."""
    lengths = {key: _count_samples(data, run) for key, data in run.data.items()}
    return {f"samples/{key}": length for key, length in lengths.items() if length is not None}


def _count_samples(data: Any, run: Run) -> int | None:
    if isinstance(data, (list, tuple)):  # its elements are batches
        return sum(map(run.count_samples, data))
    sized = getattr(data, "dataset", data)  # the length of a loader is its number of batches
    return len(sized) if hasattr(sized, "__len__") else None
