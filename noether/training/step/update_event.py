"""The event of an update, as a step returns it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from noether.core.event import AfterUpdate
from noether.core.tensors.losses import WeightedLosses
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.tensors.losses import Losses


def make_event(
    losses: Losses,
    outputs: tuple[Any, ...],
    samples: tuple[int, ...],
    settings: Mapping[str, Mapping[str, float]],
    **readings: Any,
) -> AfterUpdate:
    """Return the event of an update, without the run and the times that the loop adds.

    Args:
        losses: Mean losses of the update by name.
        outputs: Outputs of the model for each micro-batch.
        samples: Samples of each micro-batch.
        settings: Settings of the optimizer by group.
        readings: Further fields of the event.
    """
    if isinstance(losses, WeightedLosses):
        readings["loss_weights"] = losses.weights
    return AfterUpdate.of(
        samples=sum(samples),
        losses=losses,
        outputs=outputs,
        accumulated=samples,
        lr=FrozenDict({group: values["lr"] for group, values in settings.items()}),
        weight_decay=FrozenDict({g: v["weight_decay"] for g, v in settings.items() if "weight_decay" in v}),
        **readings,
    )
