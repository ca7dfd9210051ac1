"""The event of an update, as a step returns it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from noether.core.event import AfterUpdate
from noether.core.tensors.losses import WeightedLosses

if TYPE_CHECKING:
    from noether.core.tensors.losses import Losses
    from noether.training.step.update_settings import UpdateSettings


def make_event(
    losses: Losses,
    outputs: tuple[Any, ...],
    samples: tuple[int, ...],
    settings: UpdateSettings,
    **readings: Any,
) -> AfterUpdate:
    """Return the event of an update, without the run and the times that the loop adds.

    Args:
        losses: Mean losses of the update by name.
        outputs: Outputs of the model for each micro-batch.
        samples: Samples of each micro-batch.
        settings: Settings of the optimizer.
        readings: Further fields of the event.
    """
    if isinstance(losses, WeightedLosses):
        readings["loss_weights"] = losses.weights
    return AfterUpdate.of(
        samples=sum(samples),
        losses=losses,
        outputs=outputs,
        accumulated=samples,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        **readings,
    )
