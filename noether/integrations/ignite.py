"""noether's callbacks on an engine of pytorch-ignite.

| ignite | noether | with |
|---|---|---|
| `STARTED` | `BeforeTraining` | `resumed` if the session was loaded, or its directory holds a checkpoint |
| `EPOCH_STARTED` | | in a resumed run, restores the random generators, once |
| `GET_BATCH_COMPLETED` | | the time before it was spent waiting for data |
| `ITERATION_COMPLETED` | `AfterAccumulationStep`, if a callback listens | losses and outputs from `engine.state.output`, samples from `engine.state.batch` |
| the same, once an optimizer has stepped | `AfterUpdate` | sums and sample-weighted means of the iterations since the last update; learning rates of the step |
| the same, after `accumulation` iterations without a step | `AfterUpdate(skipped=True)` | as when a gradient scaler skips a step |
| `EPOCH_COMPLETED` | `AfterEpoch` | |
| `COMPLETED` | `AfterTraining`, after the `AfterEpoch` of a full epoch | after `terminate()`, ignite does not fire `EPOCH_COMPLETED` |
| `state.stop` | `engine.terminate()` | right after the event that stopped the run |
| `Checkpoint({"noether": session, ...})` | `state_dict`, `load_state_dict` | attach before handlers that save, which then see the latest state |

Differences from noether's own trainer:

- The step is the user's. A step that accumulates with equal weights, as ignite's does, weights the samples of a short
  micro-batch more; the losses in events are weighted by samples.
- `AfterAccumulationStep` of an update's last micro-batch comes after the optimizer's step, when the engine reports it.
- A step that carries gradients over the end of an epoch, as ignite's does, completes its update in the next epoch. A run
  that resumes at the end of such an epoch does not have these gradients.
- `grad_norm` and `gradients` are those with which the optimizer steps, after clipping, unless the step calls
  `session.measure_gradients()` before. `forward_s`, `backward_s` and `optimizer_s` are missing: all three happen inside
  of the step.
- `DeterministicEngine` resumes in the middle of an epoch; `Engine` reads an epoch from its first batch, so there a
  noether checkpoint has to be from the end of an epoch. Load checkpoints of ignite as in any ignite script.
- The order of a shuffling loader and dropout are drawn from the global random generators. Their states, those of
  generators that the model or the loader holds, and the seed of a `DeterministicEngine` are in the checkpoints, so a
  resume is exact. Three exceptions: inside of an epoch, a dataset without workers that draws random numbers; and two
  that a warning at the resume names: an `Engine` whose `epoch_length` is not that of the loader, and one whose loader
  has no workers and draws its order from a generator of its own, as `DataLoader(shuffle=True, generator=...)` does.
- A scheduler of the learning rate resumes from noether's checkpoints if `attach` received it; otherwise a resume refuses
  torch's schedulers. The user saves schedulers of other settings.
- The scale of a `GradScaler` is in noether's checkpoints if `attach` received the scaler.
- Of several optimizers, an iteration may step any: it is one update. `optim/lr` has one key for each.
- On several ranks (`idist.Parallel`, `idist.auto_model`) all is as in `Session`. A resumed run restores the generators of
  rank 0 on all ranks. Call `attach` on each rank, after `idist.initialize`.
"""  # noqa: E501  # a table

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import ignite.distributed as idist
from ignite.engine import DeterministicEngine, Events
from torch.utils.data import RandomSampler

from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.tensors.live.optimizer import by_name
from noether.integrations.losses import losses_of
from noether.session.loader import batches_per_epoch, warn
from noether.session.rank_exchange import check_world_size
from noether.session.session import Session
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from ignite.engine import Engine
    from torch import nn

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.core.tensors.live.optimizer import Optimizers
    from noether.effects import RunDirectory

_CLOCK: Final = Clock()
_RUN: Final = Run()


