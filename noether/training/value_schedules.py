"""Learning rate and weight decay as pure functions of the number of completed updates.

A value schedule is a frozen dataclass called with a position, the number of updates completed so far: update u uses
`schedule(u - 1)`. Every schedule has its first value exactly at position 0 and its last value exactly at the position
`updates` and after. The last update of a run comes one position earlier and uses the value before the last, as with
torch's schedulers, timm, optax and Hugging Face. Nothing accumulates, so positions may come in any order and a resumed
run has nothing to restore.

The schedules in `noether.core.schedules` are different: they say when a callback fires.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from noether.config.optimizer_settings import call_factor
from noether.core.errors import Problem, check_whole, raise_problems

if TYPE_CHECKING:
    from noether.config.optimizer_settings import ScheduleSettings

ValueSchedule = Callable[[int], float]
"""A pure function from the number of completed updates to the value that the next update uses."""


def value_schedule(
    base: float, settings: ScheduleSettings, *, total_updates: int, updates_per_epoch: int
) -> ValueSchedule:
    """Return the schedule that `settings` describe for a hyperparameter with the base value `base`.

    A warm-up is part of the length: the schedule after it takes `settings.length`, or else `total_updates`, minus the
    warm-up. Milestones count from the start of the run, warm-up included, as in Goyal et al. 2017.

    Args:
        base: The value that the factors in `settings` multiply.
        settings: Kind, warm-up and end of the schedule.
        total_updates: Number of updates of the whole run, at least 1.
        updates_per_epoch: Number of updates of one epoch, at least 1; converts settings in epochs.

    Raises:
        SettingsError: If a count is not at least 1, the warm-up takes the whole length, or a milestone lies in the
            warm-up.

    Example:
        >>> from noether.config.optimizer_settings import ScheduleSettings
        >>> settings = ScheduleSettings(kind="cosine", warmup_updates=2)
        >>> lr = value_schedule(0.1, settings, total_updates=6, updates_per_epoch=3)
        >>> [round(lr(update), 4) for update in range(7)]
        [0.0, 0.05, 0.1, 0.0854, 0.05, 0.0146, 0.0]
    """
    raise_problems([check_whole("total_updates", total_updates), check_whole("updates_per_epoch", updates_per_epoch)])
    warmup = settings.warmup_updates + settings.warmup_epochs * updates_per_epoch
    after = _after_warmup(base, settings, warmup, total_updates, updates_per_epoch)
    if not warmup:
        return after
    return Warmup(start=base * _or(settings.warmup_start_factor, 0.0), updates=warmup, after=after)


@final
@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same value at every position.

    Example:
        >>> Constant(value=0.1)(1000)
        0.1
    """

    value: float

    def __call__(self, position: int) -> float:  # noqa: ARG002  # the signature of a value schedule
        """Return the value at `position`."""
        return self.value


