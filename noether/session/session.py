"""`Session`: noether's callbacks in any training loop, plain or of a framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from torch import Tensor

from noether.core.callback import leaves_of
from noether.core.errors import check_whole, raise_problems
from noether.core.event import AfterAccumulationStep, AfterUpdate
from noether.core.event_fields import check_fields
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.losses import loss_weights
from noether.core.tensors.modes import ModeWatch
from noether.core.tensors.tree import FrozenDict
from noether.effects.interpreter import Interpreter
from noether.session import settings
from noether.session.errors import SessionError
from noether.session.events import SessionEvents
from noether.session.hidden_state import ModelWatch
from noether.session.lengths import Contradiction
from noether.session.live_state import LiveState
from noether.session.loader import check_not_empty, has_exact_length, warn
from noether.session.loop import BatchLoop
from noether.session.losses import MicroBatch, is_finite, mean_losses, named_losses
from noether.session.optimizers import is_skipped
from noether.session.rank_exchange import check_joined, ranks_of_model
from noether.session.scaler import ScalerMemory
from noether.session.scheduler import SchedulerMemory
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from torch import nn

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.core.tensors.live.optimizer import Optimizers
    from noether.effects import RunDirectory
    from noether.session.losses import Losses, ReportedLosses
    from noether.session.optimizers import LiveOptimizer

_CLOCK: Final = Clock()
_RUN: Final = Run()


@final
class Session(SessionEvents):
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
    other state of theirs that the first one changed. The loop saves state that the session does not know.

    If the loop ends before the run does (`break`, an exception, Ctrl-C, `sys.exit`), the session saves a state from which
    the run continues exactly: the one before the current update until the optimizer steps, the one after it once
    `update` is called. If the events of that update were cut short, the resumed run dispatches them again. Between the
    two there is none, and the run resumes from its last checkpoint. If the loader, a callback or a handler raised the
    exception, notes on it say where and what is saved, and `traceback.txt` in the run directory has its traceback.
    SIGTERM ends Python at once, without a save: install a handler that calls `sys.exit`.

    On several ranks of a process group of `torch.distributed`, the model is in `DistributedDataParallel`, which averages
    the gradients. Events carry the losses of all ranks, the sum of their samples and the times of rank 0, so callbacks
    decide alike everywhere. Rank 0 logs and saves, and calls `interpreter=`; every rank evaluates its share of each
    `DataLoader` of `data`, whole also where a library has split it. Of buffers that differ, as those of batch norm do, the
    ones of rank 0 count. An exchange is left out at updates that no callback reads, if batches have equal sizes. A run
    may resume on another number of ranks: at the end of an epoch, and within one if `DistributedSampler` splits it.

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
        memory = None if scheduler is None else SchedulerMemory(scheduler)
        scale = None if scaler is None else ScalerMemory(scaler)
        reducer = compose(*(each for each in (memory, scale) if each is not None), *members)
        settings.check_data(leaves_of(reducer), run)
        settings.check_optimizer(leaves_of(reducer), watched)
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
        )
        self._accumulation, self._given_scheduler = accumulation, scheduler
        self._model_watch, self._mode_watch = ModelWatch(model), ModeWatch(model)
        self._loop: BatchLoop | None = None
        self._steps_with_samples = 0  # micro-batches of this update, on any rank
        self._interpreter_reads_events = interpreter is not None and not isinstance(interpreter, Interpreter)
        self._has_compared_params = False  # of all ranks, after the first update of this process

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
            continue_stopped: Whether a saved run continues that a callback stopped; otherwise it has ended.

        Raises:
            ProcessesError: If this is one of several processes without a group, or the ranks do not begin the same run.
            SessionError: If batches are iterated a second time, the loader is empty, or the saved run does not fit it.
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

    def micro_batch(
        self, losses: ReportedLosses, *, outputs: Any = None, samples: int | None = None, of: int | None = None
    ) -> None:
        """Report a micro-batch whose gradients are computed, before the optimizer steps.

        Args:
            losses: Mean loss, or losses by name; `total` is added as their sum. They are detached. A `Mean` gives a
                loss its weight in the mean over micro-batches and updates. Empty if the framework left the micro-batch
                out. An update of such micro-batches only counts as skipped, and so does one whose micro-batches have no
                samples; the losses of these are ignored.
            outputs: What the model returned, for callbacks that track it.
            samples: Its samples, >= 0; by default those of the batch that `batches` yielded.
            of: Micro-batches of this update; by default as `accumulation` says.

        Raises:
            SessionError: If there is no batch, or it was reported.
            SettingsError: If `samples` is not a whole number >= 0.
        """
        if samples is not None:
            check_fields(AfterAccumulationStep, {"samples": samples})
        batch = None if self._loop is None else self._loop.report()
        self.has_equal_batches = self.has_equal_batches and (samples is None or self._loop is None)
        if samples is None:
            if self._loop is None:
                raise SessionError("outside of session.batches(loader) a batch is not known: pass samples=")
            samples = self.run.count_samples(batch)
        if of is None:
            of = 1 if self._loop is None else self._loop.accumulation_steps
        if not self._micro_batches:
            self._settled, self._steps_with_samples = self._state, 0
        losses = named_losses(losses) if samples else FrozenDict()  # the mean over no samples is NaN
        if outputs is not None:
            outputs = map_tensors(Tensor.detach, outputs)
        self._epoch_batches += 1
        micro_batch = MicroBatch(samples=samples, losses=losses, outputs=outputs)
        self._micro_batches.append(micro_batch)
        self.stopwatch.step_made()
        if self.listens_to_micro_batches:
            self._dispatch_micro_batch(micro_batch, of)

    def _dispatch_micro_batch(self, micro_batch: MicroBatch, of: int) -> None:
        """Dispatch `AfterAccumulationStep` with the samples and losses of all ranks, unless there are none."""
        samples, losses, time_s = micro_batch.samples, micro_batch.losses, self._clock.wall_s()
        if self.ranks.are_several:
            what = f"micro-batch {len(self._micro_batches)} of {self._next_update}"
            samples, losses, time_s = self._exchange.reduce_micro_batch(what, micro_batch, time_s)
        if not samples:
            return
        self._steps_with_samples += 1
        self._dispatch(
            self._state,
            AfterAccumulationStep,
            losses=losses,
            outputs=micro_batch.outputs,
            samples=samples,
            accumulation_step=self._steps_with_samples - 1,
            accumulation_steps=max(of, self._steps_with_samples),
            time_s=time_s,
        )

    @property
    def _next_update(self) -> str:
        return f"update {self._state.iteration.update + 1}"

    def update(  # noqa: PLR0913  # every reading, by name
        self,
        losses: ReportedLosses | None = None,
        *,
        outputs: Any = None,
        samples: int | None = None,
        skipped: bool | None = None,
        mean: ReportedLosses | None = None,
        grad_norm: Tensor | float | None = None,
        finite: Tensor | bool | None = None,
        forward_s: float | None = None,
        backward_s: float | None = None,
        optimizer_s: float | None = None,
    ) -> None:
        """Report an update, after `optimizer.step()` and `scheduler.step()`; apply what callbacks change.

        Args:
            losses: As for `micro_batch`, which is called with them; left out if the micro-batches were reported.
            outputs: Likewise.
            samples: Likewise.
            skipped: Whether the optimizer left the update out, as under a `GradScaler`; by default whether it made no
                step, and the scaler lowered its scale or the gradients are not finite.
            mean: Losses of the update, in place of the sample-weighted mean over its micro-batches.
            grad_norm: 2-norm of the gradients, such as `clip_grad_norm_` returns; by default that of the gradients as
                the optimizer steps, if a callback reads it.
            finite: Whether losses and gradients are finite; by default checked if a callback reads it.
            forward_s: Seconds in forward passes, if the loop measured them.
            backward_s: Seconds in backward passes, likewise.
            optimizer_s: Seconds in the optimizer, likewise.

        Raises:
            SessionError: If there is no micro-batch, the optimizer made no step, or training is over.
            SettingsError: If a reading is not what `AfterUpdate` documents.
        """
        times = {"forward_s": forward_s, "backward_s": backward_s, "optimizer_s": optimizer_s}
        given = {"skipped": skipped, "grad_norm": grad_norm, "finite": finite, **times}
        check_fields(AfterUpdate, {name: value for name, value in given.items() if value is not None})
        if losses is not None:
            self.micro_batch(losses, outputs=outputs, samples=samples)
        self._check_update()
        counted, self._micro_batches = [each for each in self._micro_batches if each.samples], []
        reported = mean_losses(counted) if mean is None or not counted else named_losses(mean)
        if skipped is None:
            lowered = self._scaler is not None and self._scaler.has_lowered(self._state)
            skipped = is_skipped(self._optimizer, self.steps, reported, lowered=lowered)
        skipped = skipped or not reported
        rates = {} if self._optimizer is None else self._optimizer.readings
        if finite is None and "finite" in self.readings:
            finite = not skipped and is_finite(reported["total"]) & rates.get("finite", True)
        known: dict[str, Any] = {
            **rates,
            "losses": reported,
            "outputs": tuple([each.outputs for each in counted]),
            "accumulated": tuple([each.samples for each in counted]),
            "finite": finite,
            "skipped": skipped,
            **times,
            **self.stopwatch.read(),
        }
        if weights := loss_weights(reported):
            known["loss_weights"] = weights
        if grad_norm is not None or skipped:
            known["grad_norm"] = grad_norm
        known["samples"] = sum([each.samples for each in counted])
        if self.ranks.are_several:
            known |= self._reduce_update(counted, known, None if mean is None else reported)
        if not known["samples"]:
            self._warn_of_empty_update()
        state = self._state.advance(samples=known["samples"], epoch_batches=self._epoch_batches)
        self._dispatch(state, AfterUpdate, **known)
        self._steps_before += self.steps
        if self._optimizer is not None:
            self._optimizer.end_update()
        self._warn_of_changes()

    def _reduce_update(
        self, counted: list[MicroBatch], known: Mapping[str, Any], mean: Losses | None
    ) -> dict[str, Any]:
        """Return the readings of an update over all ranks; without an exchange where no callback reads them."""
        is_first, self._has_compared_params = not self._has_compared_params, True
        total = known["samples"] * self.ranks.world_size
        if not is_first and self.has_equal_batches and not self._is_read(total):
            return {"samples": total}
        sent = {"mean": None if mean is None else dict(mean), "time_s": self._clock.wall_s()}
        return self._exchange.reduce_update(self._next_update, counted, {**known, **sent}, params=is_first)

    def _is_read(self, samples: int) -> bool:
        """Return whether a callback, or an interpreter of the user's, reads the update that ends now."""
        state = self._state.advance(samples=samples, epoch_batches=self._epoch_batches)
        called = self._reducer.members_called(state, AfterUpdate)
        own = {id(self._scheduler), id(self._scaler)}
        return self._interpreter_reads_events or any(id(member) not in own for member in called)

    def _warn_of_changes(self) -> None:
        """Name what updates change of the model that no checkpoint has."""
        epoch = self._state.iteration.epoch
        for changes in (self._model_watch.describe_changes(), self._mode_watch.describe_changes(epoch)):
            if changes is not None:
                warn(changes)

    @property
    def _running_loop(self) -> BatchLoop:
        if self._loop is None:
            raise SessionError("this is known inside of `for batch in session.batches(loader):` only")
        return self._loop

    def _check_update(self) -> None:
        if self._loop is not None:
            self._loop.check_update(self.pending_micro_batches)
        elif not self._micro_batches:
            raise SessionError("an update needs micro-batches: call update(losses, samples=...) or micro_batch(...)")
        per_epoch = self._updates_per_epoch
        if per_epoch is not None and self._position == per_epoch:
            reason = f"epoch {self._state.iteration.epoch} has more updates than updates_per_epoch={per_epoch}"
            self._forget_lengths(Contradiction(reason))
