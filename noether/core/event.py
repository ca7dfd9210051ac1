"""Events: facts about a run, with all their readings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from noether.core.errors import Problem, raise_problems, suggest
from noether.core.event_fields import check_fields, separate_means
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
        run: The constants of the run.
        time_s: Wall-clock time in seconds since 1970, as the loop read it. It may enter effects, never the state.

    Raises:
        SettingsError: If a field is not what the event documents, with its value and what to write instead.
    """

    run: Run = _NO_RUN
    time_s: float = 0.0

    def __post_init__(self) -> None:
        vars(self).update(separate_means(type(self), vars(self)))
        check_fields(type(self), vars(self))

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """Return the event with these fields; it takes a fifth of the constructor's time, as no value is checked.

        It is for loops that compute the fields themselves and dispatch an event at every update.

        Raises:
            TypeError: If there is no such field, naming the nearest; not checked under `python -O`.

        Example:
            >>> AfterUpdate.of(samples=4).samples, AfterUpdate.of(samples=4).skipped
            (4, False)
        """
        if __debug__ and not fields.keys() <= cls.__dataclass_fields__.keys():
            raise TypeError(_unknown_field(cls, fields))
        event = object.__new__(cls)
        vars(event).update(fields)
        return event

    @property
    def data(self) -> Mapping[str, Any]:
        """The datasets for data-iterating callbacks, by key; to iterate one yields all its batches, on every rank."""
        return self.run.data

    def replace(self, **changes: Any) -> Self:
        """Return the event with some fields changed.

        Raises:
            TypeError: As for `of`.
            SettingsError: As for the constructor.

        Example:
            >>> AfterUpdate(samples=4).replace(duration_s=0.5).samples
            4
        """
        changes |= separate_means(type(self), changes)
        check_fields(type(self), changes)
        event = object.__new__(type(self))
        vars(event).update(vars(self))
        return event.complete(**changes)

    def complete(self, **fields: Any) -> Self:
        """Set the fields that the loop knows in the event of a step, which nothing else has seen yet, and return it.

        Like `of`, it checks no value.

        Raises:
            TypeError: As for `of`.

        Example:
            >>> AfterUpdate.of(samples=4).complete(duration_s=0.5).samples
            4
        """
        if __debug__ and not fields.keys() <= self.__dataclass_fields__.keys():
            raise TypeError(_unknown_field(type(self), fields))
        vars(self).update(fields)
        return self

    def forward(self, state: TrainState, batch: Any) -> tuple[Mapping[str, torch.Tensor], Any]:
        """Return `(losses, outputs)` of the model with the weights of `state`, in evaluation mode."""
        return self.run.forward(state, batch)


def _unknown_field(event_type: type[Event], fields: Mapping[str, Any]) -> str:
    known = event_type.__dataclass_fields__
    name = next(name for name in fields if name not in known)
    return f"{event_type.__name__} has no field {name!r}; it has {', '.join(known)}{suggest(name, known)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class BeforeTraining(Event):
    """Training is about to begin.

    Args:
        resumed: Whether the run resumes from a saved state; then only missing memory may be added to the state.
    """

    resumed: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterAccumulationStep(Event):
    """The gradients of one micro-batch are computed; the optimizer has not stepped. Logging or saving here is an error.

    On several ranks, noether's trainer dispatches on each rank the events of the micro-batches of all ranks, in their
    order, after all gradients are computed; if a callback listens, that takes an exchange in each update.

    Args:
        losses: Mean loss of the micro-batch by name, each 0-dimensional.
        outputs: The model's output for it; None on several ranks, as only one rank has it.
        samples: Samples in the micro-batch, >= 1.
        accumulation_step: Index of the micro-batch in its update, `0 <= accumulation_step < accumulation_steps`.
        accumulation_steps: Micro-batches of this update, >= 1.
    """

    losses: Mapping[str, torch.Tensor | float] = _EMPTY
    outputs: Any = None
    samples: int = 0
    accumulation_step: int = 0
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulation_step >= self.accumulation_steps:
            message = (
                f"{self.accumulation_step} is not less than accumulation_steps, which is {self.accumulation_steps}"
            )
            raise_problems([Problem("AfterAccumulationStep.accumulation_step", message)])


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterUpdate(Event):
    """One optimizer update is completed and counted.

    Args:
        samples: Samples of the update, over accumulation steps and ranks; 0 if all its micro-batches were empty.
        losses: Mean of each loss by name over the accumulation steps and ranks that have it, each 0-dimensional,
            weighted by samples or by `loss_weights`; `total` is their sum. A loop may give a loss as
            `Mean(loss, weight=n)`: then n is its entry in `loss_weights`, and with weight 0 it is left out.
        loss_weights: Sum of the weights of each loss that has other weights than `samples`; usually empty.
        outputs: The model's outputs, one entry per accumulation step of this rank, which may have none. On several
            ranks, a callback that remembers or logs something made of them combines that by `run.gather`.
        accumulated: Samples of each accumulation step, one entry for each of `outputs`; empty micro-batches have none.
        lr: Learning rate of the update by parameter group.
        weight_decay: Weight decay of the update by parameter group.
        grad_norm: 2-norm of the gradients before clipping; None if the step did not measure it.
        gradients: The gradients by name of parameter, of all ranks, unscaled and before clipping. They are dense copies
            to which nothing writes, and DTensors where the parameters are; parameters without one are left out. None if
            the step did not copy them, and in an update that was skipped.
        finite: Whether the losses (with `trainer.nonfinite: skip` or `raise` also the gradients) were finite; None if
            the step did not check.
        skipped: Whether the update was skipped, because it was not finite or had no samples; callbacks that average
            leave it out.
        duration_s: Seconds since the previous update ended, or since training began; callbacks included. On several
            ranks, all seconds are those of rank 0, from one reduction of gradients to the next.
        data_s: Seconds of `duration_s` spent waiting for data; None if the loop does not measure it.
        step_s: Seconds of `duration_s` spent in the step, likewise.
        forward_s: Seconds of `step_s` in forward passes and losses; None if the step does not measure it.
        backward_s: Seconds in backward passes, likewise.
        optimizer_s: Seconds in the optimizer, clipping included, likewise.

    Example:
        >>> from noether import Mean
        >>> event = AfterUpdate(samples=4, losses={"ce": Mean(0.5, weight=120), "l1": 0.25})
        >>> event.losses, event.loss_weights
        (FrozenDict({'ce': 0.5, 'l1': 0.25}), {'ce': 120})
    """

    samples: int = 0
    losses: Mapping[str, torch.Tensor | float] = _EMPTY
    loss_weights: Mapping[str, float] = _EMPTY
    outputs: Any = None
    accumulated: tuple[int, ...] = ()
    lr: Mapping[str, float] = _EMPTY
    weight_decay: Mapping[str, float] = _EMPTY
    grad_norm: torch.Tensor | float | None = None
    gradients: Mapping[str, torch.Tensor] | None = None
    finite: torch.Tensor | bool | None = True
    skipped: bool = False
    duration_s: float = 0.0
    data_s: float | None = None
    step_s: float | None = None
    forward_s: float | None = None
    backward_s: float | None = None
    optimizer_s: float | None = None


