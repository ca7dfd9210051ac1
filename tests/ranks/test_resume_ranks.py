"""The law of resuming on ranks: a run that is cut anywhere, and resumed on any number of them, equals the uncut run."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_on_ranks
from recorded_runs import UPDATES, make_config, samples_by_update, train
from safetensors.torch import load_file

TENSORS = ("weights.safetensors", "optimizer.safetensors", "state.safetensors")


def train_parts(parts, config, folder):
    """Train a run in parts, each on some ranks; return its directory, and the samples of each update that was made.

    Args:
        parts: The number of ranks of each part, and how each segment on them ends, as for `recorded_runs.train`.
        config: The configuration.
        folder: The working directory.
    """
    directory, trained = None, []
    for world_size, segments in parts:
        first = {"config": config} if directory is None else {"resume": directory}
        results = run_on_ranks(train, world_size, folder, segments, first)
        directory = results[0]["directory"]
        assert {result["directory"] for result in results} == {directory}
        assert [result["endings"] for result in results] == [results[0]["endings"]] * world_size
        trained += samples_by_update(results)
    return folder / directory, trained


def lines(run):
    """Return the lines of metrics.jsonl without run and time."""
    read = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("run", "time_s")} for line in read]


def last_tensors(run):
    """Return the files with tensors in the checkpoint at the end, by name."""
    tag = (run / "checkpoints/last").read_text().split()[0]
    return {name: run / "checkpoints" / tag / name for name in TENSORS}


@functools.cache
def train_uncut():
    """Return the folder of a run in one process, the run, and the samples of its updates."""
    folder = tempfile.TemporaryDirectory()
    return folder, *train_parts([(1, [{}])], make_config(), Path(folder.name))


def check_resumed(run, trained):
    """Check that a run trained the same samples in the same order as the uncut run, and is close to it."""
    _, uncut, expected = train_uncut()
    assert [update for update, _ in expected] == [*range(1, UPDATES + 1)]
    assert trained == expected
    for name, path in last_tensors(uncut).items():
        torch.testing.assert_close(load_file(last_tensors(run)[name]), load_file(path), rtol=1e-4, atol=1e-5)
    assert len(lines(run)) == len(lines(uncut))
    for line, other in zip(lines(run), lines(uncut), strict=True):
        assert line.pop("metrics") == pytest.approx(other.pop("metrics"), rel=1e-4, abs=1e-5)
        assert line == other


def test_a_run_resumes_on_other_numbers_of_ranks(tmp_path):
    cuts = [{"at": 3, "how": "raise"}, {"at": 5, "how": "signal", "rank": 1}]
    parts = [(2, cuts), (3, [{"at": 8, "how": "signal", "rank": 2}]), (1, [{}])]
    run, trained = train_parts(parts, make_config(), tmp_path)
    check_resumed(run, trained)
    sizes = json.loads((run / "summary.json").read_text())["world_size"]
    assert sizes == {"E0_U0_S0": 2, "E0_U3_S21": 2, "E1_U6_S38": 3, "E1_U8_S48": 1}


def train_uncut_and_cut(folder, config):
    """Return the directories of a run that is not cut, and of one that is cut and resumed on the same ranks."""
    cuts = [{"at": 4, "how": "raise"}, {"at": 9, "how": "signal", "rank": 1}, {}]
    return [train(folder, segments, {"config": config})["directory"] for segments in ([{}], cuts)]


def test_a_run_that_resumes_on_as_many_ranks_has_the_same_bits(tmp_path):
    results = run_on_ranks(train_uncut_and_cut, 2, tmp_path, make_config(dropout=0.3))
    assert results[0] == results[1]
    uncut, cut = (tmp_path / directory for directory in results[0])
    assert lines(cut) == lines(uncut)
    pairs = [(last_tensors(cut)[name], path) for name, path in last_tensors(uncut).items()]
    assert [one.read_bytes() == other.read_bytes() for one, other in pairs] == [True] * len(TENSORS)


@st.composite
def plans(draw):
    """Return numbers of ranks and random cuts, for `train_parts`."""
    points = draw(st.lists(st.integers(1, UPDATES - 1), min_size=1, max_size=4, unique=True).map(sorted))
    parts = []
    for point in [*points, None]:
        if not parts or draw(st.booleans()):
            parts.append((draw(st.integers(1, 3)), []))
        world_size, segments = parts[-1]
        how = draw(st.sampled_from(["raise", "signal"]))
        ranks = st.just(None) if how == "raise" else st.none() | st.integers(0, world_size - 1)
        segments.append({} if point is None else {"at": point, "how": how, "rank": draw(ranks)})
    return parts


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(parts=plans())
def test_a_run_resumes_wherever_it_is_cut(parts):
    with tempfile.TemporaryDirectory() as folder:
        check_resumed(*train_parts(parts, make_config(), Path(folder)))
