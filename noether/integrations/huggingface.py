"""noether's callbacks in the `Trainer` of Hugging Face transformers.

    callback = NoetherCallback(callbacks, directory=open_run("runs/mine"))
    trainer = NoetherTrainer(model, args, train_dataset=dataset, callbacks=[callback])
    trainer.train()

The callbacks of transformers are not told what the loss of a step was, nor how many samples it had. The documented
place to learn it is a subclass that overrides `training_step` and `compute_loss`: `NoetherMixin` does that, for any
trainer, as in `class MyTrainer(NoetherMixin, SFTTrainer): ...`; `NoetherTrainer` is `Trainer` with it. Under a trainer
that does not report its losses the callback refuses the first update.

| transformers | noether | with |
|---|---|---|
| `on_train_begin` | `BeforeTraining`, after it an `AfterEpoch` that is owed | `resumed` after `resume_from_checkpoint` |
| `training_step` begins | | the time before it was spent waiting for data |
| `training_step`, its backward done | `AfterAccumulationStep`, if anybody listens | losses, outputs, samples; before the optimizer steps |
| `on_step_end` | `AfterUpdate` | losses, outputs, samples, learning rates of the step, `grad_norm` before clipping if anybody reads it |
| the same, where a gradient scaler left the step out | `AfterUpdate(skipped=True)` | |
| `on_epoch_end` | `AfterEpoch` | once all updates of the epoch are counted |
| `on_save`, `resume_from_checkpoint` | `state_dict`, `load_state_dict` | in the checkpoints of transformers, as `noether.safetensors` |
| `on_train_end` | `AfterTraining` | at the end of the run, or where `state.stop` gives a reason |
| `state.stop` | `control.should_training_stop` | right after the event; a run that was stopped makes no update when it is resumed |

What is different from noether's own trainer:

- `losses` has one entry, `total`: what the trainer went backward from, with label smoothing and `compute_loss_func`.
  Of an update it is the sum of what its micro-batches gave to it. Where the loss is a mean over each micro-batch,
  transformers divides by their number and not by their samples: it is their plain mean, a short last one included.
- What stops transformers for reasons of its own is no end of the run: it can go on, and `AfterTraining` is not told.
- The learning rate is the scheduler's times `hyperparams["lr_scale"]`; transformers logs the scheduler's.
- Transformers cuts a run by `max_steps`, and so `run.end` is a number of updates.
- An evaluation by the trainer (`eval_strategy`) is its own affair. Callbacks evaluate `Run(data={...})`, with the loss
  of the model; `Run(forward=...)` takes another.
- The order of data is a function of `args.data_seed` and the epoch. Dropout draws from torch's generator, whose place
  is in the checkpoints of transformers and not in those of noether.
- On several processes every one has batches of one size, as accelerate makes them by default: samples are counted as
  those of this process times their number, repeated ones at the end of an epoch included.
- With a gradient scaler `grad_norm` is that of scaled gradients. `forward_s`, `backward_s`, `optimizer_s` are not there.
- What FSDP or DeepSpeed shard is not supported, for no process has all of it; nor is a hyperparameter search, whose
  trials save elsewhere.
"""  # noqa: E501  # a table

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.tensors.forward import forward
from noether.core.tensors.module import write_optimizer, write_weights
from noether.core.tensors.tree import map_tensors
from noether.effects.checkpoints.state_codec import encode_state
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import make_directories, replace_file
from noether.effects.disk.tensor_files import read_tensors, tensor_pieces
from noether.integrations.accelerate import epoch_lengths
from noether.session.scheduler import SchedulerMemory, position
from noether.session.session import Session
from noether.session.settings import fill_run
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn
    from transformers import TrainerControl, TrainingArguments

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects import RunDirectory

FILE: Final = "noether.safetensors"
"""What a run remembers, in a checkpoint of transformers."""
_CLOCK: Final = Clock()
_RUN: Final = Run()


