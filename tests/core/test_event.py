"""The fields of events, and the table of the costly ones."""

import subprocess
import sys
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.errors import SettingsError
from noether.core.event import (
    EVENTS,
    READINGS,
    AfterAccumulationStep,
    AfterEpoch,
    AfterUpdate,
    BeforeTraining,
    check_reading,
)
from noether.core.run import Run
from noether.core.tensors.donation import DonatedTree
from noether.core.tensors.means import Mean
from noether.core.tensors.tree import FrozenDict

SCALAR = torch.tensor(0.5)
NAN = float("nan")
NUMBERS = [0.5, 3, -1.0, float("nan"), float("inf"), SCALAR, np.float32(0.5), np.float64(0.5), np.int64(3), np.ones(())]
NO_NUMBERS = ["0.5", True, 1j, [0.5], (0.5,), torch.ones(1), torch.ones(2, 2), np.ones(3), object(), {"a": 1}]
MAPPINGS = [{}, *({"a": number} for number in NUMBERS), FrozenDict(a=1.0), DonatedTree({"a": SCALAR})]
NO_MAPPINGS = [0.003, SCALAR, None, [("a", 1.0)], {1: 0.5}, {None: 0.5}, *({"a": each} for each in [*NO_NUMBERS, None])]
COUNTS, NO_COUNTS = [0, 1, 8], ["8", -1, 1.0, True, None, np.int64(8), torch.tensor(8)]
FLAGS, NO_FLAGS = [True, False], [0, 1, None, "yes", torch.tensor(True)]
DURATIONS = [0, 0.0, 1.5, np.float32(2)]
NO_DURATIONS = [-1.0, float("nan"), float("inf"), "1", True, [1.0]]
FIELDS = {  # (values of the field, values that it cannot have)
    "run": ([Run(), Run(run_id="a")], [None, "run", {}]),
    "time_s": ([0.0, 1_700_000_000.5, 3, -1.0], ["now", None, float("nan"), float("inf"), True]),
    "resumed": (FLAGS, NO_FLAGS),
    "samples": (COUNTS, NO_COUNTS),
    "losses": (MAPPINGS, NO_MAPPINGS),
    "loss_weights": (MAPPINGS, NO_MAPPINGS),
    "outputs": ([None, "anything", (torch.ones(2),)], []),
    "accumulated": ([(), (4,), (4, 0, 2)], [4, [4], None, (4.0,), (True,), (-1,), "44"]),
    "accumulation_step": ([0], NO_COUNTS),
    "accumulation_steps": ([1, 8], [0, *NO_COUNTS]),
    "lr": (MAPPINGS, NO_MAPPINGS),
    "weight_decay": (MAPPINGS, NO_MAPPINGS),
    "grad_norm": ([None, *NUMBERS], NO_NUMBERS),
    "gradients": (
        [None, {}, {"weight": torch.ones(2)}, FrozenDict(bias=torch.ones(()))],
        [torch.ones(2), [torch.ones(2)], {"weight": None}, {"weight": 0.5}, {1: torch.ones(2)}],
    ),
    "finite": ([None, True, False, torch.tensor(True), np.bool_(True)], ["yes", 1, torch.ones(2), [True]]),
    "skipped": (FLAGS, NO_FLAGS),
    "duration_s": (DURATIONS, [None, *NO_DURATIONS]),
    **dict.fromkeys(("data_s", "step_s", "forward_s", "backward_s", "optimizer_s"), ([None, *DURATIONS], NO_DURATIONS)),
}
EVERY_FIELD = [(event_type, field.name) for event_type in EVENTS for field in fields(event_type)]
every_field = pytest.mark.parametrize(
    ("event_type", "name"), EVERY_FIELD, ids=[f"{event_type.__name__}.{name}" for event_type, name in EVERY_FIELD]
)


@every_field
def test_a_field_keeps_what_it_may_be(event_type, name):
    for value in FIELDS[name][0]:
        assert getattr(event_type(**{name: value}), name) is value
        assert getattr(event_type().replace(**{name: value}), name) is value


@every_field
def test_a_field_refuses_anything_else_by_its_name(event_type, name):
    for value in FIELDS[name][1]:
        for make in (event_type, event_type().replace):
            with pytest.raises(SettingsError, match=rf"^{event_type.__name__}\.{name}: .* is not .*; write e\.g\. \S"):
                make(**{name: value})


