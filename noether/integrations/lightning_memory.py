"""What the loop and the callbacks of Lightning remember, as memories in the state, so that a checkpoint holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from lightning.pytorch.callbacks import BaseFinetuning

from noether.core.event import AfterUpdate
from noether.core.tensors.tree import FrozenDict, freeze, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import Trainer

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import TrainState

STEPS: Final = "lightning_steps"
_FINETUNING: Final = "lightning_finetuning"
_GROUPS: Final = "internal_optimizer_metadata"  # a load of the optimizer adds the groups


@final
class StepCount:
    """A member of a reducer that remembers how many steps Lightning counts, where an update may have several."""

    produces: tuple[str, ...] = ()

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state that remembers the number."""
        return (state.remember(STEPS, self._read()), ()) if isinstance(event, AfterUpdate) else (state, ())

    def init(self, state: TrainState) -> Mapping[str, Any]:
        """Return the number at the start."""
        return {STEPS: self._read()}

    def _read(self) -> FrozenDict:
        return FrozenDict(steps=int(self._trainer.global_step))


@final
class FinetuningMemory:
    """A member of a reducer that remembers the `state_dict` of Lightning's finetuning callbacks, without the groups.

    `BackboneFinetuning` keeps there the learning rate that it gave the backbone, from which it computes the next one.

    Args:
        trainer: The trainer.
    """

    produces: tuple[str, ...] = ()

    def __init__(self, trainer: Trainer) -> None:
        self._callbacks = {
            each.state_key: each
            for each in trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it late
            if isinstance(each, BaseFinetuning)
        }

    def __bool__(self) -> bool:
        """Return whether there is such a callback."""
        return bool(self._callbacks)

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state that remembers what they keep now."""
        return (state.remember(_FINETUNING, self._read()), ()) if isinstance(event, AfterUpdate) else (state, ())

    def init(self, state: TrainState) -> Mapping[str, Any]:
        """Return what they keep at the start."""
        return {_FINETUNING: self._read()}

    def restore(self, state: TrainState) -> None:
        """Give each callback what a state remembers of it."""
        for key, saved in state.callback_states.get(_FINETUNING, {}).items():
            callback = self._callbacks.get(key)
            if callback is not None and saved:
                callback.load_state_dict({**callback.state_dict(), **unpack(saved)})
                callback._restarting = False  # noqa: SLF001  # else the next fit would get the groups of this one

    def _read(self) -> FrozenDict:
        kept = {
            key: {name: value for name, value in callback.state_dict().items() if name != _GROUPS}
            for key, callback in self._callbacks.items()
        }
        frozen: FrozenDict = freeze(pack("the state of Lightning's finetuning", kept))
        return frozen
