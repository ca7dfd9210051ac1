"""Every kind of schedule that noether ships satisfies the laws of schedules, and so do sound ones of a user."""

from dataclasses import dataclass, replace

import pytest

from noether import At, EveryNEpochs, EveryNSamples, EveryNUpdates, LogText, TrainingIteration, when
from noether.core.schedules.base import OneCounter, Schedule
from noether.core.schedules.window import ALWAYS, Thresholds, Window
from noether.testing import LawError, check_pure, check_schedule


@pytest.mark.parametrize(
    "schedule",
    [
        EveryNEpochs(2),
        EveryNUpdates(3),
        EveryNSamples(7),
        At(TrainingIteration(update=1), TrainingIteration(update=5)),
        At(TrainingIteration(sample=4)),
        At(TrainingIteration(epoch=2)),
        EveryNUpdates(2) | EveryNUpdates(3) | EveryNEpochs(1),
        EveryNSamples(5).starting(TrainingIteration(sample=8)).until(TrainingIteration(sample=31)),
        EveryNSamples(4).starting(TrainingIteration(epoch=1)) | At(TrainingIteration(epoch=1)),
        EveryNEpochs(1).until(TrainingIteration(update=9)) | EveryNSamples(3).until(TrainingIteration(update=5)),
    ],
    ids=str,
)
def test_every_kind_of_schedule_satisfies_the_law(schedule):
    check_schedule(schedule, examples=60)


@dataclass(frozen=True)
class PowersOfTwo(OneCounter):
    """Due at the updates 1, 2, 4, 8, ..."""

    window: Window = ALWAYS
    counter = "update"
    interval = None
    singles = tuple(2**k for k in range(64))

    def thresholds_in(self, low, high):
        return high.bit_length() - low.bit_length()

    def threshold_after(self, value):
        return 1 << value.bit_length()

    def updates_crossing(self, updates, run):
        return updates.bit_length()

    def within(self, window):
        return replace(self, window=window)


@dataclass(frozen=True)
class OftenAtFirst(Schedule):
    n: int

    @property
    def members(self):
        return (EveryNUpdates(1).until(TrainingIteration(update=self.n)) | EveryNEpochs(self.n)).members


def test_a_schedule_of_a_user_satisfies_the_laws():
    check_schedule(PowersOfTwo(), examples=60)
    check_schedule(PowersOfTwo().starting(TrainingIteration(epoch=1)), examples=60)
    check_schedule(OftenAtFirst(3), examples=60)


def test_the_runs_of_a_law_reach_a_schedule_of_a_user():
    say = when(OftenAtFirst(500).starting(TrainingIteration(update=490)))(lambda s, e: (s, (LogText("due"),)))
    check_pure(say, examples=5)


class LateThreshold(PowersOfTwo):
    def threshold_after(self, value):
        return 1 + super().threshold_after(value)


class WithoutLimits(PowersOfTwo):
    def within(self, window):
        return self


class FewSingles(PowersOfTwo):
    singles = (1, 2, 4)


class OwnDue(OftenAtFirst):
    def due(self, previous, iteration):
        return iteration.update % 7 == 0


class OwnNextDue(OftenAtFirst):
    def next_due(self, iteration):
        return Thresholds(update=iteration.update + 50)


class OwnCount(OftenAtFirst):
    def count(self, start, end, run):
        return super().count(start, end, run) + 1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (LateThreshold(), "^LateThreshold is due at .* before its next_due"),
        (
            WithoutLimits(),
            r"^WithoutLimits limited by \w+\(TrainingIteration.* is due at|^WithoutLimits united or limited .* counts",
        ),
        (FewSingles(), r"^FewSingles united or limited to FewSingles \| .* counts"),
        (OwnDue(3), r"^OwnDue U1 \| E3 is( not)? due at .*, but .* of its members is; a gate reads the members"),
        (OwnNextDue(3), "^OwnNextDue .* is due at .* before its next_due"),
        (OwnCount(3), "^OwnCount .* counts"),
    ],
    ids=["threshold_after", "within", "singles", "due", "next_due", "count"],
)
def test_a_faulty_schedule_of_a_user_is_caught(schedule, message):
    with pytest.raises(LawError, match=message):
        check_schedule(schedule)
