"""noether's callbacks in the `Trainer` of PyTorch Lightning: `Trainer(callbacks=[NoetherCallback(callbacks)])`.

| Lightning | noether | with |
|---|---|---|
| `on_train_start` | `BeforeTraining` | `resumed` if Lightning's checkpoint has the callbacks' state, or the directory has a checkpoint |
| `on_train_epoch_start` | | in a resumed run, restores the random generators, once |
| `on_train_batch_start` | | ends the wait for data |
| `on_before_optimizer_step` | | `grad_norm` and `gradients` before gradient clipping, if a callback reads them |
| `on_train_batch_end` | `AfterAccumulationStep`, if a callback handles it | losses and outputs from the result of `training_step`, samples of the batch |
| the same, after a step of the optimizer | `AfterUpdate` | sums and sample-weighted means of the batches since the last update; learning rates of the step |
| the same, if the step was skipped | `AfterUpdate(skipped=True)` | `training_step` returned None, or a gradient scaler found infinities |
| `on_train_epoch_end` | `AfterEpoch` | not for an epoch that `should_stop` or `max_steps` cut short |
| `on_train_end` | `AfterTraining` | `state.stop` if a callback stopped the run; any other stop of Lightning ends the run too |
| `state.stop` | `trainer.should_stop = True` | right after the event; Lightning continues until `min_epochs` and `min_steps` |
| `state_dict`, `load_state_dict` | the same | in Lightning's checkpoints, which `weights_only=True` reads |
| sanity check, validation, test, predict | | no event: callbacks evaluate the datasets of `Run(data=...)` |
| `on_exception` | | no event: checkpoints are kept, and the optimizer is released |

Differences from noether's trainer:

- Lightning divides every loss by `accumulate_grad_batches`: a short last micro-batch has the weight of a full one, and an
  update with fewer micro-batches is smaller. The losses in events are weighted by samples. They are the divided loss of
  Lightning multiplied again, which is exact if the number is a power of two, and otherwise exact up to the last bit.
- `AfterAccumulationStep` of the last micro-batch comes after the optimizer's step, because Lightning has no earlier hook.
- `forward_s`, `backward_s` and `optimizer_s` are missing. Callbacks evaluate in the precision of the parameters.
- When Lightning resumes within an epoch, it reads its loader from the first batch, unless the loader has `state_dict` and
  `load_state_dict`; with those, Lightning's checkpoints resume exactly. A noether checkpoint does not contain the
  loader, so it has to be from the end of an epoch; and it contains schedulers, which must not depend on metrics. In
  other cases resume from a checkpoint of Lightning.
- Of several optimizers, which Lightning steps by hand, a batch may step any: it is one update. Their names are their
  indices, as in `optim/lr/0`. `max_steps` of Lightning counts the steps of all.
- Of Lightning's callbacks, noether's checkpoints hold the state of finetuning callbacks, such as `BackboneFinetuning`; that
  of others, such as Lightning's `EarlyStopping`, is in Lightning's checkpoints only.
- A gradient scaler of `precision="16-mixed"` is Lightning's; noether's checkpoints hold its scale too.
- Lightning draws the order of a shuffling loader, and dropout its masks, from the global random generators. Their states,
  and those of generators that the module or the loader holds, are in noether's checkpoints and in Lightning's: a resume at
  the end of an epoch is exact. It is not where a validation that draws random numbers comes between a checkpoint of
  Lightning and the end of the epoch, or where workers persist, whose generators no checkpoint has.
- On several ranks with `strategy="ddp"` all is as in `Session`; of other strategies no rank has the whole model. A resumed
  run restores the generators of rank 0 on all ranks, so dropout is exact where `seed_everything` made them equal.
"""  # noqa: E501  # a table

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

from lightning.pytorch import Callback as LightningCallback
from lightning.pytorch.strategies import DDPStrategy

from noether.core.iteration import TrainingIteration
from noether.core.loop import updates_in_epoch
from noether.core.run import Run
from noether.integrations.lightning_memory import STEPS, FinetuningMemory, StepCount
from noether.integrations.losses import losses_of
from noether.session import settings
from noether.session.processes import ProcessesError
from noether.session.rank_exchange import check_world_size
from noether.session.session import Session
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects import RunDirectory

_CLOCK: Final = Clock()
_RUN: Final = Run()


