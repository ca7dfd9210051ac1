"""Dynamic loss scaling, for a forward pass in float16: `torch.amp.GradScaler` as functions of a state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.tensors.memory import GRAD_SCALER
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import Memory, TrainState
    from noether.core.tensors.losses import Losses
    from noether.training.step.accumulation import Grads

    Objectives = Callable[[Losses], Sequence[Tensor]]

_LARGEST = torch.finfo(torch.float32).max


@final
@dataclass(frozen=True)
class LossScaling:
    """Scales losses before the backward pass, so that small gradients do not become zero in float16.

    The scale grows after `growth_interval` updates in a row whose gradients are finite, and falls after each whose
    gradients are not, which is skipped. Scale and counter are a memory in the state, named `grad_scaler`, with the
    entries of `torch.amp.GradScaler.state_dict()`; results have the bits of `GradScaler`.

    It is also a member of a reducer, which claims the memory.

    Args:
        init_scale: The first scale.
        growth_factor: Multiplies the scale as it grows, above 1.
        backoff_factor: Multiplies the scale as it falls, below 1.
        growth_interval: Updates until the scale grows, >= 1.

    Example:
        >>> from noether import TrainState
        >>> scaling = LossScaling(init_scale=8.0)
        >>> state = scaling.advance(TrainState(), finite=False)
        >>> state.memory("grad_scaler")["scale"]
        4.0
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    produces = ()

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:  # noqa: ARG002  # a callback takes both
        """Return the state as it is."""
        return state, ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:  # noqa: ARG002  # as for every callback
        """Return the first scale."""
        return {
            GRAD_SCALER: FrozenDict(
                scale=self.init_scale,
                growth_factor=self.growth_factor,
                backoff_factor=self.backoff_factor,
                growth_interval=self.growth_interval,
                _growth_tracker=0,
            )
        }

    def _listens(self, event_type: type[Event]) -> bool:  # noqa: ARG002  # see `listens_to`
        return False

    def scale(self, state: TrainState) -> float:
        """Return the scale of the next update of `state`."""
        return float(self._memory(state)["scale"])

    def scale_objectives(self, state: TrainState, objectives: Objectives) -> Objectives:
        """Return `objectives` with every loss scaled."""
        scale = self.scale(state)

        def scale_losses(losses: Losses) -> list[Tensor]:
            # A tensor, as GradScaler has it: a loss in float16 becomes one in float32.
            return [term * torch.tensor(scale, device=term.device) for term in objectives(losses)]

        return scale_losses

    def unscale(self, state: TrainState, grads: Grads) -> Grads:
        """Return gradients of the losses from those of the scaled losses, in their dtypes."""
        # The reciprocal in double precision, rounded once, as GradScaler computes it.
        inverse = float(torch.tensor(1 / self.scale(state), dtype=torch.float64).float())
        return {name: None if grad is None else grad * inverse for name, grad in grads.items()}

    def advance(self, state: TrainState, *, finite: bool) -> TrainState:
        """Return the state with the scale of the next update.

        Args:
            state: The state after the update.
            finite: Whether the gradients of the update were finite.
        """
        memory = self._memory(state)
        scale, tracker = memory["scale"], memory["_growth_tracker"] + 1
        if not finite:
            scale, tracker = _to_single(scale * memory["backoff_factor"]), 0
        elif tracker >= memory["growth_interval"]:
            grown = _to_single(scale * memory["growth_factor"])
            scale, tracker = grown if math.isfinite(grown) else scale, 0
        return state.remember(GRAD_SCALER, FrozenDict({**memory, "scale": scale, "_growth_tracker": tracker}))

    def _memory(self, state: TrainState) -> Mapping[str, Any]:
        memory: Mapping[str, Any] = state.callback_states.get(GRAD_SCALER) or self.init(state)[GRAD_SCALER]
        return memory


def _to_single(scale: float) -> float:
    """Return a scale as the nearest number in single precision."""
    return math.inf if scale > _LARGEST else float(torch.tensor(scale, dtype=torch.float32))


def find_float16_problem(device: torch.device, params: Mapping[str, Tensor]) -> str | None:
    """Return why a model cannot be trained with a forward pass in float16, or None.

    Args:
        device: The device of the run.
        params: The parameters by name.

    Example:
        >>> find_float16_problem(torch.device("cpu"), {"weight": torch.zeros(1, dtype=torch.float16)})
        "the parameter 'weight' is torch.float16, whose gradients cannot be unscaled: keep it in float32"
    """
    half = next((name for name, param in params.items() if param.dtype is torch.float16), None)
    if half is not None:
        return f"the parameter {half!r} is torch.float16, whose gradients cannot be unscaled: keep it in float32"
    if device.type == "meta":
        return None
    try:
        with torch.autocast(device.type, dtype=torch.float16):
            dtype = torch.mm(torch.ones(1, 1, device=device), torch.ones(1, 1, device=device)).dtype
    except RuntimeError as error:
        return f"torch cannot compute in float16 on {device.type} ({str(error).splitlines()[0]}): write bfloat16"
    return None if dtype is torch.float16 else f"torch cannot compute in float16 on {device.type}: write bfloat16"