def test_the_message_names_value_and_fix_of_each_wrong_field():
    with pytest.raises(SettingsError) as caught:
        AfterUpdate(lr=0.003, losses={"ce": torch.ones(4), "l1": 0.5}, samples="8")
    assert str(caught.value) == (
        "AfterUpdate.samples: '8' is not a whole number >= 0; write e.g. len(batch)\n"
        "AfterUpdate.losses: {'ce': a Tensor of shape (4,)} is not a mapping from name to number, 0-dimensional "
        "tensor or Mean; write e.g. {'total': loss.mean().detach()}\n"
        "AfterUpdate.lr: 0.003 is not a mapping from parameter group to number; write e.g. {'default': 0.003}"
    )


def test_a_loss_may_be_given_as_a_mean_with_its_weight():
    losses = {"ce": Mean(SCALAR, weight=torch.tensor(12)), "l1": Mean(0.25), "absent": Mean(NAN, weight=0), "mse": 2.0}
    for event in (AfterUpdate(losses=losses, loss_weights={"mse": 3}), AfterUpdate().replace(losses=losses)):
        assert event.losses == {"ce": SCALAR, "l1": 0.25, "mse": 2.0}
        assert {**event.loss_weights, "mse": 3} == {"ce": 12, "mse": 3}
    assert AfterAccumulationStep(losses=losses).losses == {"ce": SCALAR, "l1": 0.25, "mse": 2.0}


@pytest.mark.parametrize("weight", [-1, NAN, float("inf"), "3", True, torch.ones(2)], ids=repr)
def test_a_mean_without_a_sensible_weight_is_refused_by_the_name_of_the_field(weight):
    with pytest.raises(SettingsError, match=r"^AfterUpdate\.losses: the weight of 'ce' is .*: pass Mean"):
        AfterUpdate(losses={"ce": Mean(SCALAR, weight=weight)})


@given(step=st.integers(0, 9), steps=st.integers(1, 9))
def test_an_accumulation_step_is_one_of_the_update(step, steps):
    if step < steps:
        assert AfterAccumulationStep(accumulation_step=step, accumulation_steps=steps).accumulation_step == step
        return
    with pytest.raises(
        SettingsError, match=rf"^AfterAccumulationStep.accumulation_step: {step} is not less than .* {steps}$"
    ):
        AfterAccumulationStep(accumulation_step=step, accumulation_steps=steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterSearch(AfterUpdate):
    """An event of a loop of the user's own: with a field more, and one that means something else."""

    temperature: str = "high"
    skipped: str = "never"


class AfterRound(AfterEpoch):
    """An event without fields of its own."""


def test_a_users_event_has_fields_of_its_own():
    event = AfterSearch(temperature="low", skipped="once", lr={"all": 0.1})
    assert (event.temperature, event.skipped, event.replace(temperature=3).temperature) == ("low", "once", 3)
    assert AfterRound(time_s=2.0).time_s == 2.0
    with pytest.raises(SettingsError, match=r"^AfterSearch\.lr: 0.1 is not a mapping"):
        AfterSearch(lr=0.1)
    with pytest.raises(SettingsError, match=r"^AfterSearch\.samples: "):
        AfterSearch().replace(samples=-1)
    with pytest.raises(SettingsError, match=r"^AfterRound\.run: "):
        AfterRound(run=None)


@pytest.mark.parametrize("event_type", EVENTS)
def test_of_makes_what_the_constructor_makes(event_type):
    given = {"run": Run(run_id="a"), "time_s": 2.0}
    made, constructed = event_type.of(**given), event_type(**given)
    assert [getattr(made, field.name) for field in fields(event_type)] == [
        getattr(constructed, field.name) for field in fields(event_type)
    ]


def test_of_refuses_an_unknown_field_and_names_the_nearest():
    with pytest.raises(TypeError, match=r"^AfterUpdate has no field 'grad_nrom'; it has run, .*; did you mean 'grad_n"):
        AfterUpdate.of(samples=4, grad_nrom=0.5)
    with pytest.raises(TypeError, match=r"^BeforeTraining has no field 'samples'; it has run, time_s, resumed$"):
        BeforeTraining.of(samples=4)


def test_of_checks_nothing_under_optimized_python():
    code = "from noether import AfterUpdate; print(vars(AfterUpdate.of(unknown=1)))"
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "{'unknown': 1}\n"


def test_each_reading_is_a_field_of_an_update_that_may_be_missing():
    types = {field.name: field.type for field in fields(AfterUpdate)}
    for name, reading in READINGS.items():
        assert (reading.name, reading.type) == (name, types[name])
        assert "None" in reading.type
        assert reading.cost
        assert reading.computed_by
        assert check_reading("any", name) is None


def test_an_unknown_reading_is_a_problem():
    assert str(check_reading("Clip", "finit")) == (
        "Clip declares the unknown reading 'finit'; readings: grad_norm, gradients, finite, forward_s, backward_s, "
        "optimizer_s; did you mean 'finite'?"
    )