def attach(  # noqa: PLR0913  # every part of a run, by name
    engine: Engine,
    callbacks: Callback | Sequence[Callback],
    *,
    model: nn.Module,
    optimizer: Optimizers,
    scheduler: Any = None,
    scaler: Any = None,
    losses: Callable[[Any], Mapping[str, Any]] = losses_of,
    accumulation: int = 1,
    directory: RunDirectory | None = None,
    interpreter: Callable[[Effects, TrainState, Event], None] | None = None,
    data: Mapping[str, Iterable[Any]] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    seed: int = 0,
    precision: torch.dtype | None = None,
    clock: Clock = _CLOCK,
    run: Run = _RUN,
) -> Session:
    """Attach callbacks to an engine that trains, and return their session; save it beside the engine.

    Args:
        engine: The engine.
        callbacks: One callback, or several in order.
        model: The module that holds all trained parameters.
        optimizer: The optimizer that the engine's step uses, or several by name, as `{"g": adam_g, "d": adam_d}`.
        scheduler: The scheduler of the learning rate, of torch or of ignite, or several by name; noether's checkpoints
            then hold its position. If it is stepped after an iteration, attach its handler before.
        scaler: The `torch.amp.GradScaler` of the step; noether's checkpoints then hold its scale.
        losses: Returns mean losses by name from the engine's output; `total` is added as their sum.
        accumulation: Iterations of one update.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: Batches by dataset key, for callbacks that evaluate.
        loss: `(outputs, batch) -> {name: mean over samples}`, for evaluations.
        seed: Seeds the random numbers of callbacks.
        precision: Autocast dtype of evaluations.
        clock: Reads the time.
        run: Further facts about the run.

    Raises:
        SessionError: If the parts cannot work together.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine, supervised_training_step
        >>> from noether.core.callbacks import OnlineLossCallback
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> engine = Engine(supervised_training_step(model, sgd, torch.nn.functional.mse_loss))
        >>> show = lambda effects, state, event: print(state.iteration, *effects) if effects else None
        >>> losses = OnlineLossCallback(every_n_epochs=1)
        >>> session = attach(engine, losses, model=model, optimizer=sgd, interpreter=show)
        >>> batch = torch.zeros(4, 2), torch.zeros(4, 1)
        >>> _ = engine.run([batch, batch], max_epochs=1)
        E1_U2_S8 LogScalars(values=FrozenDict({'loss/online/total/E1': tensor(..., dtype=torch.float64)}))
        >>> session.state.iteration
        TrainingIteration(epoch=1, update=2, sample=8)
    """
    session = Session(
        callbacks,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        directory=directory,
        interpreter=interpreter,
        data=data,
        loss=loss,
        seed=seed,
        precision=precision,
        clock=clock,
        run=run,
    )
    groups = [group for each in by_name(optimizer).values() for group in each.param_groups]
    session.continue_after_end = "call engine.run with a larger max_epochs, which counts from the start of the run"
    has_hidden_scheduler = scheduler is None and any("initial_lr" in group for group in groups)
    handlers = _Handlers(session, accumulation, losses, has_hidden_scheduler=has_hidden_scheduler)
    engine.add_event_handler(Events.STARTED, handlers.begin)
    engine.add_event_handler(Events.EPOCH_STARTED, handlers.begin_epoch)
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, handlers.take_batch)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handlers.iterate)
    engine.add_event_handler(Events.EPOCH_COMPLETED, handlers.end_epoch)
    engine.add_event_handler(Events.COMPLETED, handlers.end)
    return session


