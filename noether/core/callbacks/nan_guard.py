"""What happens when updates are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final

from noether.core.callbacks.improvement import NONFINITE, is_nonfinite
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import Effect, LogText, SetSummary
from noether.core.errors import check_choice, check_whole
from noether.core.metrics import log
from noether.core.tensors.stored_weights import find_weights, memory_of
from noether.core.tensors.tree import FrozenDict, clone_tensors, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from noether.core.callback import Effects
    from noether.core.errors import Problem
    from noether.core.event import AfterUpdate, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class NanGuardCallback(PeriodicCallback):
    """Counts updates that are not finite, and after some in a row stops training or goes back to a snapshot.

    At every such update it logs `nonfinite`, how many there were in a row, and puts their number in all into the
    summary. What watches a metric for its best takes none from there, so it is listed after this callback.

    A snapshot holds params, buffers and optimizer memory; it is taken before training, and at the interval where the
    update and all of that is finite. After a rollback counters, metrics and the memory of callbacks go on, so that the
    next batch is a new one; an average of the weights that is no longer finite begins anew.

    What counts is what the step reports: with `trainer.nonfinite: apply` the loss, with `skip` the gradients too, and
    nothing of such an update is applied. `skip` goes best with this callback. A loop of one's own gives
    `AfterUpdate(finite=...)`, and writes a rollback into its model and optimizer after the dispatch, with
    `state = state.into_module(model, optimizer)`.

    Args:
        tolerance: Updates in a row that are not finite after which it acts, >= 1.
        action: `stop` training, or `rollback` to the snapshot.
        max_rollbacks: Rollbacks after which it stops in place of another one, >= 1.
        every_n_epochs: Epochs between snapshots, >= 1.
        every_n_updates: Updates between snapshots, >= 1.
        every_n_samples: Samples between snapshots, >= 1; exactly one of the three is given.

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
        """Yield what is wrong with the settings."""
        yield from super().problems()
        yield check_whole("tolerance", self.tolerance)
        yield check_choice("action", self.action, ("stop", "rollback"))
        yield check_whole("max_rollbacks", self.max_rollbacks)

    @property
    def produces(self) -> tuple[str, ...]:
        """How many updates in a row were not finite, where one was not."""
        return (NONFINITE,)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return no such update yet, and with `rollback` a snapshot."""
        snapshot = clone_tensors(_weights(state)) if self.action == "rollback" else None
        counts = {"total": 0, "in_row": 0, "rollbacks": 0}
        return {self.name: FrozenDict(**counts, snapshot=snapshot, taken=str(state.iteration))}

    @property
    def readings(self) -> tuple[str, ...]:
        """Whether the update was finite."""
        return ("finite",)

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Count, and act."""
        memory = self.memory(state)
        if bool(event.finite) and not event.skipped:
            counted = state if not memory["in_row"] else state.remember(self.name, memory | {"in_row": 0})
            return counted, ()
        memory = memory | {"in_row": memory["in_row"] + 1, "total": memory["total"] + 1}
        state, effects = log(state.remember(self.name, memory), event, {NONFINITE: memory["in_row"]})
        state, asked = self._acted(state) if memory["in_row"] >= self.tolerance else (state, ())
        return state, (*effects, SetSummary(FrozenDict({"nonfinite/updates": memory["total"]})), *asked)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Take a snapshot, where all of it is finite."""
        memory = self.memory(state)
        if self.action != "rollback" or is_nonfinite(state) or not _is_sound(_weights(state), memory["snapshot"]):
            return state, ()
        taken = memory | {"snapshot": clone_tensors(_weights(state)), "taken": str(state.iteration)}
        return state.remember(self.name, taken), ()

    def _acted(self, state: TrainState) -> tuple[TrainState, tuple[Effect, ...]]:
        if state.stop is not None:
            return state, ()
        memory = self.memory(state)
        reason = f"{memory['in_row']} updates in a row were not finite"
        if self.action == "rollback" and memory["rollbacks"] < self.max_rollbacks:
            text = f"{reason}: back to the weights of {memory['taken']}"
            counted = memory | {"in_row": 0, "rollbacks": memory["rollbacks"] + 1}
            return _gone_back(state.remember(self.name, counted), memory["snapshot"]), (LogText(text),)
        if self.action == "rollback":
            reason = f"{reason}, after {memory['rollbacks']} rollbacks"
        return state.stopped(reason), (LogText(f"stopping: {reason}"),)


def _weights(state: TrainState) -> dict[str, Any]:
    # Without the optimizer's groups: learning rates follow the counters, and those go on.
    opt_state = {name: part for name, part in state.opt_state.items() if name != "groups"}
    return {"params": state.params, "buffers": state.buffers, "opt_state": opt_state}


def _gone_back(state: TrainState, snapshot: Mapping[str, Any]) -> TrainState:
    """Return the state with the weights of a snapshot; averages that bad updates destroyed begin anew at them."""
    back = clone_tensors(snapshot)
    state = state.replace(**{**back, "opt_state": FrozenDict({**state.opt_state, **back["opt_state"]})})
    for weights in find_weights(state):
        kept = state.callback_states[memory_of(weights)]
        if not _is_sound(kept, snapshot):
            anew = {what: _like(tensors_by_name, snapshot[what]) for what, tensors_by_name in kept.items()}
            state = state.remember(memory_of(weights), anew)
    return state


def _is_sound(tree: Mapping[str, Any], held: Mapping[str, Any]) -> bool:
    """Return whether all of `tree` is finite but for what was not in `held` either, such as a mask of infinities."""
    before = dict(tensors(held))
    for path, tensor in tensors(tree):
        finite = tensor.isfinite()
        if path in before and before[path].shape == tensor.shape:
            finite |= ~before[path].isfinite()
        if not bool(finite.all()):
            return False
    return True


def _like(kept: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> FrozenDict:
    """Return copies of the weights that are kept, in the types in which they are kept."""
    return FrozenDict({name: weights[name].to(tensor.dtype, copy=True) for name, tensor in kept.items()})
