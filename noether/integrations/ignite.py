"""noether's callbacks on an engine of pytorch-ignite.

| ignite | noether | with |
|---|---|---|
| `STARTED` | `BeforeTraining` | `resumed` if what was attached was loaded, or its directory holds a checkpoint |
| `GET_BATCH_COMPLETED` | | the time before it was spent waiting for data |
| `ITERATION_COMPLETED` | `AfterAccumulationStep`, if anybody listens | losses and outputs from `engine.state.output`, samples from `engine.state.batch` |
| the same, once the optimizer has stepped | `AfterUpdate` | sums and sample-weighted means of the iterations since the last update; learning rates of the step |
| the same, after `accumulation_steps` without a step | `AfterUpdate(skipped=True)` | as when a gradient scaler leaves a step out |
| `EPOCH_COMPLETED` | `AfterEpoch` | |
| `COMPLETED` | `AfterTraining`, after an `AfterEpoch` that is owed | `terminate()` leaves `EPOCH_COMPLETED` out |
| `state.stop` | `engine.terminate()` | right after the event at which it was decided |
| `Checkpoint({"noether": attached, ...})` | `state_dict`, `load_state_dict` | attach first, so that what a handler saves is up to date |

What is different from noether's own trainer:

- The step is the user's. One that accumulates with equal weights, as ignite's own does, weighs the samples of a short
  micro-batch more; the losses in events are weighted by samples.
- `AfterAccumulationStep` of an update's last micro-batch comes after the optimizer's step: the engine tells only then.
- An epoch is made of whole updates: a step that carries gradients over its end is refused there.
- `grad_norm`, `forward_s`, `backward_s` and `optimizer_s` are not there: all that happens inside of the step.
- A resume in the middle of an epoch finds its batch again with `DeterministicEngine`; `Engine` reads the epoch from its
  first batch, so there a noether checkpoint has to be of an epoch's end. Its own checkpoints are taken as they come.
- A scheduler of the learning rate resumes from noether's checkpoints if it is given to `attach`; one of torch that is not
  given is refused there. Schedulers beside the learning rate are the user's to save.
- One process: losses are not gathered over ranks.
"""  # noqa: E501  # a table

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ignite.distributed as idist
from ignite.engine import DeterministicEngine, Events

from noether.core.iteration import TrainingIteration
from noether.core.reducer import compose
from noether.integrations.losses import losses_of
from noether.session.lengths import lengths_of
from noether.session.scheduler import SchedulerMemory
from noether.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ignite.engine import Engine
    from torch import nn
    from torch.optim import Optimizer

    from noether.core.callback import Callback


def attach(
    engine: Engine,
    reducer: Callback,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    accumulation_steps: int = 1,
    losses: Callable[[Any], Mapping[str, Any]] = losses_of,
    **settings: Any,
) -> Session:
    """Attach callbacks to an engine that trains, and return their run, to be saved beside the engine.

    Args:
        engine: The engine.
        reducer: Any one callback, such as `compose(...)` or `load_callbacks(path)`.
        model: The module that holds all parameters that are trained.
        optimizer: The optimizer that the engine's step uses.
        scheduler: What sets the learning rate, of torch or of ignite, if anything does: noether's checkpoints then hold
            its place. If it is stepped after an iteration, attach what does that before.
        accumulation_steps: Iterations of one update.
        losses: Mean losses by name in the engine's output; `total` is added as their sum.
        settings: `run`, `directory`, `interpreter`, `seed` and `format_duration`, as for `Session`.

    Raises:
        ValueError: If there is neither a directory nor an interpreter.
        KeyError: If a callback iterates data that the run does not have.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine, supervised_training_step
        >>> from noether.core.callbacks import OnlineLossCallback
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> engine = Engine(supervised_training_step(model, sgd, torch.nn.functional.mse_loss))
        >>> show = lambda effects, state, event: print(state.iteration, *effects) if effects else None
        >>> run = attach(engine, OnlineLossCallback(every_n_epochs=1), model=model, optimizer=sgd, interpreter=show)
        >>> batch = torch.zeros(4, 2), torch.zeros(4, 1)
        >>> _ = engine.run([batch, batch], max_epochs=1)
        E1_U2_S8 LogScalars(values=FrozenDict({'loss/online/total/E1': tensor(..., dtype=torch.float64)}))
        >>> run.state.iteration
        TrainingIteration(epoch=1, update=2, sample=8)
    """
    memory = None if scheduler is None else SchedulerMemory(scheduler)
    reducer = reducer if memory is None else compose(memory, reducer)
    live = Session(reducer, model=model, optimizer=optimizer, **settings)
    attached = _Attached(live, accumulation_steps, losses, memory, optimizer)
    engine.add_event_handler(Events.STARTED, attached.begin)
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, live.batch_arrived)
    engine.add_event_handler(Events.ITERATION_COMPLETED, attached.iterate)
    engine.add_event_handler(Events.EPOCH_COMPLETED, attached.end_epoch)
    engine.add_event_handler(Events.COMPLETED, live.end)
    return live


