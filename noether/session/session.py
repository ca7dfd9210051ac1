"""`Session`: noether's callbacks in any training loop, plain or of a framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import leaves_of
from noether.core.errors import check_whole, raise_problems
from noether.core.reducer import compose
from noether.core.run import Run
from noether.effects.interpreter import Interpreter
from noether.session import settings
from noether.session.errors import SessionError
from noether.session.live_state import LiveState
from noether.session.loader import check_not_empty, has_exact_length
from noether.session.loop import BatchLoop
from noether.session.rank_exchange import check_joined, ranks_of_model
from noether.session.scaler import ScalerMemory
from noether.session.scheduler import SchedulerMemory
from noether.session.timing import Clock
from noether.session.updates import SessionUpdates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from torch import nn

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.core.tensors.live.optimizer import Optimizers
    from noether.effects import RunDirectory
    from noether.session.optimizers import LiveOptimizer

_CLOCK: Final = Clock()
_RUN: Final = Run()


@final
class Session(SessionUpdates):
    """Runs callbacks beside a training loop: dispatches its events, and applies what the callbacks change.

    A plain loop iterates `batches(loader)` and calls `update(losses)` once per update:

    | the loop | event | what the session does |
    |---|---|---|
    | `batches(loader)` begins | `BeforeTraining` | loads the newest checkpoint of the directory into model, optimizer and scheduler |
    | it yields a batch | | seeds torch, numpy and `random` from `(seed, epoch, batch)`; skips batches that are counted |
    | `micro_batch(losses)` | `AfterAccumulationStep`, if a callback listens | only with `accumulation` |
    | `update(losses)` | `AfterUpdate` | applies `lr_scale`, params, buffers, optimizer memory; `stop` ends the loop |
    | the loader ends | `AfterEpoch` | |
    | the end is reached | `AfterTraining` | waits for checkpoints; saves the end if no callback did; `batches` ends |

    A run that is cut at any update and resumed equals the uncut run bit for bit, if the loader yields the same epochs
    again under the same seeds. Generators that the loader, its samplers, datasets and transforms hold are seeded before
    each epoch. A `ResumeWarning` names at the start what cannot be seeded, and at the first batch of the second epoch
    other state of theirs that the first one changed. State that only the loop knows, the loop has to save itself.

    If the loop ends before the run does (`break`, an exception, Ctrl-C, `sys.exit`), the session saves a state from which
    the run continues exactly: the one before the current update until the optimizer steps, the one after it once
    `update` is called. If the events of that update were cut short, the resumed run dispatches them again. Between the
    two there is none, and the run resumes from its last checkpoint. Notes on an exception say what is saved, and
    `traceback.txt` in the run directory has its traceback: if the loader, a callback or a handler raised it, at once; if
    the loop itself did, where it leaves `with noether.open_run(...)`. Outside of such a block, Python does not tell the
    session of an error in the loop, which then counts as an interruption.
    SIGTERM ends Python at once, without a save: install a handler that calls `sys.exit`.

    On several ranks of a process group of `torch.distributed`, the model is in `DistributedDataParallel`, which averages
    the gradients. Events carry the losses of all ranks, the sum of their samples and the times of rank 0, so callbacks
    decide alike everywhere. Rank 0 logs and saves, and calls `interpreter=`; every rank evaluates its share of each
    `DataLoader` of `data`, whole also where a library has split it. If buffers differ between
    ranks, as those of batch norm do, those of rank 0 are used. An exchange is left out at updates that no callback reads, if batches have equal sizes. A run
    may resume on another number of ranks: at the end of an epoch, and within one if `DistributedSampler` splits it.

    With a directory, the session prints a panel as the run begins, and another one as it ends, or at the end of the
    `with` block of the directory. `open_run(path, console=...)` sends both to another console.

    Where no callback is due, up to 100 updates are deferred, for a quarter of a second at most: the callbacks that count
    or log them are called once for all, before anything reads their memory. To read `state` calls them, so a session
    defers no update if its loop reads `state` at each.

    A framework's loop calls `begin`, `batch_arrived`, `micro_batch`, `update`, `end_epoch` and `end` itself.

    Args:
        callbacks: One callback, or several in order, such as `noether.config.load_callbacks(path)`.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects, `(effects, state, event) -> None`; by default that of the directory.
        model: The module that holds all trained parameters, on its final device.
        optimizer: Its optimizer, or several by name, as `{"g": adam_g, "d": adam_d}`, of which an update may step any;
            without one no learning rate is scaled and no optimizer memory saved. Parameters that require a gradient and
            that none of them holds are named at the start.
        scheduler: The scheduler of the learning rate, or several by name, whose position becomes part of every
            checkpoint. Step it before `update`.
        scaler: The `torch.amp.GradScaler` of the loop, whose scale becomes part of every checkpoint. Call its `step` and
            `update` before `update` of the session. An update whose step it left out counts as skipped; with several
            optimizers only if it left out all of them.
        data: What callbacks evaluate, by dataset key: anything that yields batches.
        loss: `(outputs, batch) -> {name: mean over samples}` or one loss, for evaluations.
        max_epochs: Epochs after which training ends, >= 1.
        max_updates: Updates after which training ends, >= 1.
        max_samples: Samples after which training ends, >= 1. At most one of the three; without any a callback ends
            training, or the loop is left.
        seed: Seeds the random numbers of the loop and of callbacks.
        precision: Autocast dtype of evaluations, such as `torch.bfloat16`; training is the loop's.
        accumulation: Micro-batches of one update, >= 1; an epoch's last update may have fewer.
        clock: Reads the time.
        run: Further facts about the run, such as `Run(batch_size=...)` for batches that are not tensors.

    Raises:
        SessionError: If the parts cannot work together.

    Example:
        >>> import torch
        >>> from noether.core.callbacks import FixedUpdateEarlyStopping, OnlineLossCallback
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = torch.utils.data.DataLoader(torch.ones(12, 2), batch_size=4, shuffle=True)
        >>> show = lambda effects, state, event: print(state.iteration, type(event).__name__, len(effects))
        >>> callbacks = [OnlineLossCallback(every_n_epochs=1), FixedUpdateEarlyStopping(stop_at_update=4)]
        >>> session = Session(callbacks, interpreter=show, model=model, optimizer=optimizer, max_epochs=5)
        >>> for batch in session.batches(loader):
        ...     loss = model(batch).square().mean()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     session.update(loss)
        E0_U0_S0 BeforeTraining 0
        E0_U1_S4 AfterUpdate 0
        E0_U2_S8 AfterUpdate 0
        E0_U3_S12 AfterUpdate 0
        E1_U3_S12 AfterEpoch 1
        E1_U4_S16 AfterUpdate 1
        E1_U4_S16 AfterTraining 0
        >>> session.stop
        'stop_at_update: 4 is reached'
    """  # noqa: E501  # a table

    def __init__(  # noqa: PLR0913  # every part of a run, by name
        self,
        callbacks: Callback | Iterable[Callback],
        *,
        directory: RunDirectory | None = None,
        interpreter: Callable[[Effects, TrainState, Event], None] | None = None,
        model: nn.Module,
        optimizer: Optimizers | LiveOptimizer | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        data: Mapping[str, Iterable[Any]] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        max_epochs: int | None = None,
        max_updates: int | None = None,
        max_samples: int | None = None,
        seed: int = 0,
        precision: torch.dtype | None = None,
        accumulation: int = 1,
        clock: Clock = _CLOCK,
        run: Run = _RUN,
    ) -> None:
        settings.check_directory(directory, interpreter)
        settings.check_scheduler(scheduler, optimizer)
        settings.check_scaler(scaler)
        raise_problems([check_whole("accumulation", accumulation), check_whole("seed", seed, at_least=-(2**63))])
        settings.check_parts(model=model, loss=loss, precision=precision, interpreter=interpreter, seed=seed, run=run)
        settings.check_savable(model, directory)
        run = settings.end_of_run(run, max_epochs, max_updates, max_samples)
        parts = {"model": model, "data": data, "loss": loss, "precision": precision, "directory": directory}
        ranks = ranks_of_model(model, directory)
        run = settings.complete_run(run, seed=seed, ranks=ranks, **parts)  # type: ignore[arg-type]  # by name
        watched = settings.watch_optimizer(model, optimizer)
        members = settings.list_callbacks(callbacks)
        memory = None if scheduler is None else SchedulerMemory(scheduler, defers_updates=True)
        scale = None if scaler is None else ScalerMemory(scaler, defers_updates=True)
        reducer = compose(*(each for each in (memory, scale) if each is not None), *members)
        settings.check_data(leaves_of(reducer), run)
        settings.check_optimizer(reducer, watched)
        interpret = settings.interpreter_of_rank(interpreter, directory, ranks.rank)
        settings.check_handlers(reducer.members, interpret)
        super().__init__(
            run=run,
            reducer=reducer,
            live=LiveState(model, watched),
            scheduler=memory,
            scaler=scale,
            interpreter=interpret,
            directory=directory,
            seed=seed,
            clock=clock,
            ranks=ranks,
            model=model,
            reads_all_events=interpreter is not None and not isinstance(interpreter, Interpreter),
        )
        self._accumulation, self._given_scheduler = accumulation, scheduler

    @property
    def is_last_batch(self) -> bool:
        """Whether the current batch is the last of its epoch, for a scheduler that is stepped once per epoch.

        Raises:
            SessionError: If the loader has no `len()`, and only reading on would tell.
        """
        last = self._running_loop.is_last
        if last is None:
            raise SessionError("the loader has no len(), so its last batch is not known: step the scheduler per update")
        return last

    @property
    def completes_update(self) -> bool:
        """Whether the current batch completes its update: then call `optimizer.step()` and `update()`."""
        return self._running_loop.completes_update

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the current update, by which the loop divides its losses."""
        return self._running_loop.accumulation_steps

    def batches(self, loader: Iterable[Any], *, continue_stopped: bool = False) -> Iterator[Any]:
        """Yield the batches that are left of the run, epoch after epoch; each needs one `update` or `micro_batch`.

        Args:
            loader: Yields the batches of an epoch each time it is iterated. `set_epoch(epoch)` is called on it and on
                its samplers where it exists.
            continue_stopped: Whether to continue a saved run that a callback stopped; otherwise no batch is yielded.

        Raises:
            ProcessesError: If several processes have no process group, or the ranks begin different runs.
            SessionError: If `batches` is called a second time, the loader is empty, or the saved run does not fit it.
            CheckpointError: If the directory holds checkpoints, and none of them can be resumed.
        """
        if self._loop is not None:
            raise SessionError(
                "session.batches(...) yields every epoch, once: write one loop, without `for epoch in ...` around it; "
                "to resume, make a new Session"
            )
        check_joined(self.ranks, launched=True)
        settings.check_epochs(loader, self.run)
        check_not_empty(loader)
        settings.check_scheduler_is_given(self._optimizer, self._given_scheduler, self._directory)
        seed = self._state.seed
        loop = BatchLoop(self, loader, self._live.model, self._accumulation, seed)
        self._reducer = compose(loop, self._reducer)
        self.seeds_loop = self.resumes_within_epochs = True
        self.continue_after_stop = "call session.batches(loader, continue_stopped=True)"
        self.load()
        if self._remembers:
            self._state = loop.resume(self._state)
            if continue_stopped:
                self._state = self._state.replace(stop=None, stopped_by=None)
        loop.prepare_epoch(self._state.iteration.epoch)
        self._trusts_lengths = has_exact_length(loader)  # else the loop reads the epoch again, to find its end
        lengths: dict[str, Any] = self.lengths_of_epoch(loader, loop.length, self._accumulation)
        self.begin(**lengths)
        self._loop = loop
        return loop.run()

    @property
    def _running_loop(self) -> BatchLoop:
        if self._loop is None:
            raise SessionError("there is no current batch: read this inside of `for batch in session.batches(loader):`")
        return self._loop