class _Handlers:
    """The handlers of one engine."""

    def __init__(
        self,
        session: Session,
        accumulation: int,
        losses: Callable[[Any], Mapping[str, Any]],
        *,
        has_hidden_scheduler: bool,
    ) -> None:
        self._session, self._accumulation, self._losses = session, accumulation, losses
        self._has_hidden_scheduler = has_hidden_scheduler

    def begin(self, engine: Engine) -> None:
        state, session = engine.state, self._session
        check_world_size(session.ranks, idist.get_world_size(), "attach the callbacks after idist.initialize(...)")
        loaded = session.load()
        if isinstance(engine, DeterministicEngine):
            if session.saved_seed is not None:
                state.seed = session.saved_seed  # it drew another one as this handler was called
            # From these, it would draw the order of the rest of an epoch; `take_batch` restores ours.
            state.rng_states = None  # type: ignore[attr-defined]  # ignite sets it late
        session.remember_generators(state.dataloader, seed=getattr(state, "seed", None))
        if loaded and self._has_hidden_scheduler:
            raise ValueError(
                f"the run resumes at {session.state.iteration}, and its checkpoint does not hold the position of the "
                "scheduler of the learning rate: pass attach(scheduler=...) from the start, or load a checkpoint of "
                "ignite"
            )
        epoch_is_full = self._move(engine, loaded=loaded)
        lengths: dict[str, Any] = session.lengths_of_epoch(state.dataloader, state.epoch_length, self._accumulation)
        session.begin(end=self._end(engine), epoch_is_full=epoch_is_full, **lengths)
        self._apply_stop(engine)

    def begin_epoch(self, engine: Engine) -> None:
        if not self._session.state.epoch_batches:
            self._session.restore_generators()  # ignite makes the iterator next, which draws the order

    def take_batch(self, engine: Engine) -> None:
        # Within an epoch, a DeterministicEngine has drawn the order again from its seed.
        self._session.restore_generators()
        self._session.batch_arrived()

    def iterate(self, engine: Engine) -> None:
        session, outputs = self._session, engine.state.output
        samples = session.run.count_samples(engine.state.batch)
        session.micro_batch(self._losses(outputs), outputs=outputs, samples=samples, of=self._accumulation)
        if session.steps or session.pending_micro_batches == self._accumulation:
            session.update(skipped=not session.steps)
        self._apply_stop(engine)

    def end_epoch(self, engine: Engine) -> None:
        self._session.end_epoch()
        self._apply_stop(engine)

    def end(self, engine: Engine) -> None:
        self._session.end(stopped="engine.terminate() was called" if engine.should_terminate else None)

    def _apply_stop(self, engine: Engine) -> None:
        if self._session.stop is not None:
            engine.terminate()

    def _end(self, engine: Engine) -> TrainingIteration | None:
        """Return the end of the engine, counted in updates if it counts iterations; None if unknown."""
        state = engine.state
        if state.max_epochs is not None and state.max_iters is None:
            return TrainingIteration(epoch=state.max_epochs)
        if state.max_iters is None or (state.epoch_length is None and self._accumulation > 1):
            return None
        epochs, rest = divmod(state.max_iters, state.epoch_length or state.max_iters + 1)
        full, rest_updates = epochs * -(-(state.epoch_length or 0) // self._accumulation), rest // self._accumulation
        return TrainingIteration(update=full + rest_updates)

    def _move(self, engine: Engine, *, loaded: bool) -> bool:
        """Move a new engine to the iteration of the state; an engine that ignite resumed has to be there already.

        Returns:
            Whether the state counts all batches of its epoch, whose end `Session.begin` dispatches.
        """
        at, iteration, length = self._session.state.iteration, engine.state.iteration, engine.state.epoch_length
        if iteration == 0 and at.update == 0:
            return False
        if length is None:
            raise ValueError(
                f"the run resumes at {at}, whose position in an epoch is unknown: pass run(epoch_length=...)"
            )
        batches = self._session.count_batches(-(-length // self._accumulation), self._accumulation)
        is_full = batches >= length
        epoch, into_epoch = (at.epoch + 1, 0) if is_full else (at.epoch, batches)
        expected = epoch * length + into_epoch
        if iteration != expected and (iteration or not loaded):
            raise ValueError(
                f"the engine begins at iteration {iteration}, and the callbacks remember {at}, which is iteration "
                f"{expected}: load engine and callbacks from one checkpoint, with a larger max_epochs if the run was "
                "completed, or attach to a new engine for a new run"
            )
        skips = isinstance(engine, DeterministicEngine) or engine.state.dataloader is None
        if iteration == 0 and into_epoch and self._session.stop is None and not skips:
            raise ValueError(
                f"the run resumes at {at}, {into_epoch} iterations into an epoch that Engine reads from its first "
                "batch: use DeterministicEngine, or save at the end of epochs"
            )
        engine.state.iteration, engine.state.epoch = expected, epoch
        loader = batches_per_epoch(engine.state.dataloader)
        if self._session.stop is None and not skips and (into_epoch or (loader and length % loader)):
            warn(
                f"the run resumes at {at}, iteration {expected}, in the midst of the loader, and Engine reads it from "
                "its first batch: use DeterministicEngine, or resume at the end of an epoch that reads all batches"
            )
        if self._session.stop is None and not skips and _draws_order_late(engine.state.dataloader):
            warn(
                f"the run resumes at {at}, and Engine draws from the generator of the loader's RandomSampler once more "
                "as it leaves an epoch, so the order differs from that of the uncut run: use DeterministicEngine, or a "
                "DataLoader without generator="
            )
        return is_full


def _draws_order_late(loader: Any) -> bool:
    """Return whether a loader draws from a generator of its own where it is asked for a batch after the last one."""
    sampler = getattr(loader, "sampler", None)
    is_own = isinstance(sampler, RandomSampler) and sampler.generator is not None and not sampler.replacement
    return is_own and not loader.num_workers
