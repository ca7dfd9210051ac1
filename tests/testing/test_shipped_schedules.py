"""Every kind of schedule that noether ships satisfies the law of schedules."""

import pytest

from noether import At, EveryNEpochs, EveryNSamples, EveryNUpdates, TrainingIteration
from noether.testing import check_schedule


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
