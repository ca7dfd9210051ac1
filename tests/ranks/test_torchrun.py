"""The command line under the real torchrun: a killed worker is restarted, and a signal to torchrun saves the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from faulty_runs import CONFIG

from noether.effects.checkpoints.reader import CheckpointReader

HERE = Path(__file__).parent
LIMIT_S = 120
"""A safeguard against processes that hang, not a measurement."""

pytestmark = pytest.mark.slow


def start(folder, *words, at, rank, **trainer):
    kill = {"kind": "faulty_runs.KillOnce", "at": at, "rank": rank}
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], **trainer}, "callbacks": [*CONFIG["callbacks"], kill]}
    (folder / "numbers.yaml").write_text(yaml.safe_dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    command = [*torchrun, "-m", "noether", "train", "numbers.yaml", "--allow", "faulty_runs"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    with (folder / "printed.txt").open("wb") as file:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)


def test_torchrun_restarts_a_killed_worker_which_resumes_its_own_run(tmp_path):
    process = start(tmp_path, "--max-restarts=1", at=5, rank=1)
    code = process.wait(LIMIT_S)
    printed = (tmp_path / "printed.txt").read_text()
    assert code == 0, printed
    assert printed.count("Error: rank 1 ended without a message") == 1
    assert printed.count("resuming at E1_U5_S40 on 2 ranks") == 1
    assert printed.count("ended at E4_U12_S96") == 1
    assert len([*(tmp_path / "runs/numbers").iterdir()]) == 1


def test_a_restart_after_the_time_limit_ends_at_once(tmp_path):
    process = start(tmp_path, "--max-restarts=2", at=5, rank=1, max_hours=1e-9, max_updates=100)
    assert process.wait(LIMIT_S) == 1
    printed = (tmp_path / "printed.txt").read_text()
    assert printed.count("trainer.max_hours (1e-09) has passed") == 3, printed
    assert "is too short" not in printed
    (run,) = (tmp_path / "runs/numbers").iterdir()
    assert CheckpointReader(run / "checkpoints").newest().iteration.update <= 3


def test_torchrun_without_restarts_names_the_killed_rank(tmp_path):
    process = start(tmp_path, at=5, rank=1)
    code = process.wait(LIMIT_S)
    printed = (tmp_path / "printed.txt").read_text()
    assert code == 1, printed
    _, cause = printed.split("Root Cause")
    assert "rank      : 1" in cause
    assert printed.count("Error: rank 1 ended without a message") == 1


def test_a_signal_to_torchrun_saves_the_run_once(tmp_path):
    process = start(tmp_path, at=5, rank=None)
    pause = tmp_path / "paused"
    deadline_s = time.monotonic() + LIMIT_S
    while not pause.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(LIMIT_S)
    printed = (tmp_path / "printed.txt").read_text()
    assert printed.count("saved E") == 1, printed
    assert printed.count("interrupted at E") == 1, printed
    assert "Error:" not in printed
    (run,) = (tmp_path / "runs/numbers").iterdir()
    assert CheckpointReader(run / "checkpoints").newest().iteration.update >= 5
