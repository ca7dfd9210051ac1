"""Trainers of transformers that report their losses to a `NoetherCallback`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from noether.core.tensors.containers import map_tensors
from noether.integrations.huggingface.callback import NoetherCallback, StoppedRunError
from noether.integrations.huggingface.outputs import drop_loss

if TYPE_CHECKING:
    from torch import nn


class NoetherMixin:
    """Reports losses, outputs and samples to each `NoetherCallback` among the callbacks of a trainer.

    List it before the trainer: `class MyTrainer(NoetherMixin, SFTTrainer): ...`
    """

    _outputs: Any = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001  # as in transformers
        *args: Any,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train, or resume from a checkpoint of transformers; a stopped run stays stopped.

        Args:
            resume_from_checkpoint: The checkpoint; True for the newest.
            args: As for the trainer.
            kwargs: As for the trainer.
        """
        trainer: Any = self
        path = resume_from_checkpoint
        if path is True:
            path = get_last_checkpoint(trainer.args.output_dir) or True
        for callback in _noether_callbacks(trainer):
            callback.resume_from = Path(path) if isinstance(path, (str, Path)) else None
        try:
            output: TrainOutput = super().train(path, *args, **kwargs)  # type: ignore[misc]  # of the trainer beside it
        except StoppedRunError:
            trainer.is_in_train = False
            output = TrainOutput(trainer.state.global_step, math.nan, {})
        return output

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a micro-batch, after its backward."""
        trainer: Any = self
        callbacks = _noether_callbacks(trainer)
        for callback in callbacks:
            callback.batch_arrived()
        samples = [callback.session.run.count_samples(inputs) for callback in callbacks]
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]  # of the trainer
        outputs, self._outputs = self._outputs, None
        for callback, size in zip(callbacks, samples, strict=True):
            callback.micro_batch(
                loss=loss, samples=size, outputs=outputs, of=trainer.current_gradient_accumulation_steps
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,  # noqa: FBT001, FBT002  # as in transformers
        **kwargs: Any,
    ) -> Any:
        """Return the loss, with the outputs if `return_outputs`."""
        trainer: Any = super()
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self._outputs = map_tensors(Tensor.detach, drop_loss(outputs))
        return (loss, outputs) if return_outputs else loss


class NoetherTrainer(NoetherMixin, Trainer):  # type: ignore[misc]  # transformers leaves it untyped
    """The `Trainer` of transformers, reporting its losses to each `NoetherCallback`."""


def _noether_callbacks(trainer: Any) -> list[NoetherCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, NoetherCallback)]
