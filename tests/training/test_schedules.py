"""The laws of value schedules, and torch's own schedulers as the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.config.optimizer_settings import ParamGroup, ScheduleSettings
from noether.core.errors import SettingsError
from noether.training.value_schedules import Constant, Cosine, Linear, Polynomial, StepDecay, Warmup, value_schedule

values = st.floats(0.0, 1e3, allow_subnormal=False)
lengths = st.integers(1, 10_000)
positions = st.integers(0, 20_000)
powers = st.floats(0.1, 5.0)


@st.composite
def decays(draw):
    start, end, updates = draw(values), draw(values), draw(lengths)
    kind = draw(st.sampled_from([Linear, Cosine, Polynomial]))
    extra = {"power": draw(powers)} if kind is Polynomial else {}
    return kind(start=start, end=end, updates=updates, **extra)


def close(left, right):
    return math.isclose(left, right, rel_tol=1e-12, abs_tol=1e-12)


@given(decays())
def test_endpoints_are_exact(schedule):
    assert schedule(0) == schedule.start
    assert schedule(schedule.updates) == schedule.end
    assert schedule(schedule.updates + 1000) == schedule.end


@given(decays(), positions, positions)
def test_a_decay_stays_between_its_ends_and_never_turns(schedule, one, other):
    low, high = sorted((schedule.start, schedule.end))
    early, late = schedule(min(one, other)), schedule(max(one, other))
    assert low - 1e-9 <= early <= high + 1e-9
    assert late <= early + 1e-9 if schedule.start >= schedule.end else late >= early - 1e-9


@given(decays(), st.lists(positions, min_size=1, max_size=5), values, lengths)
def test_a_value_depends_on_the_position_only(schedule, some_positions, start, updates):
    warm = Warmup(start=start, updates=updates, after=schedule)
    first = [warm(position) for position in some_positions]
    assert [warm(position) for position in reversed(some_positions)] == first[::-1]
    assert all(math.isfinite(value) for value in first)


@given(values, lengths, decays())
def test_warmup_is_a_line_and_then_the_schedule_from_its_start(start, updates, schedule):
    warm = Warmup(start=start, updates=updates, after=schedule)
    assert warm(0) == start
    assert warm(updates) == schedule.start
    assert warm(updates + 17) == schedule(17)
    middle = updates // 2
    assert close(warm(middle), start + (schedule.start - start) * middle / updates)


@given(values, st.lists(lengths, min_size=1, max_size=4, unique=True).map(sorted), st.floats(0.1, 1.0), positions)
def test_step_multiplies_once_for_each_milestone_passed(start, milestones, gamma, position):
    schedule = StepDecay(start=start, milestones=tuple(milestones), gamma=gamma)
    passed = sum(milestone <= position for milestone in milestones)
    assert schedule(position) == start * gamma**passed


@given(values, values, lengths, positions)
def test_polynomial_of_power_one_is_linear(start, end, updates, position):
    linear = Linear(start=start, end=end, updates=updates)
    assert Polynomial(start=start, end=end, updates=updates, power=1.0)(position) == linear(position)


@given(values, positions)
def test_constant_is_constant(value, position):
    assert Constant(value=value)(position) == value


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Linear(start=0.1, end=0.02, updates=20), lambda o: LR.LinearLR(o, 1.0, 0.2, total_iters=20)),
        (Cosine(start=0.1, end=0.02, updates=20), lambda o: LR.CosineAnnealingLR(o, T_max=20, eta_min=0.02)),
        (Polynomial(start=0.1, end=0.0, updates=20, power=2.0), lambda o: LR.PolynomialLR(o, 20, power=2.0)),
        (StepDecay(start=0.1, milestones=(3, 11), gamma=0.5), lambda o: LR.MultiStepLR(o, [3, 11], gamma=0.5)),
        (
            Warmup(start=0.025, updates=5, after=Cosine(start=0.1, end=0.0, updates=15)),
            lambda o: LR.SequentialLR(o, [LR.LinearLR(o, 0.25, total_iters=5), LR.CosineAnnealingLR(o, 15)], [5]),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's SequentialLR causes it
def test_values_are_those_of_torch(schedule, reference):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = reference(optimizer)
    for position in range(21):
        assert math.isclose(schedule(position), optimizer.param_groups[0]["lr"], rel_tol=1e-9, abs_tol=1e-12)
        optimizer.step()
        scheduler.step()


LR = torch.optim.lr_scheduler


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "polynomial"])
@given(base=values, total=st.integers(2, 1000), data=st.data())
def test_built_schedules_run_from_warmup_over_the_base_to_the_end(kind, base, total, data):
    warmup = data.draw(st.integers(0, total - 1))
    end_factor = None if kind == "constant" else data.draw(st.none() | st.floats(0.0, 2.0))
    settings = ScheduleSettings(kind=kind, warmup_updates=warmup, end_factor=end_factor)
    schedule = value_schedule(base, settings, total_updates=total, updates_per_epoch=7)
    end = base if kind == "constant" else base * (end_factor or 0.0)
    assert schedule(warmup) == base
    assert schedule(total) == end
    assert warmup == 0 or schedule(0) == 0.0
    assert all(early <= late + 1e-9 for early, late in pairwise(schedule(u) for u in range(warmup + 1)))


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
@given(base=values, length=lengths, total=lengths, warmup=st.integers(0, 5), position=positions)
def test_a_schedule_with_a_length_does_not_depend_on_the_length_of_the_run(kind, base, length, total, warmup, position):
    settings = ScheduleSettings(kind=kind, warmup_updates=warmup, end_factor=0.1)
    run_of_that_length = value_schedule(base, settings, total_updates=length + warmup, updates_per_epoch=7)
    settings = replace(settings, length=length + warmup)
    schedule = value_schedule(base, settings, total_updates=total, updates_per_epoch=7)
    assert schedule(position) == run_of_that_length(position)


def test_epochs_are_counted_in_updates_from_the_start_of_the_run():
    settings = ScheduleSettings(
        kind="step", milestone_epochs=(3, 5), gamma=0.5, warmup_epochs=2, warmup_start_factor=0.1
    )
    schedule = value_schedule(1.0, settings, total_updates=60, updates_per_epoch=10)
    assert [schedule(update) for update in (0, 20, 29, 30, 49, 50)] == [0.1, 1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "cosin"},
            "kind: 'cosin' is not one of 'constant', 'linear', 'cosine', 'step', 'polynomial'; did you",
        ),
        ({"kind": "cosine", "gamma": 0.1}, "gamma: is a setting of step, and kind is cosine; remove it or change kind"),
        ({"end_factor": 0.1}, "end_factor: is a setting of linear and cosine and polynomial, and kind is constant"),
        ({"kind": "linear", "end_factor": -0.1}, "end_factor: -0.1 is not a number of at least 0"),
        ({"kind": "linear", "end_factor": math.inf}, "end_factor: inf is not a number of at least 0"),
        ({"kind": "linear", "end_factor": True}, "end_factor: True is not a number"),
        ({"kind": "polynomial", "power": 0}, "power: 0 is not a number above 0"),
        ({"kind": "linear", "length": 0}, "length: 0 is not a whole number of at least 1"),
        ({"kind": "linear", "length": 2.0}, "length: 2.0 is not a whole number of at least 1"),
        ({"length": 9}, "length: is a setting of linear and cosine and polynomial, and kind is constant"),
        ({"kind": "step"}, "milestone_epochs: step needs either milestone_epochs or milestone_updates, e.g. [30, 60]"),
        ({"kind": "step", "milestone_epochs": (60, 30)}, "milestone_epochs: (60, 30) is not an increasing list"),
        ({"kind": "step", "milestone_updates": (0, 30)}, "milestone_updates: (0, 30) is not an increasing list"),
        ({"warmup_updates": -1}, "warmup_updates: -1 is not a whole number of at least 0"),
        ({"warmup_updates": 2, "warmup_epochs": 1}, "warmup_epochs: give the warm-up in updates or in epochs, not in"),
        (
            {"warmup_start_factor": 0.1},
            "warmup_start_factor: there is no warm-up; give warmup_updates or warmup_epochs",
        ),
    ],
)
def test_refused_schedule_settings(settings, message):
    with pytest.raises(SettingsError) as caught:
        ScheduleSettings(**settings)
    assert message in str(caught.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(SettingsError) as caught:
        ScheduleSettings(kind="step", gamma=-1, warmup_updates=-1, power=1.0)
    assert {problem.setting for problem in caught.value.problems} == {
        *("gamma", "warmup_updates", "power", "milestone_epochs"),
    }


@pytest.mark.parametrize(
    ("settings", "total", "message"),
    [
        (
            {"kind": "cosine", "warmup_updates": 10},
            10,
            "warmup_updates: a warm-up of 10 updates takes all 10, leaving none for cosine",
        ),
        (
            {"kind": "cosine", "warmup_updates": 10, "length": 9},
            100,
            "warmup_updates: a warm-up of 10 updates takes all 9, leaving none for cosine",
        ),
        (
            {"kind": "step", "milestone_epochs": (2,), "warmup_updates": 20},
            50,
            "milestone_epochs: the first one, at update 20, lies",
        ),
        ({}, 0, "total_updates: 0 is not a whole number of at least 1"),
    ],
)
def test_refused_runs(settings, total, message):
    with pytest.raises(SettingsError) as caught:
        value_schedule(0.1, ScheduleSettings(**settings), total_updates=total, updates_per_epoch=10)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "default"}, "name: 'default' is the name for all parameters that no group matches; choose another"),
        ({"name": ""}, "name: is empty; logs and checkpoints need a name for the group"),
        ({"match": "*.bias"}, "match: '*.bias' is not a list of patterns such as ['*.bias']"),
        ({"match": ()}, "match: () is not a list of patterns such as ['*.bias']"),
        ({"lr": -0.1}, "lr: -0.1 is not a number of at least 0"),
        ({"weight_decay": "0"}, "weight_decay: '0' is not a number of at least 0"),
        ({"settings": {"lr": 0.1}}, "settings.lr: is a field of the group itself: write lr: 0.1"),
        ({"frozen": True, "lr": 0.1}, "frozen: a frozen group is not trained, so lr has no effect; drop one"),
    ],
)
def test_refused_param_groups(settings, message):
    with pytest.raises(SettingsError) as caught:
        ParamGroup(**{"name": "a", "match": ("a.*",), **settings})
    assert message in str(caught.value)
