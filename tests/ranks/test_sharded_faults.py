"""Faults of one rank in runs with shards: a signal saves on all ranks, an error on none, and the run resumes."""

import pytest
import yaml
from faulty_runs import CONFIG, command
from processes import outcomes_on_ranks

from noether.effects.checkpoints.reader import CheckpointReader
from noether.testing import same

RANKS = 2
TERMINATED = 143
WIDE = """\
from torch import nn

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 256), nn.Linear(256, 1))

    def forward(self, x):
        return self.layers(x)
"""
FAULTS = [
    (0, "commit", "kill"),
    (0, "commit", "full"),
    (1, "save", "kill"),
    (1, "save", "full"),
    (1, "save", "hang"),
    (1, "step", "raise"),
    (0, "evaluation", "signal"),
]


def train(folder, words, *fault):
    outcomes = outcomes_on_ranks(command, RANKS, folder, words, *fault, limit_s=60, detail=False)
    return outcomes, [(folder / f"{rank}.txt").read_text() for rank in range(RANKS)]


def last_state(run):
    reader = CheckpointReader(run / "checkpoints")
    return reader.load(reader.find("latest"))


def check_fault(folder, rank, phase, how):
    (folder / "wide.py").write_text(WIDE)
    timeout_s = 3 if how == "hang" else 60
    trainer = {**CONFIG["trainer"], "parallel": "shard", "rank_timeout_s": timeout_s}
    config = {**CONFIG, "model": {"kind": "wide.Wide"}, "trainer": trainer}
    (folder / "numbers.yaml").write_text(yaml.safe_dump(config))
    outcomes, printed = train(folder, ["train", "numbers.yaml"], rank, phase, how)
    text = "".join(printed)
    (run,) = (folder / "runs/numbers").iterdir()
    reader = CheckpointReader(run / "checkpoints")
    for manifest in reader.manifests():
        reader.load(manifest)
    newest = reader.newest()
    assert "weights-00001-of-00002.safetensors" in newest.parts
    if how == "signal":
        assert outcomes == [("returned", TERMINATED)] * RANKS, printed
        assert text.count("Error") == 0, printed
        assert text.count("saved E") == 1, printed
        assert newest.iteration.update >= 5
    else:
        assert all(outcome != ("returned", 0) for outcome in outcomes), printed
        assert text.count(f"rank {rank}") >= 1, printed
        assert "Traceback" not in text, printed
    outcomes, printed = train(folder, ["train", "--resume", str(run)])
    assert outcomes == [("returned", 0)] * RANKS, printed
    return last_state(run)


def test_a_signal_to_one_rank_saves_the_shards_of_all(tmp_path):
    check_fault(tmp_path, 1, "step", "signal")


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "phase", "how"), FAULTS)
def test_a_fault_of_one_rank_ends_all_and_the_run_resumes_exactly(rank, phase, how, tmp_path):
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    uncut.mkdir()
    cut.mkdir()
    expected = check_fault(uncut, 1, "step", "signal")
    assert same(check_fault(cut, rank, phase, how), expected)
