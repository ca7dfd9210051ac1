"""What an update gives beside the new state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    Losses = Mapping[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Accumulated:
    """What one accumulation step gave, for those who listen.

    Args:
        losses: Mean loss of the micro-batch by name.
        outputs: What the model returned.
        samples: Samples in the micro-batch.
        accumulation_step: Index of the micro-batch in its update.
        accumulation_steps: Micro-batches of this update.
    """

    losses: Losses
    outputs: Any
    samples: int
    accumulation_step: int
    accumulation_steps: int


@final
@dataclass(kw_only=True)  # not frozen: that takes longer to make, and it lives until the event is made of it
class StepOutputs:
    """What an update gave beside the new state; the fields are those of `AfterUpdate`."""

    samples: int
    losses: Losses
    outputs: tuple[Any, ...]
    accumulated: tuple[int, ...]
    lr: Mapping[str, float]
    weight_decay: Mapping[str, float]
    grad_norm: Tensor | None
    finite: Tensor | bool | None
    skipped: bool = False
    forward_s: float | None = None
    backward_s: float | None = None
    optimizer_s: float | None = None


def outputs_of(
    losses: FrozenDict,
    outputs: tuple[Any, ...],
    accumulated: tuple[int, ...],
    settings: Mapping[str, Mapping[str, float]],
    **readings: Any,
) -> StepOutputs:
    """Return what an update gave.

    Args:
        losses: Mean losses of the update by name.
        outputs: Of each micro-batch.
        accumulated: Samples of each micro-batch.
        settings: Settings of the optimizer by group.
        readings: The other fields.
    """
    return StepOutputs(
        samples=sum(accumulated),
        losses=losses,
        outputs=outputs,
        accumulated=accumulated,
        lr=FrozenDict({group: values["lr"] for group, values in settings.items()}),
        weight_decay=FrozenDict({g: v["weight_decay"] for g, v in settings.items() if "weight_decay" in v}),
        **readings,
    )
