"""The position of a scheduler goes through a checkpoint and back."""

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from noether import AfterUpdate, SaveCheckpoint, TrainState
from noether.effects import CheckpointStore
from noether.session.scheduler import SchedulerMemory
from noether.testing import assert_same

STEPS = 12


def warm_up(sgd):
    return schedules.SequentialLR(
        sgd, [schedules.LinearLR(sgd, total_iters=3), schedules.MultiStepLR(sgd, [2, 4])], milestones=[3]
    )


SCHEDULES = {
    "multi step": lambda sgd: schedules.MultiStepLR(sgd, [3, 6], gamma=0.5),
    "one in another": warm_up,
    "chained": lambda sgd: schedules.ChainedScheduler([schedules.StepLR(sgd, 3), schedules.ExponentialLR(sgd, 0.9)]),
    "one cycle": lambda sgd: schedules.OneCycleLR(sgd, max_lr=1.0, total_steps=2 * STEPS),
    "restarts": lambda sgd: schedules.CosineAnnealingWarmRestarts(sgd, T_0=2, T_mult=2),
    "a function": lambda sgd: schedules.LambdaLR(sgd, lambda update: 1 / (1 + update)),
}


def make(kind):
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5, momentum=0.5)
    return sgd, SCHEDULES[kind](sgd)


def step(sgd, scheduler, count):
    rates = []
    for _ in range(count):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return rates


# SequentialLR calls its members in a way that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_scheduler_resumes_from_a_checkpoint(kind, cut, tmp_path):
    expected = step(*make(kind), STEPS)
    sgd, scheduler = make(kind)
    step(sgd, scheduler, cut)
    state, _ = SchedulerMemory(scheduler)(TrainState().advance(samples=1), AfterUpdate(samples=1))
    store = CheckpointStore(tmp_path, "run")
    store.save(SaveCheckpoint(), state, AfterUpdate(samples=1))
    again, second = make(kind)
    again.load_state_dict(sgd.state_dict())  # the optimizer's own memory holds its learning rate
    SchedulerMemory(second).restore(store.load(store.newest()))
    assert_same(step(again, second, STEPS - cut), expected[cut:])
