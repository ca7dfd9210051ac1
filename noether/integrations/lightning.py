"""noether's callbacks in the `Trainer` of PyTorch Lightning: `Trainer(callbacks=[NoetherCallback(callbacks)])`.

| Lightning | noether | with |
|---|---|---|
| `on_train_start` | `BeforeTraining` | `resumed` if Lightning's checkpoint held the callbacks, or the directory holds a checkpoint |
| `on_train_batch_start` | | the time before it was spent waiting for data |
| `on_before_optimizer_step` | | `grad_norm`, before gradients are clipped, if anybody reads it |
| `on_train_batch_end` | `AfterAccumulationStep`, if anybody listens | losses and outputs of what `training_step` returned, samples of the batch |
| the same, once the optimizer has stepped | `AfterUpdate` | sums and sample-weighted means of the batches since the last update; learning rates of the step |
| the same, where the step was left out | `AfterUpdate(skipped=True)` | `training_step` returned None, or a gradient scaler found infinities |
| `on_train_epoch_end` | `AfterEpoch` | not for an epoch that `should_stop` or `max_steps` cut short |
| `on_train_end` | `AfterTraining` | `state.stop` if a callback stopped the run; whatever else stops Lightning is an end, too |
| `state.stop` | `trainer.should_stop = True` | right after the event; Lightning goes on until `min_epochs` and `min_steps` |
| `state_dict`, `load_state_dict` | the same | in Lightning's checkpoints, which `weights_only=True` reads |
| sanity check, validation, test, predict | | nothing: callbacks evaluate what `Run(data=...)` gives them |
| `on_exception` | | nothing is told; what is saved stays saved, and the optimizer is let go |

What is different from noether's own trainer:

- Lightning divides every loss by `accumulate_grad_batches`: a short last micro-batch weighs as much as a full one, and an
  update with fewer micro-batches is smaller. The losses in events are weighted by samples. Lightning hands on the
  divided loss; multiplied again it is exact where the number is a power of two, and else up to its last bit.
- `AfterAccumulationStep` of an update's last micro-batch comes after the optimizer's step: Lightning tells only then.
- `forward_s`, `backward_s` and `optimizer_s` are not there. Callbacks evaluate in the precision of the parameters.
- Resumed in the middle of an epoch, Lightning reads its loader from the first batch unless the loader has `state_dict`
  and `load_state_dict`; with those, its own checkpoints resume exactly. A noether checkpoint holds no loader, so it has
  to be of an epoch's end; and where one scheduler is that does not look at metrics. Else go on from Lightning's own.
- One process and one optimizer: losses are not gathered over ranks.
"""  # noqa: E501  # a table

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

from lightning.pytorch import Callback as LightningCallback
from torch.nn.utils import get_total_norm

from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.integrations.losses import losses_of
from noether.session.loader import epoch_lengths
from noether.session.session import Session
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects import RunDirectory

_CLOCK: Final = Clock()
_RUN: Final = Run()


