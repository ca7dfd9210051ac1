"""What is fixed for a run: fields that are named when missing, and the arithmetic of epochs against walking them."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.errors import SettingsError
from noether.core.event import EVENTS, AfterUpdate
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.testing.strategies import run_lengths

OPTIONAL = ("end", "updates_per_epoch", "samples_per_epoch", "effective_batch_size", "run_id", "config", "data",
            "forward")  # fmt: skip
WHOLE = ("updates_per_epoch", "samples_per_epoch", "effective_batch_size")


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_field_that_was_not_given_is_named_when_read(name):
    with pytest.raises(AttributeError) as refused:
        getattr(Run(), name)
    assert str(refused.value) == f"this run was not given {name!r}: build it as Run({name}=..., ...)"
    assert not hasattr(Run(), name)
    assert getattr(Run(**{name: None}), name) is None


def test_an_unknown_field_is_refused():
    with pytest.raises(AttributeError, match=r"^Run has no field 'epochs'$"):
        _ = Run().epochs
    with pytest.raises(TypeError, match="epochs"):
        Run(epochs=3)


def test_fields_with_defaults():
    assert (Run().rank, Run().world_size) == (0, 1)
    assert Run().batch_size({"x": torch.zeros(5, 2)}) == 5


def test_a_run_cannot_be_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run().rank = 3


def test_replace_changes_some_fields_and_keeps_what_is_missing():
    run = Run(run_id="a", batch_size=len)
    other = run.replace(rank=1, world_size=2)
    assert (other.run_id, other.rank, other.world_size, other.batch_size) == ("a", 1, 2, len)
    assert not hasattr(other, "end")
    assert run.rank == 0


def test_a_run_can_be_copied_and_sent():
    run = Run(end=TrainingIteration(epoch=1), run_id="a")
    for other in (copy.copy(run), copy.deepcopy(run), pickle.loads(pickle.dumps(run))):  # our own bytes  # noqa: S301  # our own bytes
        assert (other.end, other.run_id) == (run.end, "a")
        assert not hasattr(other, "data")


def test_a_run_shows_what_it_was_given_but_no_data():
    assert repr(Run(run_id="a", data={"val": [1]}, forward=len, batch_size=len)) == (
        "Run(run_id='a', rank=0, world_size=1, batch_size=<built-in function len>)"
    )


@pytest.mark.parametrize("event_type", EVENTS)
def test_events_hand_on_data_and_forward(event_type):
    event = event_type(run=Run(data={"val": [1]}, forward=lambda state, batch: (state, batch)))
    assert event.data == {"val": [1]}
    assert event.forward("state", "batch") == ("state", "batch")
    with pytest.raises(AttributeError, match="not given 'data'"):
        _ = AfterUpdate().data


@given(run_lengths(max_epochs=4))
def test_iterations_are_what_a_walk_counts(run):
    epoch, sample, sizes = 0, 0, []
    for update in range(run.final.update + 1):
        assert run.iteration_after(update) == TrainingIteration(epoch, update, sample)
        size = min(run.effective_batch_size, (epoch + 1) * run.samples_per_epoch - sample)
        sizes.append(size)
        sample += size
        epoch += sample == (epoch + 1) * run.samples_per_epoch
    assert min(sizes) >= 1


@given(run_lengths(max_epochs=4), st.integers(0, 200))
def test_updates_until_a_sample_are_the_fewest(run, sample):
    updates = run.updates_until(sample)
    assert run.iteration_after(updates).sample >= sample
    assert updates == 0 or run.iteration_after(updates - 1).sample < sample


@given(run_lengths(), st.sampled_from(("epoch", "update", "sample")), st.integers(1, 60))
def test_updates_to_a_count_are_the_fewest(run, counter, count):
    updates = run.updates_to(counter, count)
    assert getattr(run.iteration_after(updates), counter) >= count
    assert getattr(run.iteration_after(updates - 1), counter) < count


@given(run_lengths(), st.sampled_from(("epoch", "update", "sample")), st.integers(1, 60))
def test_the_last_iteration_is_the_first_that_reaches_the_end(run, counter, count):
    run = run.replace(end=TrainingIteration(**{counter: count}))
    assert run.final.reached(run.end)
    assert not run.iteration_after(run.final.update - 1).reached(run.end)


def test_a_property_names_the_missing_field_that_it_needs():
    with pytest.raises(AttributeError, match="this run was not given 'end'"):
        _ = Run(updates_per_epoch=1).final
    with pytest.raises(AttributeError, match="this run was not given 'updates_per_epoch'"):
        _ = Run(end=TrainingIteration(epoch=1)).final


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in WHOLE for value in (0, -1, 1.5, 2.0, True, "4")),
        ("rank", -1),
        ("rank", None),
        ("world_size", 0),
        ("world_size", None),
        ("end", 10),
        ("end", "E10"),
        ("run_id", 3),
        ("config", "run.yaml"),
        ("data", [1, 2]),
        ("forward", {}),
        ("frozen", "head.weight"),
        ("batch_size", 4),
        ("batch_size", None),
    ],
)
def test_a_field_that_means_nothing_is_refused_by_its_name(name, value):
    with pytest.raises(SettingsError, match=rf"^Run\.{name}: .* is not "):
        Run(**{name: value})
    with pytest.raises(SettingsError, match=rf"^Run\.{name}: "):
        Run().replace(**{name: value})


def test_a_rank_is_less_than_the_world_size():
    assert Run(rank=3, world_size=4).rank == 3
    with pytest.raises(SettingsError, match=r"^Run\.rank: 4 is not less than world_size, which is 4$"):
        Run(rank=4, world_size=4)


def test_a_run_of_several_ranks_that_cannot_gather_is_refused_where_it_would():
    several = Run(world_size=2)
    with pytest.raises(
        RuntimeError, match=r"^sizes: this run has several ranks, and cannot gather from them: pass Run"
    ):
        several.gather("sizes", 1)
    assert several.replace(world_size=1).gather("sizes", 1) == (1,)
    assert several.replace(gather=lambda _, value: [value, 2]).replace(rank=1).gather("sizes", 1) == [1, 2]