@final
@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear from `start` to `end`; torch's `LinearLR`.

    Args:
        start: Value at position 0.
        end: Value at position `updates` and after.
        updates: Length in updates, at least 1.

    Example:
        >>> [Linear(start=1.0, end=0.0, updates=4)(position) for position in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    start: float
    end: float
    updates: int

    def __call__(self, position: int) -> float:
        """Return the value at `position`."""
        return _interpolate(self.end, self.start, _share_left(position, self.updates))


@final
@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From `start` to `end` on half a cosine, without restarts; torch's `CosineAnnealingLR`.

    Equation 5 of Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017. Unlike
    torch's, it stays at `end` after its last update instead of rising again.

    Args:
        start: Value at position 0.
        end: Value at position `updates` and after.
        updates: Length in updates, at least 1.

    Example:
        >>> [round(Cosine(start=1.0, end=0.0, updates=4)(position), 4) for position in range(6)]
        [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """

    start: float
    end: float
    updates: int

    def __call__(self, position: int) -> float:
        """Return the value at `position`."""
        done = 1.0 - _share_left(position, self.updates)
        return _interpolate(self.end, self.start, 0.5 * (1.0 + math.cos(math.pi * done)))


@final
@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """From `start` to `end` as a power of the share of updates left; torch's `PolynomialLR`.

    Args:
        start: Value at position 0.
        end: Value at position `updates` and after.
        updates: Length in updates, at least 1.
        power: Exponent, above 0; 1 is `Linear`.

    Example:
        >>> [Polynomial(start=1.0, end=0.0, updates=4, power=2.0)(position) for position in range(6)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """

    start: float
    end: float
    updates: int
    power: float = 1.0

    def __call__(self, position: int) -> float:
        """Return the value at `position`."""
        return _interpolate(self.end, self.start, _share_left(position, self.updates) ** self.power)


@final
@dataclass(frozen=True, kw_only=True)
class StepDecay:
    """`start`, multiplied by `gamma` at every milestone; torch's `MultiStepLR`.

    Args:
        start: Value before the first milestone.
        milestones: Positions, increasing; the update after milestone m uses the smaller value.
        gamma: Factor at each milestone, above 0.

    Example:
        >>> [StepDecay(start=1.0, milestones=(2, 4), gamma=0.5)(position) for position in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    start: float
    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __call__(self, position: int) -> float:
        """Return the value at `position`."""
        return float(self.start * self.gamma ** bisect_right(self.milestones, position))


@final
@dataclass(frozen=True, kw_only=True)
class Custom:
    """A base value times a function of progress, the share of the updates that are completed.

    Args:
        base: Value at factor 1.
        factor: Pure function from progress, in [0, 1], to a finite factor >= 0.
        updates: Length in updates, at least 1; after it the progress stays 1.
        label: Name of the function in messages.

    Raises:
        InvalidValueError: In a call, if the function returns something else.

    Example:
        >>> [Custom(base=0.1, factor=lambda progress: 1 - progress, updates=4)(position) for position in (0, 2, 4, 9)]
        [0.1, 0.05, 0.0, 0.0]
    """

    base: float
    factor: Callable[[float], float]
    updates: int
    label: str = "the function of progress"

    def __call__(self, position: int) -> float:
        """Return the value at `position`."""
        progress = min(position, self.updates) / self.updates
        return self.base * call_factor(self.factor, progress, self.label)


@final
@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Linear from `start` to the first value of another schedule, then that schedule; torch's `SequentialLR`.

    Gradual warm-up as in Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.2. With `start` 0 the first
    update uses the value 0, as with Hugging Face's, timm's and optax's warm-ups.

    Args:
        start: Value at position 0.
        updates: Length in updates, at least 1.
        after: Schedule that begins at position `updates`, at its own position 0.

    Example:
        >>> [Warmup(start=0.0, updates=2, after=Constant(value=1.0))(position) for position in range(4)]
        [0.0, 0.5, 1.0, 1.0]
    """

    start: float
    updates: int
    after: ValueSchedule

    def __call__(self, position: int) -> float:
        """Return the value at `position`."""
        if position >= self.updates:
            return self.after(position - self.updates)
        return Linear(start=self.start, end=self.after(0), updates=self.updates)(position)


def _after_warmup(
    base: float, settings: ScheduleSettings, warmup: int, total_updates: int, updates_per_epoch: int
) -> ValueSchedule:
    if settings.kind == "constant":
        return Constant(value=base)
    if settings.kind == "step":
        milestones = settings.milestone_updates or tuple(e * updates_per_epoch for e in settings.milestone_epochs)
        if milestones[0] <= warmup:
            setting = "milestone_updates" if settings.milestone_updates else "milestone_epochs"
            message = f"the first one, at update {milestones[0]}, lies in the warm-up of {warmup} updates"
            raise_problems([Problem(setting, message)])
        return StepDecay(start=base, milestones=tuple(m - warmup for m in milestones), gamma=_or(settings.gamma, 0.1))
    length = total_updates if settings.length is None else settings.length
    updates = length - warmup
    if updates < 1:
        setting = "warmup_epochs" if settings.warmup_epochs else "warmup_updates"
        raise_problems(
            [
                Problem(
                    setting,
                    f"a warm-up of {warmup} updates takes all {length}, leaving none for {settings.label}: shorten it, "
                    f"or {'train longer' if settings.length is None else 'increase length'}",
                )
            ]
        )
    if settings.factor is not None:
        return Custom(base=base, factor=settings.factor, updates=updates, label=settings.label)
    end = base * _or(settings.end_factor, 0.0)
    if settings.kind == "linear":
        return Linear(start=base, end=end, updates=updates)
    if settings.kind == "cosine":
        return Cosine(start=base, end=end, updates=updates)
    return Polynomial(start=base, end=end, updates=updates, power=_or(settings.power, 1.0))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _share_left(position: int, updates: int) -> float:
    """Return the share of `updates` that remains at `position`: 1 at the start, 0 at the end and after."""
    return max(0, updates - position) / updates


def _interpolate(low: float, high: float, share: float) -> float:
    # Two products, because `low + (high - low) * share` rounds to a value other than `high` at share 1.
    return low * (1.0 - share) + high * share
