"""The callback of transformers that runs noether's callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.tensors.forward import forward
from noether.integrations.accelerate import epoch_lengths
from noether.integrations.huggingface.checkpoints import checkpoint_path, read_memory, write_memory
from noether.integrations.huggingface.outputs import drop_loss
from noether.session.rank_exchange import check_world_size
from noether.session.session import Session
from noether.session.settings import fill_run
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import nn
    from transformers import TrainerControl, TrainingArguments

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects import RunDirectory

_CLOCK: Final = Clock()
_RUN: Final = Run()


class StoppedRunError(NoetherError):
    """The run to resume was stopped."""


@final
class NoetherCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not read transformers, see pyproject.toml
    """Runs callbacks beside a `NoetherTrainer`.

    Args:
        callbacks: One callback, or several in order.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: Batches by dataset key, for callbacks that evaluate.
        seed: Seed of the random numbers of callbacks.
        clock: Reads the time.
        run: More facts about the run, such as `Run(forward=...)` to evaluate a loss other than the model's.

    Example:
        >>> import tempfile
        >>> from transformers import TrainingArguments
        >>> from noether.core.callbacks import OnlineLossCallback
        >>> from noether.integrations.huggingface import NoetherTrainer
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         return {"loss": (super().forward(x) - labels).square().mean()}
        >>> show = lambda effects, state, event: print(state.iteration, *effects) if effects else None
        >>> callback = NoetherCallback(OnlineLossCallback(every_n_epochs=1), interpreter=show)
        >>> samples = [{"x": torch.zeros(2), "labels": torch.zeros(1)}] * 8
        >>> with tempfile.TemporaryDirectory() as path:
        ...     settings = {"num_train_epochs": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True}
        ...     arguments = TrainingArguments(path, per_device_train_batch_size=4, save_strategy="no", **settings)
        ...     trainer = NoetherTrainer(Model(2, 1), arguments, train_dataset=samples, callbacks=[callback])
        ...     _ = trainer.train()
        E1_U2_S8 LogScalars(values=FrozenDict({'loss/online/total/E1': tensor(..., dtype=torch.float64)}))
        {'train_runtime': ...}
    """

    def __init__(
        self,
        callbacks: Callback | Sequence[Callback],
        *,
        directory: RunDirectory | None = None,
        interpreter: Callable[[Effects, TrainState, Event], None] | None = None,
        data: Mapping[str, Iterable[Any]] | None = None,
        seed: int = 0,
        clock: Clock = _CLOCK,
        run: Run = _RUN,
    ) -> None:
        self.resume_from: Path | None = None
        """The checkpoint of transformers from which `NoetherMixin.train` resumes."""
        self._run = run
        self._make_session = partial(
            Session, callbacks, directory=directory, interpreter=interpreter, data=data, seed=seed, clock=clock
        )
        self._session: Session | None = None
        self._model: Any = None
        self._scaler: Any = None
        self._parts: list[Tensor] = []

    @property
    def session(self) -> Session:
        """The session beside the trainer.

        Raises:
            RuntimeError: If training has not started.
        """
        if self._session is None:
            raise RuntimeError("the session starts with training: call trainer.train() first")
        return self._session

    def batch_arrived(self) -> None:
        """Mark the arrival of a micro-batch."""
        self.session.batch_arrived()

    def micro_batch(self, *, loss: Tensor, samples: int, outputs: Any, of: int) -> None:
        """Report a micro-batch whose gradients are computed.

        Args:
            loss: Its share of the update's loss.
            samples: Its samples in this process.
            outputs: Outputs of the model.
            of: Micro-batches of the update.
        """
        session, mean = self.session, loss * of
        self._parts.append(loss if samples else torch.zeros_like(loss))  # the loss of an empty micro-batch is NaN
        session.micro_batch(
            {"total": mean},
            outputs=outputs,
            samples=samples,
            of=of,
        )
        if len(self._parts) == of:
            session.measure_gradients(scale=None if self._scaler is None else self._scaler.get_scale())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Start or resume the run.

        Raises:
            ValueError: If the run in the directory and the trainer are at different updates.
            FileNotFoundError: If the checkpoint to resume from does not contain the state of the run.
        """
        self._model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._scaler = getattr(optimizer, "scaler", None)  # of accelerate, with fp16
        self._parts = []
        self._session = session = self._make_session(
            run=_fill_run(self._run, self._model, args, state, kwargs["train_dataloader"]),
            model=self._model,
            optimizer=getattr(optimizer, "optimizer", optimizer),  # inside of the wrapper of accelerate
            scheduler=kwargs["lr_scheduler"],
            scaler=self._scaler,
        )
        check_world_size(session.ranks, args.world_size, "start all processes with torchrun or accelerate launch")
        session.continue_after_end = "set a larger num_train_epochs or max_steps in TrainingArguments"
        session.remember_generators(kwargs["train_dataloader"])  # transformers restores them
        if self.resume_from is not None:
            session.load_state_dict(read_memory(self.resume_from))
        session.load()
        _check_position(session.state.iteration, state.global_step)
        session.begin()
        if session.stop is not None:
            session.end()
            raise StoppedRunError  # otherwise transformers would make another update
        return control

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a trainer that does not report its losses, before the first step of the optimizer.

        Raises:
            TypeError: If no loss was reported.
        """
        if not self._parts:
            raise TypeError(
                "this trainer does not report its losses: use NoetherTrainer in place of Trainer, or, for another "
                "trainer, class MyTrainer(NoetherMixin, OtherTrainer): ..."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Report an update."""
        session, total = self.session, sum(self._parts[1:], start=self._parts[0])
        session.update(mean=total, skipped=not session.steps)
        self._parts = []
        return self._apply_stop(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Dispatch `AfterEpoch` if the epoch is completed."""
        self.session.end_epoch(cut_short=control.should_training_stop or control.should_epoch_stop)
        return self._apply_stop(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the state of the run to the checkpoint that was just written."""
        if state.is_world_process_zero:
            write_memory(checkpoint_path(args, state.global_step), self.session.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Dispatch `AfterTraining` if the run is at its end."""
        if self.session.is_over:
            self.session.end()
        else:
            if control.should_training_stop:
                self.session.record_stop("a callback of transformers set control.should_training_stop")
            self.session.close()

    def _apply_stop(self, control: TrainerControl) -> TrainerControl:
        control.should_training_stop = control.should_training_stop or self.session.is_over
        return control


def _fill_run(run: Run, model: nn.Module, args: TrainingArguments, state: TrainerState, loader: Any) -> Run:
    """Return `run` with the facts that the trainer knows."""
    known = {
        "end": TrainingIteration(update=state.max_steps),
        # If the loader has no length, transformers treats the run as one epoch.
        "updates_per_epoch": state.max_steps,
        **epoch_lengths(loader, args.gradient_accumulation_steps, args.world_size),
        "forward": _forward_of(model),
    }
    return fill_run(run, **known)


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    def loss(outputs: Any, _: Any) -> dict[str, Tensor]:
        return {"total": outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]}

    plain = forward(model, loss)

    def call(state: TrainState, batch: Any) -> Any:
        losses, outputs = plain(state, batch)
        return losses, drop_loss(outputs)

    return call


def _check_position(at: TrainingIteration, update: int) -> None:
    if at.update != update:
        raise ValueError(
            f"the run is at {at}, and the trainer at update {update}: resume from a checkpoint of transformers, or "
            "make one: trainer.train(resume_from_checkpoint=to_checkpoint(directory.load(), trainer)); a new run needs "
            "a new directory"
        )
