"""A run that a signal or a crash ends, in a real process, goes on to the same bits."""

import contextlib
import json
import os
import shlex
import shutil
import signal

import pytest
from command import PATIENCE_S, invoke, lines, noether, only_run, saved, start, timeless, until

EXACT = ("weights.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def uncut(paper):
    return only_run(paper / "out/paper")


# Checkpoints are written by the thread that trains, so that all of them are there when a run is killed.
SAVED = ("--set", "trainer.checkpoints.async=false")


@pytest.fixture
def holding(paper, tmp_path):
    """Start a run that holds still in the middle of an update; return its process."""
    started = []

    def begin(*arguments, at, config="paper.yaml", output=tmp_path, cwd=paper, **environment):
        words = ("train", config, "--set", f"run.output={output}", *arguments)
        process = start(*words, cwd=cwd, HOLD_AT=at, HOLD_IN=tmp_path, **environment)
        started.append(process)
        until((tmp_path / "holding").exists, process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def check_equal(run, uncut):
    assert saved(run, *EXACT) == saved(uncut, *EXACT)
    assert timeless(run) == timeless(uncut)


@pytest.mark.parametrize(
    ("number", "whole_group", "workers"),
    [(signal.SIGINT, True, 0), (signal.SIGTERM, False, 0), (signal.SIGINT, True, 2), (signal.SIGTERM, True, 2)],
)
def test_a_signal_ends_a_run_that_can_go_on(paper, tmp_path, holding, uncut, number, whole_group, workers):
    """Ctrl-C reaches the whole group of the process, workers that load data among it; `kill` reaches the process."""
    process = holding("--set", f"trainer.num_workers={workers}", at=20)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (128 + number, "")
    run = only_run(tmp_path / "paper")
    assert output.splitlines()[-2:] == [
        f"interrupted at E1_U20_S80; the run is in {run}",
        f"resume with: noether train --resume {run}",
    ]
    with pytest.raises(ProcessLookupError):  # nobody is left of it
        os.killpg(process.pid, 0)
    assert json.loads((run / "summary.json").read_text())["ending"] == "interrupted at E1_U20_S80"
    assert [path.name for path in (run / "checkpoints").glob("E*")].count("E1_U20_S80") == 1
    _, *arguments = shlex.split(output.splitlines()[-1].removeprefix("resume with: "))
    shown = invoke(*arguments, cwd=paper)
    assert shown.splitlines()[0] == "resuming at E1_U20_S80"
    assert shown.splitlines()[-1] == f"ended at E3_U45_S180; the run is in {run}"
    check_equal(run, uncut)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(tmp_path, holding, number):
    process = holding(*SAVED, at=20, HOLD_ON="yes")
    process.send_signal(number)
    until((tmp_path / "caught").exists, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (-number, "")
    assert "interrupted" not in output
    assert sorted(path.name for path in (only_run(tmp_path / "paper") / "checkpoints").glob("E*")) == ["E1_U15_S60"]


def test_a_killed_run_goes_on_at_its_newest_checkpoint(paper, tmp_path, holding, uncut):
    process = holding(*SAVED, at=22)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    run = only_run(tmp_path / "paper")
    there, before = timeless(run), [line for line in lines(uncut) if line["update"] <= 21]
    assert there == timeless(uncut)[: len(there)]
    assert 15 <= there[-1]["update"] <= 21  # those after the checkpoint may have waited
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in before[len(there) :])  # as if none had
        file.write('{"event": "after_up')  # as a line that was being written
    (run / "checkpoints/.tmp-E2_U30_S120").mkdir()  # as a checkpoint that was being written
    output = noether("train", "--resume", run, cwd=paper).stdout
    assert output.splitlines()[0] == "resuming at E1_U15_S60"
    check_equal(run, uncut)
    assert not (run / "checkpoints/.tmp-E2_U30_S120").exists()


def test_a_run_killed_before_its_first_save_begins_anew(paper, tmp_path, holding, uncut):
    process = holding(at=3)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    run = only_run(tmp_path / "paper")
    assert [line["update"] for line in timeless(run)] in ([1], [1, 2])  # the second may have waited
    output = invoke("train", "--resume", run, cwd=paper)
    assert output.splitlines()[0] == f"{run} has no checkpoint: training starts at update 0"
    check_equal(run, uncut)


def test_the_hint_says_all_that_is_needed_to_go_on(paper, tmp_path, tmp_path_factory, holding):
    """The folder may need quotes, and a prefix that was allowed is not in the configuration."""
    library = tmp_path_factory.mktemp("library")  # not below the working directory
    for name in ("paper.py", "paper.yaml"):
        shutil.copy(paper / name, library)
    process = holding(
        "--allow", "paper", at=1, config=library / "paper.yaml", output="an output", cwd=tmp_path, PYTHONPATH=library
    )
    process.terminate()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (143, "")
    run = only_run(tmp_path / "an output/paper").relative_to(tmp_path)
    assert output.splitlines()[-1] == f"resume with: noether train --resume '{run}' --allow paper"
