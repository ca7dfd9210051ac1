"""Merging the effects of one event: no request is lost or duplicated."""

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noether import (
    AfterUpdate,
    Effect,
    LogScalars,
    LogText,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    ShowProgress,
    TrainingIteration,
)
from noether.core.effect import DeferredLog, LogUpdates, LogUpdateText, UpdateScalars
from noether.core.tensors.tree import FrozenDict
from noether.effects.interpreter import merge_effects

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Ring(Effect):
    times: int


NEWEST = "E1_U2_S8.latest"
NAMES = st.sampled_from(["head", "body", "tail"])
SAVES = st.builds(
    SaveCheckpoint,
    tag=st.sampled_from([None, "best", NEWEST]),
    weights=st.booleans(),
    optimizer=st.booleans(),
    models=st.lists(NAMES, max_size=2, unique=True).map(tuple),
    pointers=st.lists(st.sampled_from(["latest", "last"]), max_size=2, unique=True).map(tuple),
    retention=st.dictionaries(NAMES, st.sampled_from([None, 0, 2]), max_size=2),
)
SCALARS = st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=2)
EFFECTS = st.lists(
    st.one_of(
        SAVES,
        SCALARS.map(LogScalars),
        SCALARS.map(SetSummary),
        st.builds(LogText, NAMES),
        st.builds(Ring, st.integers()),
    ),
    max_size=6,
)


def of(kind, effects):
    return [effect for effect in effects if isinstance(effect, kind)]


def united_values(kind, effects):
    values = {}
    for effect in of(kind, effects):
        values |= effect.values
    return values


def requested_content(saves):
    """Return the requested content of a checkpoint: parts of the model (None for all), and whether the optimizer."""
    models = [save.models for save in saves if save.weights]
    parts = None if () in models else {name for each in models for name in each}
    return parts, any(save.optimizer for save in saves)


@UNTIMED
@given(EFFECTS)
def test_merging_again_changes_nothing(effects):
    assert merge_effects(merge_effects(effects)) == merge_effects(effects)


@UNTIMED
@given(EFFECTS, EFFECTS)
def test_merging_is_associative(first, second):
    assert merge_effects([*merge_effects(first), *merge_effects(second)]) == merge_effects([*first, *second])


@UNTIMED
@given(EFFECTS)
def test_scalars_are_united_and_the_later_value_wins(effects):
    for kind in (LogScalars, SetSummary):
        merged = of(kind, merge_effects(effects))
        assert len(merged) == min(1, len(of(kind, effects)))
        assert united_values(kind, merged) == united_values(kind, effects)


@settings(UNTIMED, max_examples=300)
@given(st.lists(SAVES, max_size=4))
def test_checkpoints_of_one_tag_are_united_without_loss(effects):
    saves, merged = of(SaveCheckpoint, effects), of(SaveCheckpoint, merge_effects(effects))
    is_whole = requested_content([save for save in saves if save.tag is None]) == (None, True)
    joined = {NEWEST} if is_whole and len(effects) > 1 else set()
    assert {save.tag for save in merged} == {save.tag for save in saves} - joined
    resumable = [save.optimizer and save.weights and not save.models and save.weights_of is None for save in merged]
    assert resumable == sorted(resumable, reverse=True)
    assert len(effects) == 1 or all(save.event_saves == tuple(merged) for save in merged)
    for save in merged:
        tags = {save.tag, *(joined if save.tag is None else ())}
        requests = [each for each in saves if each.tag in tags]
        assert requested_content([save]) == requested_content(requests)
        assert set(save.pointers) == {name for each in requests for name in each.pointers}
        assert len(set(save.pointers)) == len(save.pointers)
        assert set(save.retention) == {name for each in requests for name in each.retention}


@UNTIMED
@given(EFFECTS)
def test_other_effects_stay_unchanged_and_checkpoints_come_last(effects):
    merged = merge_effects(effects)
    assert of((LogText, Ring), merged) == of((LogText, Ring), effects)
    saves = [isinstance(effect, SaveCheckpoint) for effect in merged]
    assert saves == sorted(saves)


