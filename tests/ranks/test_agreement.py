"""Before anything is written, all ranks have the same configuration, data and disk; else all refuse with the reason."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from processes import outcomes_on_ranks, run_on_ranks
from recorded_runs import make_config

import noether
from noether.config import ConfigError
from noether.config.loading import from_source
from noether.config.values import source_from_values
from noether.training.runs.smoke import smoke_test

ALLOW = ["recorded_runs"]


def refusals_of_new_runs(folder):
    """Return what each rank says of runs that differ between ranks, and the files after that."""
    said = []
    with contextlib.chdir(folder):
        rank = int(os.environ["RANK"])
        other_rate = make_config() | {"optimizer": {"kind": "torch.optim.Adam", "lr": 0.01 + rank}}
        other_data = make_config()
        other_data["data"]["train"] = {"kind": "recorded_runs.Shares"}
        other_seed = make_config() | {"run": {"name": "fields", "output": "out"} | ({"seed": 3} if rank else {})}
        other_model = make_config()
        other_model["model"]["kind"] = "recorded_runs.UnseededNetwork"
        for config in (other_rate, other_data, other_seed, make_config(device="cuda:0"), other_model):
            with pytest.raises(ConfigError) as refused:
                noether.train(config, allow=ALLOW)
            said.append(str(refused.value))
        return said, [path.name for path in Path().iterdir()]


def test_ranks_that_differ_are_refused_on_all_of_them(tmp_path):
    results = run_on_ranks(refusals_of_new_runs, 2, tmp_path)
    assert results[0] == results[1]
    said, files = results[0]
    assert files == []
    rate, data, seed, device, model = said
    assert "optimizer.lr: is 0.01 on rank 0 and 1.01 on rank 1; give all ranks the same configuration" in rate
    assert "data: samples/train is 24 on rank 0 and 23 on rank 1; all ranks need the same data" in data
    assert "run.seed: is 0 on rank 0 and 3 on rank 1" in seed
    assert "trainer.device: 'cuda:0' is one device, and each process needs its own; write 'cuda'" in device
    assert "model: layers.3.weight has other initial values on rank 1 than on rank 0: draw them by" in model


def resume_elsewhere(folder):
    """Resume a run on all ranks, of which rank 1 sees a folder without its checkpoints."""
    with contextlib.chdir(folder):
        run = noether.train(make_config(max_updates=2), allow=ALLOW)
    if run.rank == 1:
        (folder / "elsewhere" / run.directory).mkdir(parents=True)
        shutil.copy(folder / run.directory / "config.yaml", folder / "elsewhere" / run.directory)
        os.chdir(folder / "elsewhere")
    else:
        os.chdir(folder)
    noether.train(resume=run.directory, overrides=["trainer.max_updates=4"], allow=ALLOW)


def test_a_rank_that_does_not_see_the_checkpoint_says_so(tmp_path):
    (_, first), (kind, second) = outcomes_on_ranks(resume_elsewhere, 2, tmp_path)
    (run,) = (tmp_path / "out/fields").iterdir()
    path = tmp_path / "elsewhere/out/fields" / run.name / "checkpoints/E0_U2_S14"
    message = (
        f"CheckpointError: rank 1 does not see {path}, which rank 0 does: put run.output on a disk that all ranks share"
    )
    assert kind == "raised"
    assert second.startswith(message)
    assert first.startswith("RankError: rank 1")
    assert "max_updates: 2\n" in (run / "config.yaml").read_text()


def move_and_branch(folder):
    """Try a run; then return where it is after it was moved, and where a run that starts at a checkpoint of it is."""
    with contextlib.chdir(folder):
        smoke_test(from_source(source_from_values(make_config()), ALLOW))
        run = noether.train(make_config(max_updates=4), allow=ALLOW)
        overrides = ["trainer.max_updates=8", "run.output=moved"]
        moved = noether.train(resume=run.directory, overrides=overrides, allow=ALLOW)
        branch = noether.train(
            resume=moved.directory, checkpoint="E1", into="branch", overrides=["trainer.max_updates=12"], allow=ALLOW
        )
        again = noether.train(resume="branch", checkpoint="newest", allow=ALLOW)
    return run.directory, moved.directory, branch.directory, branch.ending, again.ending, again.rank


def test_rank_0_tries_moves_and_branches_a_run(tmp_path):
    results = run_on_ranks(move_and_branch, 2, tmp_path)
    run, moved, branch, *endings = results[0]
    assert results[1] == (run, moved, branch, *endings[:2], 1)
    assert not (tmp_path / run).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branch", "moved", "out"]
    assert moved == Path("moved/fields") / run.name
    assert endings == ["ended at E3_U12_S72"] * 2 + [0]
    assert "branched_from" in (tmp_path / branch / "summary.json").read_text()
