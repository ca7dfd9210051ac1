"""The names that a user may give to a checkpoint."""

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether import TrainingIteration
from noether.effects.checkpoints.file_names import STATE, WEIGHTS
from noether.effects.checkpoints.listing import CheckpointEntry, CheckpointError, Listing, PointerEntry
from noether.effects.checkpoints.manifest import Manifest, Part
from noether.effects.checkpoints.names import find_tag

DIRECTORY = Path("checkpoints")
COUNTS = st.integers(0, 3)
ITERATIONS = st.lists(st.builds(TrainingIteration, COUNTS, COUNTS, COUNTS), min_size=1, max_size=5, unique=True)


def saved(iteration, suffix="", *, files=(WEIGHTS,), **fields):
    part = Part(size_bytes=0, sha256="0" * 64)
    manifest = Manifest(
        tag=f"{iteration}{suffix}", run_id="r", segment=1, parent=None, iteration=iteration, event="AfterUpdate",
        parts=dict.fromkeys(files, part), retention={}, **fields,
    )  # fmt: skip
    return CheckpointEntry(manifest.tag, manifest, None)


def find(name, checkpoints, **pointers):
    entries = tuple(PointerEntry(pointer.replace("__", "."), tag, None) for pointer, tag in pointers.items())
    return find_tag(name, Listing(tuple(checkpoints), entries), DIRECTORY)


@given(ITERATIONS)
def test_a_part_of_a_tag_means_the_only_iteration_that_has_it_or_is_refused(iterations):
    checkpoints = [saved(iteration) for iteration in iterations]
    for iteration in iterations:
        parts = str(iteration).split("_")
        for count in (1, 2, 3):
            for name in map("_".join, combinations(parts, count)):
                having = [str(each) for each in iterations if set(name.split("_")) <= set(str(each).split("_"))]
                if len(having) == 1:
                    assert find(name, checkpoints) == having[0]
                    continue
                with pytest.raises(CheckpointError) as error:
                    find(name, checkpoints)
                assert str(error.value).startswith(f"{name!r} may be any of {len(having)} checkpoints in checkpoints: ")
                assert all(tag in str(error.value) for tag in having)


FIRST, SECOND = TrainingIteration(1, 4, 16), TrainingIteration(2, 8, 32)
STORED = [
    saved(FIRST),
    saved(FIRST, ".ema=0.9", weights_of="ema=0.9"),
    saved(SECOND),
    saved(SECOND, ".latest", files=(WEIGHTS, STATE)),
    saved(SECOND, ".ema=0.9", weights_of="ema=0.9"),
    saved(TrainingIteration(3, 9, 36), models=("head",)),
]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("E1", "E1_U4_S16"),
        ("U4", "E1_U4_S16"),
        ("E1_S16", "E1_U4_S16"),
        ("E2", "E2_U8_S32.latest"),
        ("E2_U8_S32", "E2_U8_S32"),
        ("E2.ema=0.9", "E2_U8_S32.ema=0.9"),
        ("E3", "E3_U9_S36"),
        ("newest", "E2_U8_S32.latest"),
        ("best", "E1_U4_S16"),
        ("best_model.val.accuracy", "E1_U4_S16"),
        ("best_model.val/accuracy", "E1_U4_S16"),
        ("checkpoints/E1_U4_S16/", "E1_U4_S16"),
        ("./checkpoints/best_model.val.accuracy", "E1_U4_S16"),
    ],
)
def test_a_name_finds_its_checkpoint(name, tag):
    pointers = {"best_model__val__accuracy": FIRST, "best_model__val__accuracy__tolerance=2": SECOND}
    assert find(name, STORED, **{pointer: str(at) for pointer, at in pointers.items()}) == tag


def test_one_checkpoint_may_be_the_best_of_several_metrics():
    pointers = {"best_model__val__accuracy": "E1_U4_S16", "best_model__loss__val__total": "E1_U4_S16"}
    assert find("best", STORED, **pointers) == "E1_U4_S16"
    pointers["best_model__loss__val__total"] = "E2_U8_S32"
    with pytest.raises(CheckpointError) as error:
        find("best", STORED, **pointers)
    assert str(error.value) == (
        "'best' may be any of 2 checkpoints in checkpoints: best_model.val.accuracy (E1_U4_S16), "
        "best_model.loss.val.total (E2_U8_S32); give one"
    )


@pytest.mark.parametrize("name", ["best", "newest", "E4", "E1_E2", "E2.ema=0.5", "e1", "E2_U8_S32.latst", "", "../x"])
def test_a_name_that_means_nothing_is_refused_with_those_that_exist(name):
    checkpoints = STORED if name != "newest" else STORED[-1:]
    with pytest.raises(CheckpointError, match=r"there are: .*E3_U9_S36"):
        find(name, checkpoints, last="E3_U9_S36")


def test_a_broken_pointer_is_reported_and_not_searched_for():
    broken = PointerEntry("latest", None, CheckpointError("latest is damaged"))
    with pytest.raises(CheckpointError, match="latest is damaged"):
        find_tag("latest", Listing(tuple(STORED), (broken,)), DIRECTORY)