def test_deferred_logs_that_a_user_adds_stay_unchanged():
    @dataclass(frozen=True)
    class LogPicture(DeferredLog):
        update: int

    pictures, iteration = [LogPicture(1), LogPicture(2)], TrainingIteration(update=2)
    text = LogUpdateText(iteration, AfterUpdate(), LogText("half"))
    rows = LogUpdates((UpdateScalars(iteration, AfterUpdate(), FrozenDict(x=1)),))
    assert merge_effects(pictures) == (*pictures,)
    assert merge_effects([rows, pictures[0], text, pictures[1]]) == (*pictures, text, rows)


def test_the_longer_retention_of_one_owner_wins():
    def merged_retention(*numbers):
        (merged,) = merge_effects([SaveCheckpoint(retention={"who": number, "other": 3}) for number in numbers])
        return merged.retention["who"], merged.retention["other"]

    assert merged_retention(0, None) == merged_retention(None, 0) == (None, 3)
    assert merged_retention(2, 5) == merged_retention(5, 2) == (5, 3)


@UNTIMED
@given(st.lists(st.tuples(SCALARS, st.frozensets(st.sampled_from("abcz"))), max_size=5))
def test_a_key_is_quiet_if_the_effect_with_its_last_value_says_so(given_effects):
    effects = [LogScalars(values, quiet) for values, quiet in given_effects]
    last = {key: effect for effect in effects for key in effect.values}
    for merged in of(LogScalars, merge_effects(effects)):
        assert merged.values == {key: effect.values[key] for key, effect in last.items()}
        quiet = merged.quiet & merged.values.keys()  # a single effect may name other keys, too
        assert quiet == {key for key, effect in last.items() if key in effect.quiet}
        assert merge_effects([merged]) == (merged,)


def test_the_later_effect_decides_whether_a_key_is_quiet():
    quiet, loud = LogScalars({"a": 1, "b": 2}, frozenset({"a", "b"})), LogScalars({"a": 3})
    (merged,) = merge_effects([quiet, loud])
    assert (merged.values, merged.quiet) == ({"a": 3, "b": 2}, {"b"})
    (merged,) = merge_effects([loud, quiet])
    assert (merged.values, merged.quiet) == ({"a": 1, "b": 2}, {"a", "b"})


def test_tensors_of_one_name_are_united_and_the_later_value_wins():
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(3)
    effects = [
        SaveTensors(name="outputs/U1", tensors={"x": x, "y": y}),
        SaveTensors(name="outputs/E1", tensors={"x": x}),
        SaveTensors(name="outputs/U1", tensors={"y": z, "z": z}),
    ]
    one, other = merge_effects(effects)
    assert (one.name, other.name) == ("outputs/U1", "outputs/E1")
    assert {name: id(tensor) for name, tensor in one.tensors.items()} == {"x": id(x), "y": id(z), "z": id(z)}
    assert list(other.tensors) == ["x"]
    assert set(effects[0].tensors) == {"x", "y"}  # effects are not modified


def test_one_progress_remains_the_last_that_is_due_or_else_the_last():
    def progress(*, fired, due):
        return ShowProgress(
            end=TrainingIteration(update=8), fired=fired, fires=8, update_s=0.5, next_s=1.0, left_s=1.0, due=due
        )

    first, last = progress(fired=0, due=False), progress(fired=6, due=False)
    merged = merge_effects([first, LogScalars({"a": 1}), last, LogText("hello")])
    assert merged == (LogText("hello"), last, LogScalars({"a": 1}))
    # without a terminal only progress that is due is written
    due, another = progress(fired=1, due=True), progress(fired=2, due=True)
    assert of(ShowProgress, merge_effects([first, due, last])) == [due]
    assert of(ShowProgress, merge_effects([due, first, another, last])) == [another]


def test_one_tag_with_different_weights_stays_several_checkpoints():
    of_average = {"tag": "best", "weights_of": "ema=0.9", "optimizer": False}
    effects = [
        SaveCheckpoint(tag="best", pointers=("last",)),
        SaveCheckpoint(**of_average, pointers=("last.ema=0.9",)),
        SaveCheckpoint(**{**of_average, "weights_of": "ema=0.5"}),
        SaveCheckpoint(**of_average, pointers=("best.ema=0.9",)),
        SaveCheckpoint(tag="best", pointers=("latest",)),
    ]
    assert [(save.tag, save.weights_of, save.optimizer, save.pointers) for save in merge_effects(effects)] == [
        ("best", None, True, ("last", "latest")),
        ("best", "ema=0.9", False, ("last.ema=0.9", "best.ema=0.9")),
        ("best", "ema=0.5", False, ()),
    ]