class Reading(NamedTuple):
    """A costly field of `AfterUpdate`: a loop computes it only where a callback declares it in `readings`.

    Args:
        name: Name of the field.
        type: Its type, as `AfterUpdate` annotates it.
        cost: What computing it costs at each update.
        computed_by: Where it is computed.
    """

    name: str
    type: str
    cost: str
    computed_by: str


_COSTS: Final = {
    "grad_norm": (
        "one pass over all gradients, unless they are clipped by it anyway",
        "the step, before it clips them",
    ),
    "gradients": (
        "one copy of all gradients; the trainer makes it only for an event that such a callback gets",
        "the step, before it clips them",
    ),
    "finite": ("one operation on the total loss", "the step; with `trainer.nonfinite: skip` or `raise` in any case"),
    "forward_s": ("one reading of a clock per accumulation step", "the step"),
    "backward_s": ("one reading of a clock per accumulation step", "the step"),
    "optimizer_s": ("one reading of a clock", "the step"),
}

READINGS: Final = {
    name: Reading(name, str(AfterUpdate.__dataclass_fields__[name].type), *costs) for name, costs in _COSTS.items()
}
"""Every reading that a callback can declare, by name."""


def check_reading(label: str, name: str) -> Problem | None:
    """Return the problem of a reading that a callback declares, or None.

    Args:
        label: Name of the callback.
        name: The name that it declares.

    Example:
        >>> print(check_reading("Clip", "gradnorm"))
        Clip declares the unknown reading 'gradnorm'; readings: grad_norm, gradients, ...; did you mean 'grad_norm'?
    """
    if name in READINGS:
        return None
    known = ", ".join(READINGS)
    return Problem("", f"{label} declares the unknown reading {name!r}; readings: {known}{suggest(name, READINGS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterEpoch(Event):
    """An epoch is completed and counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterTraining(Event):
    """Training is over: the run reached its end, or `state.stop` gives the reason."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AtEval(Event):
    """Standalone evaluation: data-iterating callbacks run, whatever their schedule."""


EVENTS: Final = (BeforeTraining, AfterAccumulationStep, AfterUpdate, AfterEpoch, AfterTraining, AtEval)
"""Every kind of event that a loop dispatches."""


_KINDS: Final[dict[type[Event], type[Event]]] = {each: each for each in EVENTS}


def kind_of(event_type: type[Event]) -> type[Event]:
    """Return which of `EVENTS` a type of event is: itself, or the one that it derives from.

    A loop of the user's own may dispatch a subclass with more fields; schedules and hooks treat it as its base. A type
    that derives from none of `EVENTS` is a kind by itself.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True, eq=False)
        ... class AfterSearch(AfterUpdate):
        ...     temperature: float = 0.0
        >>> kind_of(AfterSearch).__name__, kind_of(AfterEpoch).__name__
        ('AfterUpdate', 'AfterEpoch')
    """
    kind = _KINDS.get(event_type)
    if kind is None:
        kind = _KINDS[event_type] = next((each for each in event_type.__mro__ if each in EVENTS), event_type)
    return kind