@final
class NoetherCallback(LightningCallback):
    """noether's callbacks as one of Lightning's.

    Args:
        callbacks: One callback, or several in order.
        losses: Returns mean losses by name from what `training_step` returned; `total` is added as their sum.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: What callbacks evaluate, by dataset key.
        loss: `(outputs, batch) -> {name: mean over samples}`, for evaluations.
        seed: Seeds the random numbers of callbacks.
        precision: Autocast dtype of evaluations.
        clock: Reads the time.
        run: Further facts about the run.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from noether.core.callbacks import FixedUpdateEarlyStopping
        >>> stop = NoetherCallback(FixedUpdateEarlyStopping(stop_at_update=3), interpreter=lambda *_: None)
        >>> off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(accelerator="cpu", max_epochs=9, callbacks=[stop], enable_model_summary=False, **off)
        >>> trainer.fit(BoringModel(), torch.zeros(4, 2, 32), torch.zeros(1, 2, 32))
        >>> stop.session.state.iteration, stop.session.stop
        (TrainingIteration(epoch=0, update=3, sample=6), 'stop_at_update: 3 is reached')
    """

    def __init__(  # noqa: PLR0913  # every part of a run, by name
        self,
        callbacks: Callback | Sequence[Callback],
        *,
        losses: Callable[[Any], Mapping[str, Any]] = losses_of,
        directory: RunDirectory | None = None,
        interpreter: Callable[[Effects, TrainState, Event], None] | None = None,
        data: Mapping[str, Iterable[Any]] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
        precision: torch.dtype | None = None,
        clock: Clock = _CLOCK,
        run: Run = _RUN,
    ) -> None:
        super().__init__()
        self._losses = losses
        self._make_session = partial(
            Session,
            callbacks,
            directory=directory,
            interpreter=interpreter,
            data=data,
            loss=loss,
            seed=seed,
            precision=precision,
            clock=clock,
            run=run,
        )
        self.session: Session | None = None
        self._saved: dict[str, Any] | None = None
        self._grad_norm: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from what is remembered, loaded, or in the directory."""
        _check(trainer)
        saved = self.state_dict()  # of a fit before this one: its optimizer is gone
        scheduler = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
        session = self._make_session(model=pl_module, optimizer=trainer.optimizers[0], scheduler=scheduler)
        self.session = session
        if saved:
            session.load_state_dict(saved)
        loaded = session.load()
        if loaded:
            _check_resumable(trainer, session.state.iteration)
        _move(trainer, session.state.iteration, loaded=loaded)
        session.begin(**_known(trainer, session))
        self._saved = None
        self._stop(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the time of a step."""
        self._running.batch_arrived()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure gradients, if anybody reads their norm."""
        if "grad_norm" in self._running.readings:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._grad_norm = get_total_norm(grads)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of the micro-batch, and of the update that it completed."""
        session, steps = self._running, trainer.accumulate_grad_batches
        automatic = pl_module.automatic_optimization
        outputs = _undivided(outputs, steps if automatic else 1) or None
        losses = {} if automatic and outputs is None else self._losses(outputs)
        session.micro_batch(losses, outputs=outputs, samples=session.run.batch_size(batch), of=steps)
        made = session.steps
        if made > 1:
            raise ValueError(
                f"the optimizer made {made} steps in one training_step, and an update is one step: step once per batch"
            )
        last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        if made or (automatic and (last or session.pending == steps)):
            session.update(skipped=not made, grad_norm=self._grad_norm)
            self._grad_norm = None
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the end of the epoch, if all of its batches were there."""
        self._running.end_epoch(cut_short=trainer.should_stop or trainer.global_step == trainer.max_steps)
        self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the end of training."""
        self._running.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the optimizer go."""
        if self.session is not None:
            self.session.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what the callbacks remember; nothing before they do."""
        if self._saved is not None:
            return self._saved
        return {} if self.session is None else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the callbacks remembered until training begins."""
        self._saved = state_dict

    @property
    def _running(self) -> Session:
        if self.session is None:
            raise ValueError("training has not begun: Lightning calls on_train_start before any other hook")
        return self.session

    def _stop(self, trainer: Trainer) -> None:
        if self._running.stop is not None:
            trainer.should_stop = True


def _check(trainer: Trainer) -> None:
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"{type(trainer.lightning_module).__name__}.configure_optimizers returns {len(trainer.optimizers)} "
            "optimizers, and an update is one step of one optimizer: return one, with parameter groups"
        )
    if trainer.world_size != 1:
        raise ValueError(
            f"this training has {trainer.world_size} processes, and losses are not gathered over them: use devices=1"
        )


def _known(trainer: Trainer, session: Session) -> dict[str, Any]:
    """Return what Lightning knows about the run."""
    automatic = trainer.lightning_module.automatic_optimization
    batches = int(trainer.num_training_batches) if trainer.num_training_batches != float("inf") else None
    steps = trainer.accumulate_grad_batches
    lengths = epoch_lengths(trainer.train_dataloader, batches, steps, session.run.batch_size) if automatic else {}
    return {**lengths, "end": _end(trainer, lengths.get("updates_per_epoch"))}


def _end(trainer: Trainer, updates_per_epoch: int | None) -> TrainingIteration | None:
    """Return the first end that is reached, or None if there is none."""
    epochs, updates = trainer.max_epochs, trainer.max_steps
    if epochs is None or epochs < 0:
        return None if updates < 0 else TrainingIteration(update=updates)
    if updates < 0 or (updates_per_epoch is not None and epochs * updates_per_epoch <= updates):
        return TrainingIteration(epoch=epochs)
    return TrainingIteration(update=updates)


def _undivided(outputs: Any, steps: int) -> Any:
    """Return what `training_step` returned with the loss as it was before Lightning divided it."""
    if not outputs or steps == 1:
        return outputs
    return {**outputs, "loss": outputs["loss"] * steps}


def _check_resumable(trainer: Trainer, at: TrainingIteration) -> None:
    """Refuse to go on from a noether checkpoint that does not hold all that Lightning would need."""
    configs, instead = (
        trainer.lr_scheduler_configs,
        "go on from one of Lightning's checkpoints, with fit(ckpt_path=...)",
    )
    if len(configs) > 1 or any(each.reduce_on_plateau for each in configs):
        raise ValueError(
            f"the run goes on at {at}, and a noether checkpoint holds where one scheduler was that does not look at "
            f"metrics, not {[type(each.scheduler).__name__ for each in configs]}: {instead}"
        )
    batches = trainer.num_training_batches
    if batches == float("inf") or at.update % _updates_per_epoch(trainer):
        raise ValueError(
            f"the run goes on at {at}, inside of an epoch that Lightning would read from its first batch: save at the "
            f"end of epochs, or {instead} and a loader that has state_dict"
        )


def _updates_per_epoch(trainer: Trainer) -> int:
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def _move(trainer: Trainer, at: TrainingIteration, *, loaded: bool) -> None:
    """Move a new trainer to the iteration of the state; one that Lightning resumed has to be there already."""
    if trainer.global_step == at.update:
        return
    if not loaded or trainer.global_step:
        raise ValueError(
            f"Lightning begins at step {trainer.global_step}, and the callbacks remember {at}: give fit(ckpt_path=...) "
            "a checkpoint that was saved with them, or make a new NoetherCallback for a new run"
        )
    loop, epoch = trainer.fit_loop, at.update // _updates_per_epoch(trainer)  # one whose end is owed is told by `begin`
    automatic, manual = loop.epoch_loop.automatic_optimization, loop.epoch_loop.manual_optimization
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        vars(epochs).update(ready=epoch, started=epoch, processed=epoch, completed=epoch)
    for steps in (automatic.optim_progress.optimizer.step.total, manual.optim_step_progress.total):
        vars(steps).update(ready=at.update, completed=at.update)
    loop.epoch_loop._batches_that_stepped = at.update  # noqa: SLF001  # what Lightning's loggers count by