@final
class NoetherCallback(TrainerCallback):
    """Runs callbacks beside a `NoetherTrainer`.

    Args:
        callbacks: One callback, or several in order.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: What callbacks evaluate, by dataset key.
        seed: Seeds the random numbers of callbacks.
        clock: Reads the time.
        run: Further facts about the run, such as `Run(forward=...)` to evaluate another loss than the model's.

    Example:
        >>> import tempfile
        >>> from transformers import TrainingArguments
        >>> from noether.core.callbacks import OnlineLossCallback
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
        self._parts: list[Tensor] = []
        self._grad_norm: Tensor | None = None

    @property
    def session(self) -> Session:
        """The session beside the trainer.

        Raises:
            RuntimeError: If training has not begun.
        """
        if self._session is None:
            raise RuntimeError("the session begins with training: call trainer.train() first")
        return self._session

    def batch_arrived(self) -> None:
        """Mark the arrival of a micro-batch."""
        self.session.batch_arrived()

    def micro_batch(self, *, loss: Tensor, samples: int, outputs: Any, of: int) -> None:
        """Report a micro-batch whose gradients are computed.

        Args:
            loss: Its share of the update's loss.
            samples: Its samples in this process.
            outputs: What the model returned.
            of: Micro-batches of the update.
        """
        session, mean = self.session, loss * of
        self._parts.append(loss)
        session.micro_batch(
            {"total": _over_ranks(mean) if session.listens_to_micro_batches else mean},
            outputs=outputs,
            samples=samples * session.run.world_size,
            of=of,
        )
        if len(self._parts) == of and "grad_norm" in session.readings:
            self._grad_norm = get_total_norm(_gradients(self._model))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Begin the run, or go on with it.

        Raises:
            ValueError: If the run in the directory is not where the trainer is.
            FileNotFoundError: If the checkpoint that is resumed from does not hold what the run remembers.
        """
        self._model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._parts, self._grad_norm = [], None
        self._session = session = self._make_session(
            run=_completed(self._run, self._model, args, state, kwargs["train_dataloader"]),
            model=self._model,
            optimizer=getattr(optimizer, "optimizer", optimizer),  # in the wrapper of accelerate
            scheduler=kwargs["lr_scheduler"],
        )
        if self.resume_from is not None:
            session.load_state_dict(_read(self.resume_from))
        session.load()
        _check_position(session.state.iteration, state.global_step)
        session.begin()
        if session.stop is not None:
            session.end()
            raise _StoppedError  # transformers would make another update
        return control

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a trainer that does not report its losses, before anything is applied.

        Raises:
            TypeError: If it does not.
        """
        if not self._parts:
            raise TypeError(
                "this trainer does not report its losses: use NoetherTrainer in place of Trainer, or, with a class of "
                "your own, class MyTrainer(NoetherMixin, YourTrainer): ..."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Report an update."""
        session, total = self.session, sum(self._parts[1:], start=self._parts[0])
        session.update(mean=_over_ranks(total), skipped=not session.steps, grad_norm=self._grad_norm)
        self._parts, self._grad_norm = [], None
        return self._stopping(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Tell of the end of an epoch, if it is completed."""
        self.session.end_epoch(cut_short=control.should_training_stop or control.should_epoch_stop)
        return self._stopping(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put what the run remembers into the checkpoint that was just written."""
        if state.is_world_process_zero:
            _write(_checkpoint(args, state.global_step), self.session.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell of the end of training, if the run is at its end."""
        if self.session.is_over:
            self.session.end()
        else:
            self.session.close()

    def _stopping(self, control: TrainerControl) -> TrainerControl:
        control.should_training_stop = control.should_training_stop or self.session.is_over
        return control


class NoetherMixin:
    """A trainer that tells each `NoetherCallback` among its callbacks what transformers does not.

    Put it before the trainer: `class MyTrainer(NoetherMixin, SFTTrainer): ...`
    """

    _outputs: Any = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001  # as in transformers
        *args: Any,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train, or go on from a checkpoint of transformers; a run that was stopped stays so.

        Args:
            resume_from_checkpoint: The checkpoint; True stands for the newest.
            args: As for the trainer.
            kwargs: Likewise.
        """
        trainer: Any = self
        path = resume_from_checkpoint
        if path is True:
            path = get_last_checkpoint(trainer.args.output_dir) or True  # type: ignore[no-untyped-call]  # transformers'
        for callback in _watching(trainer):
            callback.resume_from = Path(path) if isinstance(path, (str, Path)) else None
        try:
            output: TrainOutput = super().train(path, *args, **kwargs)  # type: ignore[misc]  # of the trainer beside it
        except _StoppedError:
            trainer.is_in_train = False
            output = TrainOutput(trainer.state.global_step, math.nan, {})
        return output

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a micro-batch, after its backward."""
        trainer: Any = self
        callbacks = _watching(trainer)
        for callback in callbacks:
            callback.batch_arrived()
        samples = [callback.session.run.batch_size(inputs) for callback in callbacks]
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
        """Return the loss, with the outputs if they are asked for."""
        trainer: Any = super()
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self._outputs = map_tensors(Tensor.detach, _without_loss(outputs))
        return (loss, outputs) if return_outputs else loss


class NoetherTrainer(NoetherMixin, Trainer):  # type: ignore[misc]  # transformers leaves it untyped
    """The `Trainer` of transformers, which tells a `NoetherCallback` its losses."""


def to_checkpoint(saved: TrainState, trainer: Trainer) -> str:
    """Write a state as a checkpoint of transformers, and return its path, to resume from.

    It goes below `args.output_dir`, under the name that transformers gives a checkpoint after as many updates.

    Args:
        saved: A state that a `NoetherCallback` saved, such as `open_run("runs/mine").load()`.
        trainer: A new trainer for the same model; its model and optimizer take on the weights and memory.

    Raises:
        KeyError: If the model does not have the weights of the state.
        ValueError: If the trainer has no model yet.
    """
    path = _checkpoint(trainer.args, saved.iteration.update)
    model, optimizer = trainer.model, trainer.create_optimizer()
    if model is None:
        raise ValueError("the trainer has a model_init and no model yet: give Trainer(model=...)")
    write_weights(model, saved.params, saved.buffers)
    write_optimizer(saved.opt_state, model, optimizer, lr_scale=1.0)
    trainer.save_model(str(path))
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    given = trainer.lr_scheduler  # None where the trainer makes one of its own when it trains
    torch.save(position(saved) if given is None else SchedulerMemory(given).state_dict(saved), path / "scheduler.pt")
    state = TrainerState(global_step=saved.iteration.update, train_batch_size=trainer.args.train_batch_size)
    # What transformers compares with its arguments, to warn where they differ.
    state.compute_steps(trainer.args, trainer.args.max_steps)  # type: ignore[no-untyped-call]  # transformers'
    state.save_to_json(str(path / "trainer_state.json"))
    _write(path, encode_state(saved))
    return str(path)


class _StoppedError(NoetherError):
    """The run that is gone on with was stopped."""


def _gradients(model: nn.Module) -> list[Tensor]:
    return [each.grad for each in model.parameters() if each.grad is not None]


def _watching(trainer: Any) -> list[NoetherCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, NoetherCallback)]


def _completed(run: Run, model: nn.Module, args: TrainingArguments, state: TrainerState, loader: Any) -> Run:
    """Return `run` with what can be read off the trainer."""
    known = {
        "end": TrainingIteration(update=state.max_steps),
        # Where the loader has no length, transformers takes the run for one epoch.
        "updates_per_epoch": state.max_steps,
        **epoch_lengths(loader, args.gradient_accumulation_steps, args.world_size),
        "forward": _forward_of(model),
    }
    return fill_run(run.replace(rank=args.process_index, world_size=args.world_size), **known)


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    def loss(outputs: Any, _: Any) -> dict[str, Tensor]:
        return {"total": outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]}

    plain = forward(model, loss)

    def call(state: TrainState, batch: Any) -> Any:
        losses, outputs = plain(state, batch)
        return losses, _without_loss(outputs)

    return call


def _without_loss(outputs: Any) -> Any:
    """Return what a model returned beside the loss, one thing as it is: the predictions of transformers."""
    if isinstance(outputs, Mapping):
        outputs = {name: value for name, value in outputs.items() if name != "loss"}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs
    others = tuple(outputs[1:])
    return others[0] if len(others) == 1 else others


def _over_ranks(loss: Tensor) -> Tensor:
    """Return the mean of a loss over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return loss
    mean = loss.clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def _check_position(at: TrainingIteration, update: int) -> None:
    if at.update != update:
        raise ValueError(
            f"the run is at {at}, and the trainer at update {update}: go on from a checkpoint of transformers, or make "
            "one, trainer.train(resume_from_checkpoint=to_checkpoint(directory.load(), trainer)); a new run needs a "
            "new directory"
        )


def _checkpoint(args: TrainingArguments, update: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{update}"


def _write(checkpoint: Path, memory: Mapping[str, Any]) -> None:
    make_directories(checkpoint, DISK)
    replace_file(checkpoint / FILE, tensor_pieces(memory["tensors"], state=memory["state"]), DISK)


def _read(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint was written without NoetherCallback, and does not hold what the run "
            "remembers; train without the callback, or from a checkpoint that it wrote"
        )
    tensors, facts = read_tensors(path.read_bytes())
    return {"state": facts["state"], "tensors": tensors}
