"""A run that a signal or a kill ends in a real process is resumed to the same bits."""

import contextlib
import json
import os
import shlex
import shutil
import signal

import pytest
from command import PATIENCE_S, check_equal, invoke, lines, noether, only_run, start, timeless, wait_until


@pytest.fixture(scope="module")
def uncut(paper):
    return only_run(paper / "out/paper")


# The training thread writes checkpoints, so that all are complete when a run is killed.
SAVED = ("--set", "trainer.checkpoints.async=false")


@pytest.fixture
def holding(paper, tmp_path):
    """Start a run that waits in the middle of an update; return its process."""
    started = []

    def start_holding(*arguments, at, config="paper.yaml", output=tmp_path, cwd=paper, **environment):
        words = ("train", config, "--set", f"run.output={output}", *arguments)
        process = start(*words, cwd=cwd, HOLD_AT=at, HOLD_IN=tmp_path, **environment)
        started.append(process)
        wait_until((tmp_path / "holding").exists, process)
        return process

    yield start_holding
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "whole_group", "workers"),
    [
        (signal.SIGINT, True, 0),
        (signal.SIGTERM, False, 0),
        pytest.param(signal.SIGINT, True, 2, marks=pytest.mark.slow),
        (signal.SIGTERM, True, 2),
    ],
)
def test_a_run_interrupted_by_a_signal_can_be_resumed(paper, tmp_path, holding, uncut, number, whole_group, workers):
    """Ctrl-C reaches the whole process group with its data workers; `kill` reaches one process."""
    process = holding("--set", f"trainer.num_workers={workers}", at=20)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (128 + number, "")
    run = only_run(tmp_path / "paper")
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert output.count(f"{name}: stopping after this update and saving; again: end now without saving\n") == 1
    assert output.splitlines()[-2:] == [
        f"interrupted at E1_U20_S80; the run is in {run}",
        f"resume with: noether train --resume {run}",
    ]
    with pytest.raises(ProcessLookupError):  # the group has no processes
        os.killpg(process.pid, 0)
    assert json.loads((run / "summary.json").read_text())["ending"] == "interrupted at E1_U20_S80"
    assert [path.name for path in (run / "checkpoints").glob("E*")].count("E1_U20_S80") == 1
    _, *arguments = shlex.split(output.splitlines()[-1].removeprefix("resume with: "))
    shown = invoke(*arguments, cwd=paper)
    assert shown.splitlines()[0] == "resuming at E1_U20_S80"
    assert shown.splitlines()[-1] == f"ended at E3_U45_S180; the run is in {run}"
    check_equal(run, uncut)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(tmp_path, holding, number):
    process = holding(*SAVED, at=20, HOLD_ON="yes")
    process.send_signal(number)
    wait_until((tmp_path / "caught").exists, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (-number, "")
    assert "interrupted" not in output
    assert sorted(path.name for path in (only_run(tmp_path / "paper") / "checkpoints").glob("E*")) == ["E1_U15_S60"]


def test_a_killed_run_resumes_from_its_newest_checkpoint(paper, tmp_path, holding, uncut):
    process = holding(*SAVED, at=22)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    run = only_run(tmp_path / "paper")
    flushed, before = timeless(run), [line for line in lines(uncut) if line["update"] <= 21]
    assert flushed == timeless(uncut)[: len(flushed)]
    assert 15 <= flushed[-1]["update"] <= 21  # lines after the checkpoint may not have been flushed
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in before[len(flushed) :])  # as if all had been flushed
        file.write('{"event": "after_up')  # a partial line
    (run / "checkpoints/.tmp-E2_U30_S120").mkdir()  # a partial checkpoint
    output = noether("train", "--resume", run, cwd=paper).stdout
    assert output.splitlines()[0] == "resuming at E1_U15_S60"
    check_equal(run, uncut)
    assert not (run / "checkpoints/.tmp-E2_U30_S120").exists()


def test_a_run_killed_before_its_first_save_starts_again(paper, tmp_path, holding, uncut):
    process = holding(at=3)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    run = only_run(tmp_path / "paper")
    assert [line["update"] for line in timeless(run)] in ([1], [1, 2])  # the second may not have been flushed
    output = invoke("train", "--resume", run, cwd=paper)
    assert output.splitlines()[0] == f"{run} has no checkpoint: training starts at update 0"
    check_equal(run, uncut)


def test_the_hint_is_the_complete_command_that_resumes(paper, tmp_path, tmp_path_factory, holding):
    """The folder may need quotes; an allowed prefix is not part of the configuration."""
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
