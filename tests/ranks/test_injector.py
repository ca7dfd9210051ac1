"""A fault of one rank at any phase ends all ranks, is shown once, loses no checkpoint, and the run resumes exactly."""

import functools
import tempfile
from itertools import product
from pathlib import Path

import pytest
from faulty_runs import ALL, AT, command, different_commands, write_config
from processes import outcomes_on_ranks
from safetensors.torch import load_file

from noether.effects.checkpoints.reader import CheckpointReader

RANKS = 2
TIMEOUT_S = 3
TERMINATED = 143
PHASES = {0: ("data", "step", "evaluation", "save", "commit"), 1: ("data", "step", "evaluation", "other save")}
"""Rank 0 writes the checkpoints; the other rank can fail while it does."""
KINDS = ("raise", "kill", "hang", "full", "signal")
FAULTS = [
    (rank, phase, how)
    for rank, phases in PHASES.items()
    for phase, how in product(phases, KINDS)
    if how not in {"raise", "full"} or (how == "full") == (phase in {"save", "commit"})  # where disks fail
]
QUICK = [
    (0, "step", "kill"),
    (1, "data", "raise"),
    (0, "commit", "full"),
    (ALL, "step", "signal"),
]
SHOWN = {
    "raise": "rank {}: Error: LookupError: no such file",
    "full": "rank {}: Error: ",
    "kill": "Error: rank {} ended without a message (killed, or out of memory?) during ",
    "hang": "Error: rank {} hangs: the others waited 3 s for it in ",
}


def train(folder, words, *fault):
    """Return how each rank ended, and what all of them printed."""
    outcomes = outcomes_on_ranks(command, RANKS, folder, words, *fault, limit_s=60, detail=False)
    return outcomes, [(folder / f"{rank}.txt").read_text() for rank in range(RANKS)]


def last_weights(run):
    tag = (run / "checkpoints/latest").read_text().split()[0]
    return {
        name: load_file(run / "checkpoints" / tag / name) for name in ("weights.safetensors", "optimizer.safetensors")
    }


@functools.cache
def train_without_fault():
    """Return the tensors at the end of a run without a fault."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder)
        outcomes, printed = train(folder, ["train", "numbers.yaml"])
        assert outcomes == [("returned", 0)] * RANKS, printed
        assert printed[0].count("ended at E4_U12_S96") == 1
        assert printed[1] == ""
        return last_weights(next((folder / "runs/numbers").iterdir()))


def check_fault(folder, rank, phase, how):
    write_config(folder, **({"rank_timeout_s": TIMEOUT_S} if how == "hang" else {}))
    outcomes, printed = train(folder, ["train", "numbers.yaml"], rank, phase, how)
    text = "".join(printed)
    if how == "signal":
        assert outcomes == [("returned", TERMINATED)] * RANKS, printed
        assert text.count("Error") == 0, printed
        assert text.count("saved E") == 1, printed
    else:
        codes = {"kill": -9, "hang": 3}
        expected = [("ended", codes.get(how, 1) if each == rank else 1) for each in range(RANKS)]
        assert outcomes == expected, printed
        assert text.count("Error: ") - text.count("LookupError: ") == 1, printed
        assert text.count(SHOWN[how].format(rank)) == 1, printed
        assert "Traceback" not in text, printed
    assert text.count("resume with: ") == 1, printed
    (run,) = (folder / "runs/numbers").iterdir()
    reader = CheckpointReader(run / "checkpoints")
    manifests = reader.manifests()
    assert {each.name for each in (run / "checkpoints").glob("E*") if each.is_dir()} == {each.tag for each in manifests}
    for manifest in manifests:
        reader.load(manifest)
    # Rank 0 can be killed before a save in the background is complete; otherwise it saves the last settled state.
    assert (rank == 0 and how in {"kill", "hang"}) or reader.newest().iteration.update >= AT, printed
    outcomes, printed = train(folder, ["train", "--resume", str(run)])
    assert outcomes == [("returned", 0)] * RANKS, printed
    for name, tensors in train_without_fault().items():
        found = last_weights(run)[name]
        assert found.keys() == tensors.keys()
        assert all(found[key].equal(tensor) for key, tensor in tensors.items()), name


@pytest.mark.parametrize(("rank", "phase", "how"), QUICK)
def test_a_fault_of_one_rank_ends_all(rank, phase, how, tmp_path):
    check_fault(tmp_path, rank, phase, how)


def test_an_error_of_all_ranks_is_printed_once(tmp_path):
    write_config(tmp_path)
    for setting, code in (("trainer.max_updats=1", 2), ("data.train.length=0", 2)):
        outcomes, printed = train(tmp_path, ["train", "numbers.yaml", "--set", setting])
        assert [outcome[1] for outcome in outcomes] == [code] * RANKS, printed
        assert "".join(printed).count("Error: ") == 1, printed
        assert printed[0].startswith("Error: "), printed
    assert not (tmp_path / "runs").exists()
    for words in (["plan", "numbers.yaml"], ["callbacks", "noether.EMACallback"]):
        outcomes, printed = train(tmp_path, words)
        assert outcomes == [("returned", None)] * RANKS, printed
        assert printed[0], printed
        assert not printed[1], printed
    outcomes, printed = train(tmp_path, ["train", "--no-such-option"])
    assert [outcome[1] for outcome in outcomes] == [2] * RANKS, printed
    assert (printed[0].count("No such option"), printed[1]) == (1, "")


def test_a_rank_that_leaves_a_smoke_test_is_named(tmp_path):
    write_config(tmp_path)
    outcomes, printed = train(tmp_path, ["train", "numbers.yaml", "--smoke"], 1, "data", "exit")
    assert sorted(outcome[1] for outcome in outcomes) == [0, 1], printed
    assert printed[1] == "rank 1: Error: SystemExit: 0\n", printed
    assert "Error" not in printed[0], printed


TRAIN = ["train", "numbers.yaml"]
UNKNOWN = [*TRAIN, "--set", "trainer.max_updats=1"]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (TRAIN, UNKNOWN, "rank 1: Error: --set trainer.max_updats=1: "),
        (UNKNOWN, TRAIN, "Error: --set trainer.max_updats=1: "),
        (UNKNOWN, UNKNOWN, "Error: --set trainer.max_updats=1: "),
        (TRAIN, ["train", "--no-such-option"], "rank 1: Usage: "),
    ],
    ids=["rank 1", "rank 0", "both", "usage"],
)
def test_a_rank_that_fails_before_it_joins_ends_all(first, second, shown, tmp_path):
    write_config(tmp_path)
    outcomes = outcomes_on_ranks(different_commands, RANKS, tmp_path, first, second, limit_s=60, detail=False)
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in range(RANKS)]
    assert sorted(outcome[1] for outcome in outcomes) == ([2, 2] if first == second else [1, 2]), printed
    assert "".join(printed).startswith(shown), printed
    assert "".join(printed).count("Error: ") == 1, printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "phase", "how"), FAULTS)
def test_each_fault_of_one_rank_ends_all(rank, phase, how, tmp_path):
    check_fault(tmp_path, rank, phase, how)
