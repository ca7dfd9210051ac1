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
from noether.session import settings
from noether.session.errors import SessionError
from noether.session.events import SessionEvents
from noether.session.hidden_state import ModelWatch
from noether.session.lengths import Contradiction
from noether.session.live_state import LiveState
from noether.session.loader import check_not_empty, epoch_lengths, has_exact_length, warn
from noether.session.loop import BatchLoop
from noether.session.losses import MicroBatch, is_finite, mean_losses, named_losses
from noether.session.optimizers import is_skipped
from noether.session.processes import refuse_several_processes
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
    from noether.session.losses import ReportedLosses
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
        run = settings.complete_run(run, seed=seed, **parts)  # type: ignore[arg-type]  # by name
        watched = settings.watch_optimizer(model, optimizer)
        members = settings.list_callbacks(callbacks)
        memory = None if scheduler is None else SchedulerMemory(scheduler)
        scale = None if scaler is None else ScalerMemory(scaler)
        reducer = compose(*(each for each in (memory, scale) if each is not None), *members)
        settings.check_data(leaves_of(reducer), run)
        settings.check_optimizer(leaves_of(reducer), watched)
        super().__init__(
            run=run,
            reducer=reducer,
            live=LiveState(model, watched),
            scheduler=memory,
            scaler=scale,
            interpreter=interpreter or directory.interpreter,  # type: ignore[union-attr]  # one of them is there
            directory=directory,
            seed=seed,
            clock=clock,
        )
        self._accumulation, self._given_scheduler = accumulation, scheduler
        self._model_watch, self._mode_watch = ModelWatch(model), ModeWatch(model)
        self._loop: BatchLoop | None = None

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
            ProcessesError: If this is one of several processes.
            SessionError: If batches are iterated a second time, the loader is empty, or the saved run does not fit it.
            CheckpointError: If the directory holds checkpoints, and none of them can be resumed.
        """
        if self._loop is not None:
            raise SessionError(
                "session.batches(...) yields every epoch, once: write one loop, without `for epoch in ...` around it; "
                "to resume, make a new Session"
            )
        refuse_several_processes(
            "use noether.integrations.accelerate.AcceleratedSession; if this is the only process, unset WORLD_SIZE"
        )
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
        lengths: dict[str, Any] = epoch_lengths(loader, loop.length, self._accumulation, self.run.count_samples)
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
        if samples is None:
            if self._loop is None:
                raise SessionError("outside of session.batches(loader) a batch is not known: pass samples=")
            samples = self.run.count_samples(batch)
        if of is None:
            of = 1 if self._loop is None else self._loop.accumulation_steps
        if not self._micro_batches:
            self._settled = self._state
        losses = named_losses(losses) if samples else FrozenDict()  # the mean over no samples is NaN
        if outputs is not None:
            outputs = map_tensors(Tensor.detach, outputs)
        self._epoch_batches += 1
        self._micro_batches.append(MicroBatch(samples=samples, losses=losses, outputs=outputs))
        self.stopwatch.step_made()
        if samples and self.listens_to_micro_batches:
            steps = sum(each.samples > 0 for each in self._micro_batches)
            self._dispatch(
                self._state,
                AfterAccumulationStep,
                losses=losses,
                outputs=outputs,
                samples=samples,
                accumulation_step=steps - 1,
                accumulation_steps=max(of, steps),
            )

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
        samples = sum([each.samples for each in counted])
        if not counted:
            self._warn_of_empty_update()
        state = self._state.advance(samples=samples, epoch_batches=self._epoch_batches)
        self._dispatch(state, AfterUpdate, samples=samples, **known)
        self._steps_before += self.steps
        if self._optimizer is not None:
            self._optimizer.end_update()
        self._warn_of_changes()

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
