"""The scale of a `torch.amp.GradScaler`, as a memory in the state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from noether.core.tensors.memory import GRAD_SCALER
from noether.core.tensors.tree import FrozenDict, freeze, pack, unpack
from noether.session.errors import SessionError
from noether.session.live_memory import LiveMemory
from noether.session.loader import warn

if TYPE_CHECKING:
    from noether.core.state import TrainState


@final
class ScalerMemory(LiveMemory):
    """A member of a reducer that keeps the scale of a live gradient scaler in the state, so that a checkpoint holds it.

    A `Session` takes the scaler itself. In a loop that calls `dispatch`, `memory = ScalerMemory(scaler)` is the first
    callback, and `memory.restore(state)` follows `TrainState.from_module(..., saved=state)`.

    Args:
        scaler: The scaler. Call its `update` before an update is reported.
        defers_updates: As for `LiveMemory`.

    Example:
        >>> import torch
        >>> from noether import TrainState
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        >>> memory = ScalerMemory(scaler).init(TrainState())["grad_scaler"]
        >>> memory["scale"], memory["growth_interval"]
        (8.0, 2)
    """

    def __init__(self, scaler: Any, *, defers_updates: bool = False) -> None:
        self._scaler = scaler
        super().__init__(GRAD_SCALER, defers_updates=defers_updates)

    def restore(self, state: TrainState) -> None:
        """Write the scale that a state remembers into the scaler.

        Raises:
            SessionError: If the scaler was disabled where the state was saved, and is not now, or the other way round.
        """
        saved = state.callback_states.get(GRAD_SCALER)
        if saved is None:
            warn(
                f"the saved run at {state.iteration} has no scale of a gradient scaler, so it begins again at "
                f"{self._scaler.get_scale()}: a resumed run may skip other updates"
            )
            return
        if bool(saved) != self._scaler.is_enabled():
            was, now = ("enabled", "disabled") if saved else ("disabled", "enabled")
            raise SessionError(
                f"the gradient scaler was {was} in the saved run, and is {now}: make it with enabled={bool(saved)}"
            )
        if saved:
            self._scaler.load_state_dict(unpack(saved))

    def is_current(self) -> bool:
        """Return whether the scaler was not updated since its scale was noted."""
        return bool(self._read() == self._noted)

    def has_lowered(self) -> bool:
        """Return whether the scale is lower than the one that was noted: gradients were not finite."""
        before = self._noted.get("scale")
        return before is not None and bool(self._scaler.get_scale() < before)

    def _read(self) -> FrozenDict:
        packed: FrozenDict = freeze(pack("the gradient scaler", self._scaler.state_dict()))
        return packed
