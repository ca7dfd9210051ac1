"""A run in a loop that is not ours: what happens there is told to the callbacks, and kept as one state.

An adapter hears of micro-batches, updates and epochs from its framework and calls the method of that name. Everything
else is here, once for all of them: the state, the clock, dispatch, what a callback changed, and resuming.

| the adapter calls | event | with |
|---|---|---|
| `load()` | | takes up a saved state, before the loop is taken to its place; `begin` does it if nobody did |
| `begin()` | `BeforeTraining`, `AfterEpoch` if it is owed | `resumed` where a saved state is gone on with |
| `batch_arrived()` | | begins the time of the step; the time before it was spent waiting for data |
| `micro_batch(...)` | `AfterAccumulationStep`, if anybody listens | what was given |
| `update(...)` | `AfterUpdate` | sums and sample-weighted means of the micro-batches since the last update, learning rates of the optimizer's step |
| `end_epoch()` | `AfterEpoch`, once all updates of the epoch are counted | |
| `end()` | `AfterEpoch` if it is owed, `AfterTraining` once | |
"""  # noqa: E501  # a table

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from torch import Tensor

from noether.core.callback import label_of, listens_to
from noether.core.errors import suggest
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.loop import dispatch
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.forward import add_total
from noether.core.tensors.module import move_beside, write_weights
from noether.core.tensors.tree import FrozenDict
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.session.evaluation import beside_training
from noether.session.optimizers import TorchOptimizer
from noether.session.timing import Clock, Stopwatch
from noether.session.views import Views

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.optim import Optimizer

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.effects import RunDirectory
    from noether.session.optimizers import LiveOptimizer

    Losses = Mapping[str, Tensor | float]

_VIEWS: Final = ("params", "buffers", "opt_state")
_CLOCK: Final = Clock()
_RUN: Final = Run()


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    samples: int
    losses: Losses
    outputs: Any


