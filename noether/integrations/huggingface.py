"""noether's callbacks in the `Trainer` of Hugging Face transformers.

    callback = NoetherCallback(callbacks, directory=open_run("runs/mine"))
    trainer = NoetherTrainer(model, args, train_dataset=dataset, callbacks=[callback])
    trainer.train()

transformers does not pass the loss of a step or its number of samples to callbacks. The documented way to get them is a
subclass that overrides `training_step` and `compute_loss`: `NoetherMixin` does that for any trainer, as in
`class MyTrainer(NoetherMixin, SFTTrainer): ...`; `NoetherTrainer` is `Trainer` with it. With a trainer that does not
report its losses, the callback refuses the first update.

| transformers | noether | with |
|---|---|---|
| `on_train_begin` | `BeforeTraining`, then a missing `AfterEpoch` | `resumed` after `resume_from_checkpoint` |
| `training_step` starts | | ends the wait for data |
| `training_step`, after backward | `AfterAccumulationStep`, if a callback handles it | losses, outputs, samples; before the optimizer steps |
| `on_step_end` | `AfterUpdate` | losses, outputs, samples, learning rates of the step, `grad_norm` before clipping if a callback reads it |
| the same, if a gradient scaler skipped the step | `AfterUpdate(skipped=True)` | |
| `on_epoch_end` | `AfterEpoch` | if all updates of the epoch are counted |
| `on_save`, `resume_from_checkpoint` | `state_dict`, `load_state_dict` | in the checkpoints of transformers, as `noether.safetensors` |
| `on_train_end` | `AfterTraining` | at the end of the run, or if `state.stop` gives a reason |
| `state.stop` | `control.should_training_stop` | right after the event; a stopped run makes no update when it is resumed |

Differences from noether's trainer:

- `losses` has one entry, `total`: the loss of the trainer's backward, with label smoothing and `compute_loss_func`. For
  an update it is the sum of the shares of its micro-batches. If the loss is a mean over each micro-batch, transformers
  divides by their number and not by their samples: the sum is their plain mean, including a short last one.
- If transformers stops for another reason, the run has not ended: it can resume, and `AfterTraining` is not dispatched.
- The learning rate is the scheduler's times `hyperparams["lr_scale"]`; transformers logs the scheduler's.
- transformers ends a run by `max_steps`, so `run.end` is a number of updates.
- An evaluation by the trainer (`eval_strategy`) dispatches no event. Callbacks evaluate `Run(data={...})` with the loss
  of the model, or with `Run(forward=...)`.
- The order of data is a function of `args.data_seed` and the epoch. Dropout draws from torch's generator, whose state is
  in the checkpoints of transformers and not in those of noether.
- Several processes must have batches of the same size, as accelerate makes them by default: samples are counted as
  those of this process times the number of processes, including samples repeated at the end of an epoch.
- With a gradient scaler, `grad_norm` is that of scaled gradients. `forward_s`, `backward_s`, `optimizer_s` are missing.
- Models sharded by FSDP or DeepSpeed are not supported, because no process has the whole model; nor is a hyperparameter
  search, whose trials save elsewhere.
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
from noether.core.tensors.live.loading import find_problems, write_model
from noether.core.tensors.live.optimizer import write_optimizer
from noether.core.tensors.live.weights import raise_mismatch
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
"""File with the state of the run in a checkpoint of transformers."""
_CLOCK: Final = Clock()
_RUN: Final = Run()


@final
class NoetherCallback(TrainerCallback):
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
            {"total": _over_ranks(mean) if session.listens_to_micro_batches else mean},
            outputs=outputs,
            samples=samples * session.run.world_size,
            of=of,
        )
        if len(self._parts) == of and "grad_norm" in session.readings:
            self._grad_norm = get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Start or resume the run.

        Raises:
            ValueError: If the run in the directory and the trainer are at different updates.
            FileNotFoundError: If the checkpoint to resume from does not contain the state of the run.
        """
        self._model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._parts, self._grad_norm = [], None
        self._session = session = self._make_session(
            run=_fill_run(self._run, self._model, args, state, kwargs["train_dataloader"]),
            model=self._model,
            optimizer=getattr(optimizer, "optimizer", optimizer),  # inside of the wrapper of accelerate
            scheduler=kwargs["lr_scheduler"],
        )
        if self.resume_from is not None:
            session.load_state_dict(_read(self.resume_from))
        session.load()
        _check_position(session.state.iteration, state.global_step)
        session.begin()
        if session.stop is not None:
            session.end()
            raise _StoppedError  # otherwise transformers would make another update
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
        session.update(mean=_over_ranks(total), skipped=not session.steps, grad_norm=self._grad_norm)
        self._parts, self._grad_norm = [], None
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
            _write(_checkpoint(args, state.global_step), self.session.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Dispatch `AfterTraining` if the run is at its end."""
        if self.session.is_over:
            self.session.end()
        else:
            self.session.close()

    def _apply_stop(self, control: TrainerControl) -> TrainerControl:
        control.should_training_stop = control.should_training_stop or self.session.is_over
        return control


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
            path = get_last_checkpoint(trainer.args.output_dir) or True  # type: ignore[no-untyped-call]  # transformers'
        for callback in _noether_callbacks(trainer):
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
            self._outputs = map_tensors(Tensor.detach, _without_loss(outputs))
        return (loss, outputs) if return_outputs else loss


class NoetherTrainer(NoetherMixin, Trainer):  # type: ignore[misc]  # transformers leaves it untyped
    """The `Trainer` of transformers, reporting its losses to each `NoetherCallback`."""


def to_checkpoint(saved: TrainState, trainer: Trainer) -> str:
    """Write a state as a checkpoint of transformers and return its path, to resume from it.

    The path is in `args.output_dir`, with the name that transformers gives a checkpoint after the same updates.

    Args:
        saved: A state that a `NoetherCallback` saved, such as `open_run("runs/mine").load()`.
        trainer: A new trainer for the same model; the weights and the optimizer state are written into it.

    Raises:
        MismatchError: If the state does not fit the model and the optimizer; nothing is written then.
        ValueError: If the trainer has no model yet.
    """
    path = _checkpoint(trainer.args, saved.iteration.update)
    model, optimizer = trainer.model, trainer.create_optimizer()
    if model is None:
        raise ValueError("the trainer has a model_init and no model yet: give Trainer(model=...)")
    raise_mismatch(find_problems(model, optimizer, saved))
    write_model(model, saved)
    write_optimizer(saved.opt_state, model, optimizer, lr_scale=1.0)
    trainer.save_model(str(path))
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    scheduler = trainer.lr_scheduler  # None if the trainer creates it in `train`
    scheduler_state = position(saved) if scheduler is None else SchedulerMemory(scheduler).state_dict(saved)
    torch.save(scheduler_state, path / "scheduler.pt")
    state = TrainerState(global_step=saved.iteration.update, train_batch_size=trainer.args.train_batch_size)
    # transformers compares these with its arguments and warns if they differ.
    state.compute_steps(trainer.args, trainer.args.max_steps)  # type: ignore[no-untyped-call]  # transformers'
    state.save_to_json(str(path / "trainer_state.json"))
    _write(path, encode_state(saved))
    return str(path)


class _StoppedError(NoetherError):
    """The run to resume was stopped."""


def _noether_callbacks(trainer: Any) -> list[NoetherCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, NoetherCallback)]


def _fill_run(run: Run, model: nn.Module, args: TrainingArguments, state: TrainerState, loader: Any) -> Run:
    """Return `run` with the facts that the trainer knows."""
    known = {
        "end": TrainingIteration(update=state.max_steps),
        # If the loader has no length, transformers treats the run as one epoch.
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
    """Return the outputs of a model without the loss, and a single one bare, as transformers does for predictions."""
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
            f"the run is at {at}, and the trainer at update {update}: resume from a checkpoint of transformers, or "
            "make one: trainer.train(resume_from_checkpoint=to_checkpoint(directory.load(), trainer)); a new run needs "
            "a new directory"
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
            f"{path} is missing: the checkpoint was written without NoetherCallback and has no state of the run; train "
            "without the callback, or resume from a checkpoint that it wrote"
        )
    tensors, facts = read_tensors(path.read_bytes())
    return {"state": facts["state"], "tensors": tensors}
