"""What a live object of a loop remembers, such as a scheduler, as a memory in the state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from noether.core.deferred_calls import DeferredCalls
from noether.core.event import AfterUpdate, Event
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.callback import Effects
    from noether.core.state import Memory, TrainState
    from noether.core.stretch import CompletedUpdate


class LiveMemory(ABC):
    """A member of a reducer that keeps in the state what a live object remembers, so that a checkpoint holds it.

    Args:
        memory_name: Name of the memory.
        defers_updates: Whether updates may be deferred; the loop then calls `note` after each deferred update.
    """

    produces: tuple[str, ...] = ()

    def __init__(self, memory_name: str, *, defers_updates: bool) -> None:
        self._memory_name, self._defers_updates = memory_name, defers_updates
        self._noted: Any = FrozenDict()

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state with what the object remembers now."""
        if not isinstance(event, AfterUpdate):
            return state, ()
        self.note()
        return self._remember(state), ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:  # noqa: ARG002  # as for every callback
        """Return what the object remembers at the start."""
        return {self._memory_name: self._read()}

    def note_from(self, state: TrainState) -> None:
        """Note what a state remembers of the object; if it has no such memory, note what the object remembers."""
        self._noted = state.callback_states.get(self._memory_name, self._read())

    def note(self) -> None:
        """Note what the object remembers after an update; if the update is deferred, the state gets it later."""
        self._noted = self._read()

    @abstractmethod
    def _read(self) -> FrozenDict:
        """Return what the object remembers, as memory that a checkpoint can hold."""

    def _remember(self, state: TrainState) -> TrainState:
        return state.remember(self._memory_name, self._noted)

    def _listens(self, event_type: type[Event]) -> bool:
        return issubclass(event_type, AfterUpdate)

    def _remember_after(self, state: TrainState, _: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        return self._remember(state), ()

    @property
    def _deferred_calls(self) -> DeferredCalls:
        return DeferredCalls(fire=self._remember_after if self._defers_updates else None)
