"""Stops training or rolls back when updates are not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, final

from noether.core.callbacks.improvement import NONFINITE, is_nonfinite
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import Effect, LogText, SetSummary
from noether.core.errors import check_choice, check_whole
from noether.core.metrics import log
from noether.core.tensors.dtensors import place_like
from noether.core.tensors.live.optimizer import OPT_STATE_PARTS
from noether.core.tensors.memory import GRAD_SCALER
from noether.core.tensors.stored_weights import find_weights, memory_of
from noether.core.tensors.tree import FrozenDict, clone_tensors, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from noether.core.callback import Effects
    from noether.core.errors import Problem
    from noether.core.event import AfterUpdate, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState
    from noether.core.stretch import CompletedUpdate


@final
class NanGuardCallback(PeriodicCallback):
    """Stops training or rolls back to a snapshot after a number of updates in a row that are not finite.

    At every such update it logs their number in a row as `nonfinite`, and writes their total into the summary as
    `nonfinite/updates`. List callbacks that watch a metric after this one: they ignore its value at such an update.

    A snapshot holds params, buffers and optimizer memory. It is taken before training, and at the interval if the
    update and these tensors are finite. A rollback keeps counters, metrics and the memory of callbacks, so training
    continues with the next batch. An average of the weights that is not finite restarts from the snapshot.

    `noether.Session` looks at loss and gradients and applies a rollback. The trainer looks at the loss with
    `trainer.nonfinite: apply`; with `skip` it looks at loss and gradients and leaves the update out, which is the
    better choice with this callback. If you call `dispatch` yourself, pass `AfterUpdate(finite=...)` and write a
    rollback into model and optimizer with `state = state.into_module(model, optimizer)`.

    Under a gradient scaler, of a `Session` or with `trainer.precision: float16`, gradients that overflow while the
    scale is above 1 do not count if the loss is finite: the scaler skips that update and lowers the scale.

    Args:
        tolerance: Updates in a row that are not finite after which the callback acts, >= 1.
        action: `stop` training, or `rollback` to the snapshot.
        max_rollbacks: Rollbacks after which training stops instead, >= 1.
        every_n_epochs: Epochs between snapshots, >= 1.
        every_n_updates: Updates between snapshots, >= 1.
        every_n_samples: Samples between snapshots, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.NanGuardCallback
      every_n_updates: 500
      tolerance: 3
      action: rollback
    ```

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> guard = NanGuardCallback(every_n_updates=100, tolerance=2)
        >>> state = TrainState()
        >>> for _ in range(2):
        ...     state, effects = guard(state.advance(samples=8), AfterUpdate(samples=8, finite=False))
        >>> state.stop
        '2 updates in a row were not finite'
    """

    tolerance: int
    action: Literal["stop", "rollback"] = "stop"
    max_rollbacks: int = 10

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield check_whole("tolerance", self.tolerance)
        yield check_choice("action", self.action, ("stop", "rollback"))
        yield check_whole("max_rollbacks", self.max_rollbacks)

    @property
    def produces(self) -> tuple[str, ...]:
        """The number of updates in a row that were not finite, logged only at such an update."""
        return (NONFINITE,)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return counts of zero and, for `rollback`, a snapshot."""
        snapshot = clone_tensors(_weights(state)) if self.action == "rollback" else None
        counts = {"total": 0, "in_row": 0, "rollbacks": 0}
        return {self.name: FrozenDict(**counts, snapshot=snapshot, taken=str(state.iteration))}

    @property
    def readings(self) -> tuple[str, ...]:
        """Whether the update was finite."""
        return ("finite",)

    def can_defer(self, state: TrainState, event: AfterUpdate) -> bool:
        """Return whether the update, and the one before it, were finite: then there is nothing to do."""
        return not event.skipped and bool(event.finite) and not self.memory(state)["in_row"]

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Count updates that are not finite, and act if there are too many."""
        effects: Effects = ()
        for _, event in updates:  # deferred updates are finite: there is nothing to do
            state, more = self._check_update(state, event)
            effects += more
        return state, effects

    def _check_update(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        # An update without samples, or an overflow under a gradient scaler, says nothing about the weights.
        if event.skipped and (not event.samples or _is_overflow(state, event)):
            return state, ()
        memory = self.memory(state)
        if bool(event.finite) and not event.skipped:
            return (state.remember(self.name, memory | {"in_row": 0}) if memory["in_row"] else state), ()
        memory = memory | {"in_row": memory["in_row"] + 1, "total": memory["total"] + 1}
        state, effects = log(state.remember(self.name, memory), event, {NONFINITE: memory["in_row"]})
        state, more = self._act(state) if memory["in_row"] >= self.tolerance else (state, ())
        return state, (*effects, SetSummary(FrozenDict({"nonfinite/updates": memory["total"]})), *more)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Take a snapshot if all of it is finite."""
        memory = self.memory(state)
        if self.action != "rollback" or is_nonfinite(state) or not _is_finite(_weights(state), memory["snapshot"]):
            return state, ()
        memory = memory | {"snapshot": clone_tensors(_weights(state)), "taken": str(state.iteration)}
        return state.remember(self.name, memory), ()

    def _act(self, state: TrainState) -> tuple[TrainState, tuple[Effect, ...]]:
        if state.stop is not None:
            return state, ()
        memory = self.memory(state)
        in_row = memory["in_row"]
        reason = "1 update was not finite" if in_row == 1 else f"{in_row} updates in a row were not finite"
        if self.action == "rollback" and memory["rollbacks"] < self.max_rollbacks:
            text = f"{reason}: back to the weights of {memory['taken']}"
            counts = {"in_row": 0, "rollbacks": memory["rollbacks"] + 1}
            return _roll_back(state.remember(self.name, memory | counts), memory["snapshot"]), (LogText(text),)
        if self.action == "rollback":
            reason = f"{reason}, after {memory['rollbacks']} rollbacks"
        return state.request_stop(reason), (LogText(f"stopping: {reason}"),)


def _weights(state: TrainState) -> dict[str, Any]:
    weights = {"params": state.params, "buffers": state.buffers, "opt_state": _without_groups(state.opt_state)}
    more = {name: getattr(state, name) for name in ("non_persistent", "extra_state")}
    return {**weights, **{name: part for name, part in more.items() if part}}


def _is_overflow(state: TrainState, event: AfterUpdate) -> bool:
    """Return whether a gradient scaler skipped the update, and its lower scale may avoid that."""
    scale = state.callback_states.get(GRAD_SCALER, {}).get("scale", 0)
    return scale >= 1 and "total" in event.losses and math.isfinite(event.losses["total"])


def _without_groups(opt_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return memory of optimizers without groups: learning rates follow the counters, which a rollback keeps."""
    if OPT_STATE_PARTS.isdisjoint(opt_state):  # several optimizers by name
        return {name: _without_groups(each) for name, each in opt_state.items()}
    return {name: part for name, part in opt_state.items() if name != "groups"}


def _add_groups(opt_state: Mapping[str, Any], now: Mapping[str, Any]) -> FrozenDict:
    """Return memory of optimizers with the groups that they have now."""
    if OPT_STATE_PARTS.isdisjoint(now):
        return FrozenDict({name: _add_groups(opt_state[name], each) for name, each in now.items()})
    return FrozenDict({**now, **opt_state})


def _roll_back(state: TrainState, snapshot: Mapping[str, Any]) -> TrainState:
    """Return the state with the weights of a snapshot; averages that are not finite restart from them."""
    restored = clone_tensors(snapshot)
    state = state.replace(**{**restored, "opt_state": _add_groups(restored["opt_state"], state.opt_state)})
    for weights in find_weights(state):
        average = state.callback_states[memory_of(weights)]
        if not _is_finite(average, snapshot):
            restarted = {part: _copy_like(values, snapshot[part]) for part, values in average.items()}
            state = state.remember(memory_of(weights), restarted)
    return state


def _is_finite(tree: Mapping[str, Any], snapshot: Mapping[str, Any]) -> bool:
    """Return whether all of `tree` is finite, apart from entries that are not finite in `snapshot` (such as a mask)."""
    before = dict(tensors(snapshot))
    for path, tensor in tensors(tree):
        finite = tensor.isfinite()
        if path in before and before[path].shape == tensor.shape:
            finite |= ~place_like(before[path], tensor).isfinite()  # a loaded snapshot has whole tensors
        if not bool(finite.all()):
            return False
    return True


def _copy_like(average: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> FrozenDict:
    """Return copies of the weights under the names of an average, in its dtypes."""
    # A buffer that forward makes may be in only one of them.
    return FrozenDict({name: weights.get(name, tensor).to(tensor.dtype, copy=True) for name, tensor in average.items()})