@final
class NoetherCallback(LightningCallback):
    """Runs noether's callbacks in Lightning's `Trainer`.

    Args:
        callbacks: One callback, or several in order.
        losses: Returns mean losses by name from the result of `training_step`; their sum is added as `total`.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: Batches by dataset key, for callbacks that evaluate.
        loss: `(outputs, batch) -> {name: mean over samples}`, for evaluations.
        seed: Seed of the random numbers of callbacks.
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
        self._callbacks = callbacks
        self._make_session = partial(
            Session,
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run, or resume it from an earlier fit, Lightning's checkpoint, or the directory."""
        _check(trainer)
        saved = self.state_dict()  # after an earlier fit, whose optimizer no longer exists
        finetuning = FinetuningMemory(trainer)
        session = self._make_session(
            [
                *([StepCount(trainer)] if len(trainer.optimizers) > 1 else []),
                *([finetuning] if finetuning else []),
                *settings.list_callbacks(self._callbacks),
            ],
            model=pl_module,
            optimizer=_by_index(trainer.optimizers),
            scheduler=_by_index([each.scheduler for each in trainer.lr_scheduler_configs]),
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
        self.session = session
        check_world_size(session.ranks, trainer.world_size, "pass Trainer(devices=1)")
        session.continue_after_end = "give the Trainer a larger max_epochs or max_steps, which count from the start"
        session.remember_generators(trainer.train_dataloader)
        if saved:
            session.load_state_dict(saved)
        loaded = session.load()
        if loaded:
            _check_resumable(trainer, session.state)
            finetuning.restore(session.state)
        _move_trainer(trainer, session.state, loaded=loaded)
        session.begin(**_run_facts(trainer, session))
        self._saved = None
        self._apply_stop(trainer)
        loop = trainer.fit_loop
        reloads: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]  # Lightning sets it late
        if reloads or loop.restarted_mid_epoch:
            session.restore_generators()  # before Lightning makes the next loader, or reads the next batch
        if loop.restarted_mid_epoch and loop.epoch_loop.batch_progress.is_last_batch:
            _renew_iterator(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random generators of a resumed run, from which Lightning draws the order of the epoch next."""
        self._running.restore_generators()
        if trainer.fit_loop.is_resuming:
            _renew_iterator(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the time at which the batch arrived."""
        self._running.batch_arrived()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradients, if a callback reads them."""
        self._running.measure_gradients(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Dispatch the events of the micro-batch and of the update that it completes."""
        session, steps = self._running, trainer.accumulate_grad_batches
        automatic = pl_module.automatic_optimization
        if outputs and automatic and steps > 1:  # Lightning divided the loss by the steps
            outputs = {**outputs, "loss": outputs["loss"] * steps}
        outputs = outputs or None
        losses = {} if automatic and outputs is None else self._losses(outputs)
        session.micro_batch(losses, outputs=outputs, samples=session.run.count_samples(batch), of=steps)
        optimizer_steps = session.steps
        if optimizer_steps > 1 and len(trainer.optimizers) == 1:
            raise ValueError(
                f"the optimizer made {optimizer_steps} steps in one training_step, and an update is one "
                "step: step once per batch"
            )
        last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        if optimizer_steps or (automatic and (last or session.pending_micro_batches == steps)):
            session.update(skipped=not optimizer_steps)
        self._apply_stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Dispatch `AfterEpoch`, if the epoch had all of its batches."""
        self._running.end_epoch(cut_short=trainer.should_stop or trainer.global_step == trainer.max_steps)
        self._apply_stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Dispatch `AfterTraining`."""
        self._running.end(stopped=_describe_stop(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what the exception would lose, if an epoch has just ended, and release the optimizer."""
        if self.session is None:
            return
        if isinstance(exception, Exception):
            self.session.record_failure(exception)
        else:
            self.session.leave()
        self.session.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the callbacks; empty before training."""
        if self._saved is not None:
            return self._saved
        return {} if self.session is None else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the callbacks until training starts."""
        self._saved = state_dict

    @property
    def _running(self) -> Session:
        if self.session is None:
            raise ValueError("training has not started: Lightning calls on_train_start before any other hook")
        return self.session

    def _apply_stop(self, trainer: Trainer) -> None:
        if self._running.stop is not None:
            trainer.should_stop = True


def _describe_stop(trainer: Trainer) -> str | None:
    """Return what stopped the fit, as far as Lightning tells; None if it was not stopped."""
    if not trainer.should_stop:
        return None
    messages = [getattr(each, "stopping_reason_message", None) for each in trainer.early_stopping_callbacks]
    said = " ".join(message.replace("\n", " ") for message in messages if message)
    return f"EarlyStopping of Lightning: {said}" if said else "Lightning stopped it, because trainer.should_stop is set"


def _by_index(parts: list[Any]) -> Any:
    """Return one optimizer or scheduler as it is, several by their index, and None for none."""
    return {str(index): each for index, each in enumerate(parts)} if len(parts) > 1 else next(iter(parts), None)


def _check(trainer: Trainer) -> None:
    if not trainer.optimizers:
        raise ValueError(
            f"{type(trainer.lightning_module).__name__}.configure_optimizers returns no optimizer: return one"
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise ProcessesError(
            f"the trainer trains on {trainer.world_size} ranks with {type(trainer.strategy).__name__}, and callbacks "
            "need the whole model on each: pass Trainer(strategy='ddp'), or devices=1"
        )


def _renew_iterator(trainer: Trainer) -> None:
    """Make a new iterator of the loader, as Lightning does before each epoch but the first that it resumes."""
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher  # noqa: SLF001  # Lightning shows them nowhere else
    if combined is None or fetcher is None or all(hasattr(each, "load_state_dict") for each in combined.flattened):
        return  # a loader with a position was moved there
    iter(fetcher)


def _run_facts(trainer: Trainer, session: Session) -> dict[str, Any]:
    """Return the end of the run and the lengths of its epochs, as far as Lightning knows them."""
    automatic = trainer.lightning_module.automatic_optimization
    batches = int(trainer.num_training_batches) if trainer.num_training_batches != float("inf") else None
    steps = trainer.accumulate_grad_batches
    lengths = session.lengths_of_epoch(trainer.train_dataloader, batches, steps) if automatic else {}
    return {**lengths, "end": _end(trainer, lengths.get("updates_per_epoch"))}


def _end(trainer: Trainer, updates_per_epoch: int | None) -> TrainingIteration | None:
    """Return the end that the run reaches first, or None if it has no end."""
    epochs, updates = trainer.max_epochs, trainer.max_steps
    if len(trainer.optimizers) > 1 and updates >= 0:
        return None  # Lightning ends after steps of all optimizers, of which an update has any number
    if epochs is None or epochs < 0:
        return None if updates < 0 else TrainingIteration(update=updates)
    if updates < 0 or (updates_per_epoch is not None and epochs * updates_per_epoch <= updates):
        return TrainingIteration(epoch=epochs)
    return TrainingIteration(update=updates)


def _check_resumable(trainer: Trainer, state: TrainState) -> None:
    """Refuse to resume from a noether checkpoint that lacks a part that Lightning needs."""
    at, configs = state.iteration, trainer.lr_scheduler_configs
    instead = "resume from a checkpoint of Lightning, with fit(ckpt_path=...)"
    if any(each.reduce_on_plateau for each in configs):
        raise ValueError(
            f"the run resumes at {at}, but a noether checkpoint contains schedulers that do not depend on metrics, not "
            f"{[type(each.scheduler).__name__ for each in configs]}: {instead}"
        )
    if _completed_epochs(trainer, state) is None:
        raise ValueError(
            f"the run resumes at {at}, inside of an epoch that Lightning would read from its first batch: save at the "
            f"end of epochs, or {instead} and a loader that has state_dict"
        )


def _completed_epochs(trainer: Trainer, state: TrainState) -> int | None:
    """Return the number of epochs whose updates are all counted, whatever their lengths; None inside of an epoch."""
    if state.epoch_start == state.iteration:
        return state.iteration.epoch
    if trainer.num_training_batches == float("inf"):
        return None
    length = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    length = state.lengths.get("updates_per_epoch", length)
    epochs, rest = divmod(updates_in_epoch(state, Run(updates_per_epoch=length)), length)
    return None if rest else state.iteration.epoch + epochs


def _move_trainer(trainer: Trainer, state: TrainState, *, loaded: bool) -> None:
    """Move a new trainer to the iteration of the state; a trainer that Lightning resumed must be there already."""
    at = state.iteration
    steps = state.callback_states.get(STEPS, {"steps": at.update})["steps"]
    if trainer.global_step == steps:
        return
    if not loaded or trainer.global_step:
        raise ValueError(
            f"Lightning starts at step {trainer.global_step}, but the callbacks are at {at}: pass fit(ckpt_path=...) "
            "a checkpoint that was saved with them, or create a new NoetherCallback for a new run"
        )
    loop, epoch = trainer.fit_loop, _completed_epochs(trainer, state)  # `begin` dispatches a missing AfterEpoch
    automatic, manual = loop.epoch_loop.automatic_optimization, loop.epoch_loop.manual_optimization
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        vars(epochs).update(ready=epoch, started=epoch, processed=epoch, completed=epoch)
    for progress in (automatic.optim_progress.optimizer.step.total, manual.optim_step_progress.total):
        vars(progress).update(ready=steps, completed=steps)
    loop.epoch_loop._batches_that_stepped = at.update  # noqa: SLF001  # Lightning's loggers count by it