@final
class Session:
    """One run of callbacks beside a live model and its optimizer.

    Args:
        reducer: The callbacks: any one callback, such as `compose(...)` or `load_callbacks(path)`.
        run: What is fixed for the run; `frozen` and, with a directory, `run_id` are filled in where they are missing.
            `data` and `forward`, which data-iterating callbacks need, are the user's to give.
        model: The module that holds all parameters that are trained, on the device where they will be.
        optimizer: Its optimizer; one that is not torch's as a `LiveOptimizer`.
        directory: Where the run is kept. If there is a checkpoint in it the run goes on from there.
        interpreter: What carries effects out; by default that of the directory.
        seed: What random numbers of callbacks are derived from.
        clock: Where time is read.

    Raises:
        ValueError: If there is neither a directory nor an interpreter, or the optimizer holds other parameters.
        KeyError: If a callback iterates data that the run does not have.

    Example:
        >>> import torch
        >>> from noether import Run, compose
        >>> from noether.core.callbacks import OnlineLossCallback
        >>> model = torch.nn.Linear(2, 1)
        >>> live = Session(
        ...     compose(OnlineLossCallback(every_n_updates=2)),
        ...     run=Run(updates_per_epoch=2),
        ...     model=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     interpreter=lambda effects, state, event: print(state.iteration, type(event).__name__, len(effects)),
        ... )
        >>> _ = live.begin()
        E0_U0_S0 BeforeTraining 0
        >>> for loss in (0.5, 0.25):
        ...     live.micro_batch(samples=4, losses={"total": loss})
        ...     live.update()
        E0_U1_S4 AfterUpdate 0
        E0_U2_S8 AfterUpdate 1
        >>> live.end()
        E1_U2_S8 AfterEpoch 0
        E1_U2_S8 AfterTraining 0
    """

    def __init__(
        self,
        reducer: Callback,
        *,
        run: Run = _RUN,
        model: nn.Module,
        optimizer: Optimizer | LiveOptimizer | None = None,
        directory: RunDirectory | None = None,
        interpreter: Callable[[Effects, TrainState, Event], None] | None = None,
        seed: int = 0,
        clock: Clock = _CLOCK,
    ) -> None:
        if interpreter is None and directory is None:
            raise ValueError("nobody would carry out what the callbacks ask for: give directory=open_run('runs/mine')")
        self.run = self._given = _completed(run, model, directory)
        self._reducer = compose(reducer)
        _check_data(self._reducer.members, self.run)
        self._interpreter = interpreter or directory.interpreter  # type: ignore[union-attr]  # one of them is there
        self._model, self._views = model, Views(model)
        self._optimizer = _watched(model, optimizer)
        self._directory = directory
        self._clock = clock
        self._state = TrainState(seed=seed)
        self._remembers = False
        self._pending: list[_MicroBatch] = []
        self._settled = self._state  # as it was when the update under way began
        self._stopwatch = Stopwatch(clock.elapsed_s)

    @property
    def state(self) -> TrainState:
        """The state; it views the live model and optimizer."""
        return self._state

    @property
    def stop(self) -> str | None:
        """Why a callback asks the loop to stop, or None."""
        return self._state.stop

    @property
    def is_over(self) -> bool:
        """Whether a callback asks the loop to stop, or the end of the run is reached."""
        return self._state.stop is not None or self._state.iteration.reached(self.run.end)

    @property
    def listens_to_micro_batches(self) -> bool:
        """Whether any callback wants to hear of micro-batches."""
        return listens_to(self._reducer, AfterAccumulationStep)

    @property
    def readings(self) -> tuple[str, ...]:
        """Costly fields of `AfterUpdate` that a callback needs, such as `grad_norm`."""
        return self._reducer.readings

    @property
    def steps(self) -> int:
        """How many steps the optimizer has made since this object watches it."""
        return 0 if self._optimizer is None else self._optimizer.steps

    @property
    def pending(self) -> int:
        """How many micro-batches there were since the last update."""
        return len(self._pending)

    def load(self, saved: TrainState | None = None) -> bool:
        """Take up the state to go on from, and tell nobody yet.

        That is `saved`; left out, what this object or `load_state_dict` remembers, else the newest checkpoint in the
        directory. What is loaded is written into model and optimizer, but for what is remembered: there the framework
        has done that.

        Args:
            saved: A loaded state.

        Returns:
            Whether a state was loaded here, so that the loop has to be taken to `state.iteration`.

        Raises:
            KeyError: If the model does not have the parameters of the saved state.
            CheckpointError: If there are checkpoints in the directory, and none that the run can go on from.
        """
        if saved is None and self._directory is not None and not self._remembers:
            saved = self._directory.load()
        if saved is None:
            return False
        write_weights(self._model, saved.params, saved.buffers)
        if self._optimizer is not None:
            self._optimizer.load(saved.opt_state)
        self._state, self._remembers = saved, True
        return True

    def begin(self, saved: TrainState | None = None, **known: Any) -> bool:
        """Tell the callbacks that training begins, or goes on from what `load` takes up if that was not called before.

        Log lines in the directory beyond the state are dropped, to be written again.

        Args:
            saved: A loaded state, as for `load`.
            known: What the framework knows of the run now, such as `end`, for what was not given; None is not known.

        Returns:
            What `load` returns.

        Raises:
            LogError: If the log in the directory is damaged.
        """
        self.run = fill_run(self._given, **known)
        if self._pending:  # an exception ended the loop inside of an update: it goes on before it
            self._state, self._pending = self._settled, []
        loaded, resumed = self.load(saved), self._remembers
        if self._directory is not None:
            self._directory.truncate_logs(self._state if resumed else None)
        self._state = self._state.replace(callback_states=move_beside(self._model, self._state.callback_states))
        self._remembers = True
        if self._optimizer is not None:
            self._optimizer.watch()
        self._scale()
        self._tell(self._state, BeforeTraining, resumed=resumed)
        self._end_owed_epoch()  # where the framework saved between an epoch's last update and its end
        self._stopwatch.read()
        return loaded

    def batch_arrived(self) -> None:
        """Begin the time of the step; the time since the last one was spent waiting for data."""
        self._stopwatch.data_arrived()

    def micro_batch(self, *, samples: int, losses: Losses, outputs: Any = None, of: int = 1) -> None:
        """Tell of a micro-batch whose gradients are there.

        Args:
            samples: Its samples, >= 1.
            losses: Mean loss by name; `total` is added as their sum. Empty where the framework left it out: an update
                of nothing else counts as skipped.
            outputs: What the model returned.
            of: Micro-batches of this update.
        """
        if not self._pending:
            self._settled = self._state
        losses = add_total(_detached(losses)) if losses else FrozenDict()
        self._pending.append(_MicroBatch(samples=samples, losses=losses, outputs=outputs))
        self._stopwatch.step_made()
        if self.listens_to_micro_batches:
            self._tell(
                self._state,
                AfterAccumulationStep,
                losses=losses,
                outputs=outputs,
                samples=samples,
                accumulation_step=len(self._pending) - 1,
                accumulation_steps=max(of, len(self._pending)),
            )

    def update(self, *, skipped: bool = False, **readings: Any) -> None:
        """Tell of the update that the micro-batches since the last one made.

        Args:
            skipped: Whether the optimizer left it out.
            readings: Further fields of `AfterUpdate`, such as `grad_norm`, or `lr` in place of what was seen.

        Raises:
            ValueError: If there was no micro-batch, or the epoch has all its updates and its end was not told.
        """
        if not self._pending:
            raise ValueError("an update is made of micro-batches: call micro_batch(...) before it")
        if self._owes_epoch:
            raise ValueError(
                f"epoch {self._state.iteration.epoch} goes on after {self._position} updates, which is all that every "
                "epoch has, as Run(updates_per_epoch=...) says: schedules need epochs of one length"
            )
        pending, self._pending = self._pending, []
        losses = _weighted_mean(pending)
        known = {
            "losses": losses,
            "outputs": tuple(each.outputs for each in pending),
            "accumulated": tuple(each.samples for each in pending),
            "finite": _finite(losses.get("total", math.nan)),
            "skipped": skipped or not losses,
            **({} if self._optimizer is None else _rates(self._optimizer)),
            **self._stopwatch.read(),
        }
        samples = sum(each.samples for each in pending)
        self._tell(self._state.advance(samples=samples), AfterUpdate, samples=samples, **{**known, **readings})

    def end_epoch(self, *, cut_short: bool = False) -> None:
        """Tell of the end of an epoch; nothing where it was told already.

        Args:
            cut_short: Whether the loop left it before its last batch. An epoch that is not completed is not counted,
                as in noether's own trainer.

        Raises:
            ValueError: If it ended with another number of updates than every epoch has.
        """
        position, per_epoch = self._position, self._updates_per_epoch
        if position == 0 and not self._pending:
            return  # told already, such as by the run that is gone on with
        if cut_short and not self._owes_epoch:
            return
        if self._pending:
            raise ValueError(
                f"epoch {self._state.iteration.epoch} ended with {self.pending} micro-batches that made no update: let "
                "the optimizer step at the last batch of an epoch, or give epochs a multiple of the accumulation steps"
            )
        if per_epoch is not None and position != per_epoch:
            raise ValueError(
                f"epoch {self._state.iteration.epoch} ended after {position} updates, and every epoch has {per_epoch}, "
                "as Run(updates_per_epoch=...) says: schedules need epochs of one length"
            )
        self._tell(self._state.next_epoch(), AfterEpoch)

    def end(self) -> None:
        """Tell of the end of training, once; return when every checkpoint is written, and let the optimizer go.

        Raises:
            CheckpointError: If the last checkpoint failed.
        """
        self._end_owed_epoch()
        if not self._state.ended:
            self._tell(self._state.replace(ended=True), AfterTraining)
        if self._directory is not None:
            self._directory.wait()
        self.close()

    def close(self) -> None:
        """Let the optimizer go: what it does from now on is not watched."""
        if self._optimizer is not None:
            self._optimizer.release()

    def state_dict(self) -> dict[str, Any]:
        """Return what the run remembers beside model and optimizer, for the framework's own checkpoint.

        Inside of an update it is what was remembered before it: its gradients are in no checkpoint.

        Returns:
            Plain values and tensors only, which torch reads back with `weights_only=True`.
        """
        return encode_state(self._settled if self._pending else self._state)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Recall what a run remembered, before `begin`; model and optimizer are the framework's to restore.

        Raises:
            ValueError: If `saved` is nothing that `state_dict` returns.
        """
        self._state = decode_state(saved)
        self._remembers = True

    @property
    def _updates_per_epoch(self) -> int | None:
        return getattr(self.run, "updates_per_epoch", None)

    @property
    def _position(self) -> int | None:
        """How many updates of the epoch are counted, all of them while its end is owed; None if nobody knows."""
        per_epoch, at = self._updates_per_epoch, self._state.iteration
        return None if per_epoch is None else at.update - at.epoch * per_epoch

    @property
    def _owes_epoch(self) -> bool:
        return self._position is not None and self._position == self._updates_per_epoch

    def _end_owed_epoch(self) -> None:
        if self._owes_epoch:
            self._tell(self._state.next_epoch(), AfterEpoch)

    def _tell(self, state: TrainState, event_type: type[Event], **readings: Any) -> None:
        event = event_type(run=self.run, time_s=self._clock.wall_s(), **readings)
        before = self._viewing(state)
        self._state = dispatch(before, event, self._reducer, self._interpreter)
        self._write_changed(before)

    def _viewing(self, state: TrainState) -> TrainState:
        """Return the state with views of the model and optimizer as they are now."""
        opt_state = FrozenDict() if self._optimizer is None else self._optimizer.opt_state
        return self._views.of(state.replace(opt_state=opt_state))

    def _write_changed(self, before: TrainState) -> None:
        """Write into the live objects what callbacks changed of the state that viewed them."""
        params, buffers, opt_state = (getattr(self._state, n) is not getattr(before, n) for n in _VIEWS)
        if params or buffers:
            write_weights(self._model, self._state.params, self._state.buffers)
        if opt_state and self._optimizer is not None:
            self._optimizer.load(self._state.opt_state)
        self._scale()

    def _scale(self) -> None:
        if self._optimizer is not None:
            self._optimizer.lr_scale = float(self._state.hyperparams["lr_scale"])


def fill_run(run: Run, **known: Any) -> Run:
    """Return `run` with what an adapter knows in place of what was not given; None is not known.

    Example:
        >>> from noether import Run
        >>> run = fill_run(Run(updates_per_epoch=3), updates_per_epoch=5, run_id="a", effective_batch_size=None)
        >>> run.updates_per_epoch, run.run_id
        (3, 'a')
    """
    return run.replace(**{name: value for name, value in known.items() if value is not None and name not in vars(run)})


def _completed(run: Run, model: nn.Module, directory: RunDirectory | None) -> Run:
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    run = fill_run(run, frozen=frozen, run_id=None if directory is None else directory.run_id)
    if "data" not in vars(run):
        return run
    return run.replace(data={key: beside_training(data, model) for key, data in run.data.items()})


def _check_data(members: tuple[Callback, ...], run: Run) -> None:
    """Refuse, before training, callbacks that iterate data which is not there."""
    for member in members:
        key = getattr(member, "dataset_key", None)
        if key is None:
            continue
        data, _ = getattr(run, "data", {}), run.forward  # the latter says itself what is missing
        if key not in data:
            raise KeyError(
                f"{label_of(member)} iterates {key!r}, and the run has {list(data) or 'no data'}"
                f"{suggest(key, data)}; give Run(data={{{key!r}: loader}}, forward=noether.forward(model, loss))"
            )


def _watched(model: nn.Module, optimizer: Optimizer | LiveOptimizer | None) -> LiveOptimizer | None:
    if optimizer is None or hasattr(optimizer, "opt_state"):
        return optimizer  # type: ignore[return-value]  # a torch optimizer has no opt_state
    return TorchOptimizer(model, optimizer)


def _rates(optimizer: LiveOptimizer) -> dict[str, Any]:
    return {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}


def _detached(losses: Losses) -> Any:
    return {name: loss.detach() if isinstance(loss, Tensor) else loss for name, loss in losses.items()}


def _finite(loss: Tensor | float) -> Tensor | bool:
    return loss.isfinite() if isinstance(loss, Tensor) else math.isfinite(loss)


def _weighted_mean(pending: list[_MicroBatch]) -> Losses:
    """Return the sample-weighted mean of each loss over the micro-batches that have it, as noether's step sums it."""
    names = dict.fromkeys(name for each in pending for name in each.losses)
    return FrozenDict(
        {name: _mean([(m.losses[name], m.samples) for m in pending if name in m.losses]) for name in names}
    )


def _mean(weighted: list[tuple[Any, int]]) -> Any:
    if len(weighted) == 1:  # as it is: multiplying it by one keeps a number, not always its type
        return weighted[0][0]
    samples = sum(weight for _, weight in weighted)
    first, *others = (loss * (weight / samples) for loss, weight in weighted)
    return sum(others, start=first)
