"""The position of a learning-rate scheduler of torch, as a memory in the state."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.event import AfterUpdate, Event
from noether.core.packing import pack, unpack
from noether.core.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim.lr_scheduler import LRScheduler

    from noether.core.callback import Effects
    from noether.core.state import Memory, TrainState

MEMORY: Final = "lr_scheduler"


@final
class SchedulerMemory:
    """A member of a reducer that keeps the position of a live scheduler in the state, so that a checkpoint holds it.

    What of its `state_dict` no checkpoint can hold, such as a table with numbers for keys, is taken for a setting: a
    resumed run has it from the scheduler that is made anew.

    Args:
        scheduler: It has been stepped by the time an update is told.
    """

    produces: tuple[str, ...] = ()

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = scheduler

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state that remembers where the scheduler is."""
        return (state.remember(MEMORY, self._position()), ()) if isinstance(event, AfterUpdate) else (state, ())

    def init(self, state: TrainState) -> Mapping[str, Memory]:  # as every callback's
        """Return where the scheduler begins."""
        return {MEMORY: self._position()}

    def listens(self, event_type: type[Event]) -> bool:
        """Return whether it does anything on events of this type."""
        return event_type is AfterUpdate

    def due(self, event_type: type[Event], state: TrainState) -> bool:  # as every callback's
        """Return that no reading is needed for it."""
        return False

    def restore(self, state: TrainState) -> None:
        """Write the position that a state remembers into the scheduler."""
        if MEMORY in state.callback_states:
            self._scheduler.load_state_dict({**self._scheduler.state_dict(), **unpack(state.memory(MEMORY))})

    def _position(self) -> FrozenDict:
        return FrozenDict(_packed(self._scheduler.state_dict()))


def _packed(entries: Mapping[str, Any]) -> dict[str, Any]:
    packed = {}
    for name, value in entries.items():
        with suppress(TypeError):  # a setting
            packed[name] = pack(name, value)
    return packed
