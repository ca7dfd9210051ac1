"""A plain update: one micro-batch, whose gradients go to the optimizer as they are, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from noether.core.tensors.containers import map_tensors
from noether.core.tensors.losses import detach_losses
from noether.training.step.accumulation import Gradients
from noether.training.step.gradients import compute_gradients, refuse_constants
from noether.training.step.update_event import make_event

if TYPE_CHECKING:
    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.core.tensors.losses import Losses
    from noether.training.step.accumulation import Grads
    from noether.training.step.model_tensors import ModelTensors
    from noether.training.step.step import Step


@final
class PlainUpdate:
    """Makes plain updates in place, to the bits of the step.

    At each update, a step asks for everything that it may have to do with losses and gradients. For a small network
    that takes as long as the optimizer; these updates, of which most runs consist, leave it out.

    Args:
        step: The step, for which `is_possible` returns True.
    """

    def __init__(self, step: Step) -> None:
        self._step = step

    @staticmethod
    def is_possible(step: Step) -> bool:
        """Return whether the step writes in place, and has no option that plain updates leave out."""
        options = (
            step.precision,
            step.loss_scaling,
            step.clip_grad_norm,
            step.clip_grad_value,
            step.gradients,
            step.elapsed_s,
            step.sharding,
        )
        is_plain = all(option is None for option in options) and not step.grad_norm and not step.checks_gradients
        return is_plain and step.donate

    def __call__(
        self, tensors: ModelTensors, state: TrainState, batch: Any, samples: tuple[int, ...]
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after the update, and the event as the step returns it.

        Args:
            tensors: The tensors of the state, which the model has.
            state: The state, for which `Step.prepare` was called and which has no extra state.
            batch: The micro-batch.
            samples: Its samples.
        """
        step, places = self._step, self._step.buffers
        tensors.bind()
        places.place(places.collect(state))
        grads, losses, output = self._differentiate(tensors, batch)
        outputs = (map_tensors(Tensor.detach, output),)
        buffers = places.read()
        present = {name: grad for name, grad in grads.items() if grad is not None}
        settings = step.settings_for(state)
        if not losses or not tensors.update(state, step.optimizer, present, settings.by_group):
            return step.apply(state, Gradients(grads, losses, buffers, samples[0]), outputs, samples, None)
        state = tensors.donate_to(state, places.split(buffers))
        finite = losses["total"] - losses["total"] == 0 if step.finite else None
        return state, make_event(losses, outputs, samples, settings, finite=finite)

    def _differentiate(self, tensors: ModelTensors, batch: Any) -> tuple[Grads, Losses, Any]:
        """Return the gradients of the total loss, the losses without their graphs, and the output of the model."""
        losses, output = self._step.run_forward(batch, tensors.parameters)
        if not losses:  # all have weight 0
            return {}, losses, output
        if not losses["total"].requires_grad:
            refuse_constants(losses, self._step.loss)
        grads = compute_gradients(losses["total"], list(tensors.leaves.values()))
        return dict(zip(tensors.leaves, grads, strict=True)), detach_losses(losses), output