class _Attached:
    """The handlers of one engine."""

    def __init__(
        self,
        live: Session,
        accumulation_steps: int,
        losses: Callable[[Any], Mapping[str, Any]],
        scheduler: SchedulerMemory | None,
        optimizer: Optimizer,
    ) -> None:
        self._live, self._steps, self._losses = live, accumulation_steps, losses
        self._scheduler, self._optimizer = scheduler, optimizer
        self._seen = 0  # steps of the optimizer at the last update

    def begin(self, engine: Engine) -> None:
        if idist.get_world_size() != 1:
            raise ValueError(
                f"this training has {idist.get_world_size()} processes, and losses are not gathered over them: use one"
            )
        state, live = engine.state, self._live
        loaded = live.load()
        if loaded:
            self._restore_scheduler()
        self._take_to(engine, loaded=loaded)
        lengths: dict[str, Any] = lengths_of(state.dataloader, state.epoch_length, self._steps, live.run.batch_size)
        live.begin(end=self._end(engine), **lengths)
        self._seen = live.steps
        self._stop(engine)

    def iterate(self, engine: Engine) -> None:
        live, outputs = self._live, engine.state.output
        samples = live.run.batch_size(engine.state.batch)
        live.micro_batch(samples=samples, losses=self._losses(outputs), outputs=outputs, of=self._steps)
        stepped = live.steps > self._seen
        if stepped or live.pending == self._steps:
            self._seen = live.steps
            live.update(skipped=not stepped)
        self._stop(engine)

    def end_epoch(self, engine: Engine) -> None:
        self._live.end_epoch()
        self._stop(engine)

    def _stop(self, engine: Engine) -> None:
        if self._live.stop is not None:
            engine.terminate()

    def _end(self, engine: Engine) -> TrainingIteration | None:
        """Return where the engine ends, counted in updates if it counts iterations; None if nobody knows."""
        state = engine.state
        if state.max_epochs is not None and state.max_iters is None:
            return TrainingIteration(epoch=state.max_epochs)
        if state.max_iters is None or (state.epoch_length is None and self._steps > 1):
            return None
        epochs, rest = divmod(state.max_iters, state.epoch_length or state.max_iters + 1)
        return TrainingIteration(update=epochs * -(-(state.epoch_length or 0) // self._steps) + rest // self._steps)

    def _restore_scheduler(self) -> None:
        if self._scheduler is not None:
            self._scheduler.restore(self._live.state)
        elif any("initial_lr" in group for group in self._optimizer.param_groups):
            raise ValueError(
                f"the run goes on at {self._live.state.iteration}, and where the scheduler of its learning rate was "
                "its checkpoint does not say: give attach(scheduler=...) from the start, or load one of ignite's"
            )

    def _take_to(self, engine: Engine, *, loaded: bool) -> None:
        """Have the engine go on where the state is; what it was given itself has to be there already."""
        at, found, length = self._live.state.iteration, engine.state.iteration, engine.state.epoch_length
        if found == 0 and at.update == 0:
            return
        if length is None:
            raise ValueError(f"the run goes on at {at}, and where that is in an epoch nobody knows: give epoch_length")
        epoch, updates = divmod(at.update, -(-length // self._steps))  # one whose end is owed is told by `begin`
        inside = updates * self._steps
        expected = epoch * length + inside
        if found != expected and (found or not loaded):
            raise ValueError(
                f"the engine begins at iteration {found}, and the callbacks remember {at}, which is iteration "
                f"{expected}: load engine and callbacks from one checkpoint, with a larger max_epochs if the run was "
                "completed, or attach to a new engine for a new run"
            )
        if found == 0 and inside and self._live.stop is None and not _finds_its_place(engine):
            raise ValueError(
                f"the run goes on at {at}, {inside} iterations into an epoch that Engine would read from its first "
                "batch: use DeterministicEngine, or save at the end of epochs"
            )
        engine.state.iteration, engine.state.epoch = expected, epoch


def _finds_its_place(engine: Engine) -> bool:
    return isinstance(engine, DeterministicEngine) or engine.state.dataloader is None
