"""The fields of events, and the table of the costly ones."""

import subprocess
import sys
from dataclasses import fields

import pytest

from noether.core.event import EVENTS, READINGS, AfterUpdate, BeforeTraining, check_reading
from noether.core.run import Run


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
        "Clip declares the unknown reading 'finit'; readings: grad_norm, finite, forward_s, backward_s, optimizer_s; "
        "did you mean 'finite'?"
    )
