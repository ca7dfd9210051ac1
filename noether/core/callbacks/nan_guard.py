"""What happens when updates are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, final

import torch

from noether.core.averages import memory_of, weights_in
from noether.core.callbacks.improvement import NONFINITE
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import Effect, LogText
from noether.core.errors import one_of, whole
from noether.core.metrics import is_current, log
from noether.core.tree import FrozenDict, map_leaves, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.errors import Problem
    from noether.core.event import AfterUpdate, Event
    from noether.core.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class NanGuardCallback(PeriodicCallback):
    """Counts updates that are not finite, and after some in a row stops training or goes back to a snapshot.

    At every such update it logs `nonfinite`, how many there were in a row; what watches a metric for its best takes
    none from there, so it is listed before them. A snapshot holds params, buffers and optimizer memory; it is taken
    before training, and at the interval where the update and all of that is finite. After a rollback counters, metrics
    and the memory of callbacks go on, so that the next batch is a new one; an average of the weights that is no longer
    finite begins anew.

    What counts is what the step reports: with `trainer.nonfinite: apply` the loss, with `skip` the gradients too, and
    nothing of such an update is applied. `skip` goes best with this callback.

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
        yield whole("tolerance", self.tolerance)
        yield one_of("action", self.action, ("stop", "rollback"))
        yield whole("max_rollbacks", self.max_rollbacks)

    @property
    def produces(self) -> tuple[str, ...]:
        """How many updates in a row were not finite, where one was not."""
        return (NONFINITE,)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return no such update yet, and with `rollback` a snapshot."""
        snapshot = _snapshot(state) if self.action == "rollback" else None
        return {self.name: FrozenDict(in_row=0, rollbacks=0, snapshot=snapshot, taken=str(state.iteration))}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Count, and act."""
        memory = self.memory(state)
        if bool(event.finite) and not event.skipped:
            counted = state if not memory["in_row"] else state.remember(self.name, memory | {"in_row": 0})
            return counted, ()
        in_row = memory["in_row"] + 1
        state, effects = log(state.remember(self.name, memory | {"in_row": in_row}), event, {NONFINITE: in_row})
        if in_row < self.tolerance:
            return state, effects
        state, asked = self._acted(state)
        return state, (*effects, *asked)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Take a snapshot, where all of it is finite."""
        memory = self.memory(state)
        if self.action != "rollback" or is_current(state, NONFINITE) or not _is_finite(_weights(state)):
            return state, ()
        taken = memory | {"snapshot": _snapshot(state), "taken": str(state.iteration)}
        return state.remember(self.name, taken), ()

    def _acted(self, state: TrainState) -> tuple[TrainState, tuple[Effect, ...]]:
        if state.stop is not None:
            return state, ()
        memory = self.memory(state)
        reason = f"{memory['in_row']} updates in a row were not finite"
        if self.action == "rollback" and memory["rollbacks"] < self.max_rollbacks:
            back = state.replace(**_cloned(memory["snapshot"])).remember(
                self.name, memory | {"in_row": 0, "rollbacks": memory["rollbacks"] + 1}
            )
            return _averages_mended(back), (LogText(f"{reason}: back to the weights of {memory['taken']}"),)
        if self.action == "rollback":
            reason = f"{reason}, after {memory['rollbacks']} rollbacks"
        return state.stopped(reason), (LogText(f"stopping: {reason}"),)


_WEIGHTS: Final = ("params", "buffers", "opt_state")


def _weights(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _WEIGHTS}


def _snapshot(state: TrainState) -> FrozenDict:
    return FrozenDict({name: _cloned(tree) for name, tree in _weights(state).items()})


def _cloned(tree: Any) -> Any:
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _is_finite(tree: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for _, tensor in tensors(tree))


def _averages_mended(state: TrainState) -> TrainState:
    """Return the state in which averages that the bad updates destroyed begin anew at the weights."""
    for weights in weights_in(state):
        kept = state.callback_states[memory_of(weights)]
        if not _is_finite(kept):
            anew = {what: _like(kept[what], getattr(state, what)) for what in ("params", "buffers")}
            state = state.remember(memory_of(weights), anew)
    return state


def _like(kept: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> FrozenDict:
    """Return copies of the tensors that are kept, in the types in which they are kept."""
    return FrozenDict({name: tensors[name].to(tensor.dtype, copy=True) for name, tensor in kept.items()})
