"""What happened: facts about a run, with every reading that a callback needs already inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from noether.core.run import Run
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from noether.core.state import TrainState

_NO_RUN: Final = Run()
_EMPTY: Final = FrozenDict()


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """A fact about a run.

    Args:
        run: What is fixed for the whole run.
        time_s: Wall-clock time in seconds since 1970, read by the loop. It may go into effects, never into the state.
    """

    run: Run = _NO_RUN
    time_s: float = 0.0

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """Return the event with some of its own fields: for a loop that makes one at every update.

        Unlike the constructor, it takes any name; setting each field of a frozen dataclass takes five times as long.

        Example:
            >>> AfterUpdate.of(samples=4).samples, AfterUpdate.of(samples=4).skipped
            (4, False)
        """
        event = object.__new__(cls)
        vars(event).update(fields)
        return event

    @property
    def data(self) -> Mapping[str, Any]:
        """What data-iterating callbacks iterate, by dataset key."""
        return self.run.data

    def forward(self, state: TrainState, batch: Any) -> tuple[Mapping[str, torch.Tensor], Any]:
        """Return `(losses, outputs)` of the model with the weights of `state`, in evaluation mode."""
        return self.run.forward(state, batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class BeforeTraining(Event):
    """Training is about to begin.

    Args:
        resumed: Whether it goes on from a saved state; then the state changes only by memory that was missing.
    """

    resumed: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterAccumulationStep(Event):
    """The gradients of one micro-batch are there; the optimizer has not stepped. Logging or saving here is an error.

    Args:
        losses: Mean loss of the micro-batch by name, each 0-dimensional.
        outputs: What the model returned for it.
        samples: Samples in the micro-batch, >= 1.
        accumulation_step: Index of the micro-batch in its update, `0 <= accumulation_step < accumulation_steps`.
        accumulation_steps: Micro-batches of this update, >= 1.
    """

    losses: Mapping[str, torch.Tensor | float] = _EMPTY
    outputs: Any = None
    samples: int = 0
    accumulation_step: int = 0
    accumulation_steps: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterUpdate(Event):
    """One optimizer update is completed and counted.

    Args:
        samples: Samples of the update, over accumulation steps and ranks, >= 1.
        losses: Sample-weighted mean loss by name over accumulation steps and ranks, each 0-dimensional.
        outputs: What the model returned, one entry per accumulation step.
        accumulated: Samples of each accumulation step, one entry for each of `outputs`.
        lr: Learning rate of the update by parameter group.
        weight_decay: Weight decay of the update by parameter group.
        grad_norm: 2-norm of the gradients before they are clipped, where the step measured it.
        finite: Whether losses and gradients were finite, as far as `trainer.nonfinite` has the step look; None where it
            did not look, for no callback names it among its `readings`.
        skipped: Whether the update was left out as non-finite; callbacks that average do not count it.
        duration_s: Seconds since the previous update ended, or since training began; callbacks included.
        data_s: Seconds of it spent waiting for data; None where the loop does not tell.
        step_s: Seconds of it spent in the step; likewise.
        forward_s: Seconds of that in forward passes, losses included; None where the step does not tell.
        backward_s: Seconds in backward passes; likewise.
        optimizer_s: Seconds in the optimizer, clipping included; likewise.
    """

    samples: int = 0
    losses: Mapping[str, torch.Tensor | float] = _EMPTY
    outputs: Any = None
    accumulated: tuple[int, ...] = ()
    lr: Mapping[str, float] = _EMPTY
    weight_decay: Mapping[str, float] = _EMPTY
    grad_norm: torch.Tensor | float | None = None
    finite: torch.Tensor | bool | None = True
    skipped: bool = False
    duration_s: float = 0.0
    data_s: float | None = None
    step_s: float | None = None
    forward_s: float | None = None
    backward_s: float | None = None
    optimizer_s: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterEpoch(Event):
    """An epoch is completed and counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterTraining(Event):
    """Training is over: its end was reached, or `state.stop` gives the reason."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AtEval(Event):
    """An evaluation outside of training was asked for: data iterators run, whatever their schedule."""


EVENTS: Final = (BeforeTraining, AfterAccumulationStep, AfterUpdate, AfterEpoch, AfterTraining, AtEval)
