"""Schedules of the learning rate and the weight decay that are functions of the user's."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import CALLBACKS, MODULE, make_config

import noether
from noether.config import ConfigError, load
from noether.config.errors import InvalidValueError
from noether.config.loading import from_source
from noether.config.optimizer_settings import ScheduleSettings, call_factor
from noether.config.serialization import dump, resolve_config
from noether.config.values import source_from_values
from noether.core.errors import SettingsError
from noether.planning.plan import make_plan
from noether.training.value_schedules import Cosine, Linear, Polynomial, value_schedule

FUNCTIONS = """
import functools

def halves(progress): return 0.5 ** int(progress * 2)
def steps(progress, *, times: int = 2, gamma: float = 0.5): return gamma ** int(progress * times)
def needs(progress, power: float): return (1 - progress) ** power
class Steps:
    def __init__(self, times: int): self.times = times
    def __call__(self, progress): return 0.5 ** int(progress * self.times)
quarters = functools.partial(steps, times=4)
def negative(progress): return 0.5 - progress
def infinite(progress): return 1 / (1 - progress)
def text(progress): return "0.5"
def none(progress): ...
def nothing(): return 1.0
def long(progress, length: int = 3): return 1.0
def thirds(progress): return -1.0 if 0.2 < progress < 0.3 else 1.0
"""
LR = {"kind": f"{CALLBACKS}.LrCallback", "every_n_updates": 1}


@pytest.fixture
def tiny(tiny_module):
    Path("tiny.py").write_text(MODULE + FUNCTIONS)


def configure(schedule, **changes):
    config = make_config(LR, optimizer={"schedule": schedule, "weight_decay": 0.2, **changes})
    return from_source(source_from_values(config))


SHAPES = {
    Linear: lambda progress: 1 - progress,
    Cosine: lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    functools.partial(Polynomial, power=3.0): lambda progress: (1 - progress) ** 3,
}


@pytest.mark.parametrize("shape", SHAPES, ids=["linear", "cosine", "polynomial"])
@given(base=st.floats(1e-6, 10), warmup=st.integers(0, 9), length=st.integers(10, 50), position=st.integers(0, 60))
def test_a_function_of_the_same_shape_is_the_same_schedule(shape, base, warmup, length, position):
    settings = ScheduleSettings(kind=SHAPES[shape], length=length, warmup_updates=warmup)
    schedule = value_schedule(base, settings, total_updates=1000, updates_per_epoch=7)
    expected = shape(start=base, end=0.0, updates=length - warmup)
    found = schedule(position)
    if position >= warmup:
        assert math.isclose(found, expected(position - warmup), rel_tol=1e-9, abs_tol=base * 1e-12)
    else:
        assert math.isclose(found, base * position / warmup, rel_tol=1e-9, abs_tol=base * 1e-12)
    assert value_schedule(base, replace(settings, length=None), total_updates=length, updates_per_epoch=7)(
        position
    ) == schedule(position)


@pytest.mark.parametrize(("schedule", "lr"), [
    ({"kind": "tiny.halves"}, [0.1] * 4 + [0.05] * 4),
    ({"kind": "tiny.steps", "times": 4}, [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]),
    ({"kind": "tiny.quarters"}, [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]),
    ({"kind": "tiny.Steps", "times": 2, "length": 4}, [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.025, 0.025]),
    ({"kind": "tiny.halves", "warmup_updates": 2, "warmup_start_factor": 0.5}, [0.05, 0.075, *[0.1] * 3, *[0.05] * 3]),
])  # fmt: skip
def test_a_run_uses_the_factors_of_the_function_and_writes_its_entry(tiny, schedule, lr):
    config = configure(schedule, weight_decay_schedule=schedule)
    Path("again.yaml").write_text(dump(config))
    again = load("again.yaml")
    assert (again, dump(again)) == (config, dump(config))
    assert schedule.items() <= resolve_config(config)["optimizer"]["schedule"].items()
    run = make_plan(config).run
    for setting, base in (("schedule", 1.0), ("weight_decay_schedule", 2.0)):
        values = value_schedule(
            0.1 * base, getattr(again.optimizer, setting), total_updates=run.final.update, updates_per_epoch=2
        )
        assert [values(update) for update in range(8)] == pytest.approx([each * base for each in lr])


def test_a_resumed_run_has_the_learning_rates_of_the_uncut_one(tiny):
    config = make_config(LR, optimizer={"schedule": {"kind": "tiny.halves", "length": 8}})
    cut = noether.train(config, overrides=["trainer.max_epochs=2"])
    resumed = noether.train(resume=cut.directory, overrides=["trainer.max_epochs=4"])
    uncut = noether.train(config)
    assert (resumed.directory / "metrics.jsonl").read_text().count('"optim/lr": 0.05') == 4
    assert resumed.state.params.keys() == uncut.state.params.keys()
    assert all(value.equal(uncut.state.params[name]) for name, value in resumed.state.params.items())


NAMES = "'constant', 'linear', 'cosine', 'step', 'polynomial'"


@pytest.mark.parametrize(("schedule", "message"), [
    ({"kind": "cosin"}, f"optimizer.schedule.kind: 'cosin' is not one of {NAMES}; did you mean 'cosine'?"),
    ("tiny.halves", "optimizer.schedule: 'tiny.halves' is not a mapping of settings: write {kind: tiny.halves}"),
    ({"kind": "tiny.halfs"}, "optimizer.schedule.kind: 'tiny.halfs': 'tiny' has no 'halfs'; did you mean 'halves'?"),
    ({"kind": "tiny.halves", "lenght": 3}, "optimizer.schedule.lenght: unknown setting; did you mean 'length'?"),
    ({"kind": "tiny.halves", "gamma": 3}, "optimizer.schedule.gamma: unknown setting; known are "),
    ({"kind": "tiny.steps", "times": 2.5}, "optimizer.schedule.times: 2.5 is not a whole number"),
    ({"kind": "tiny.needs"}, "optimizer.schedule.power: is missing"),
    ({"kind": "tiny.halves", "length": 0}, "optimizer.schedule.length: 0 is not a whole number of at least 1"),
    ({"kind": "tiny.negative"}, "optimizer.schedule.kind: tiny.negative returned -0.5 at progress 1.0, not a finite"),
    ({"kind": "tiny.infinite"}, "optimizer.schedule.kind: tiny.infinite raised ZeroDivisionError at progress 1.0"),
    ({"kind": "tiny.text"}, "optimizer.schedule.kind: tiny.text returned '0.5' at progress 0.0, not a finite number"),
    ({"kind": "tiny.none"}, "optimizer.schedule.kind: tiny.none returned None at progress 0.0"),
    ({"kind": "tiny.nothing"}, "optimizer.schedule.kind: 'tiny.nothing' is a function, which takes (), not (progress)"),
    ({"kind": "tiny.Data"}, "optimizer.schedule.kind: 'tiny.Data' is a dataset class, expected a function of progress"),
    ({"kind": "torch.optim.lr_scheduler.StepLR", "step_size": 2}, "; write a function of yours: def name(progress)"),
    ({"kind": "tiny.long"}, "optimizer.schedule.kind: tiny.long has the parameter length, which is a setting of every"),
])  # fmt: skip
def test_a_function_that_is_no_schedule_is_refused_by_name(tiny, schedule, message):
    with pytest.raises(ConfigError) as refused:
        configure(schedule)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_wrong_factor_between_the_checked_ones_ends_the_run_with_its_progress(tiny):
    config = make_config(optimizer={"schedule": {"kind": "tiny.thirds"}})
    with pytest.raises(InvalidValueError, match=r"^tiny\.thirds returned -1\.0 at progress 0\.25, not a finite number"):
        noether.train(config)


def test_a_function_given_in_python_takes_no_settings_of_other_kinds():
    with pytest.raises(SettingsError, match=r"end_factor: is a setting of linear and cosine and polynomial, and kind "):
        ScheduleSettings(kind=lambda progress: 1.0, end_factor=0.5)
    assert call_factor(ScheduleSettings(kind=lambda progress: 1 - progress).factor, 0.25, "mine") == 0.75
