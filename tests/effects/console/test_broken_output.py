"""A standard output that cannot be written: one report, and neither training nor the exit of Python fails."""

import os
import subprocess
import sys

import pytest

LOOP = """
import sys
from noether import AfterEpoch, LogScalars, LogText, TrainState
from noether.effects import open_run

state = TrainState()
with open_run(sys.argv[1]) as directory:
    for _ in range(3):
        state = state.advance(samples=4)
        directory.interpreter([LogText("x" * 10_000), LogScalars({"loss": 0.5})], state, AfterEpoch())
"""


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def run_loop(folder, output, **settings):
    """Run a loop with a standard output; return its exit code and what it writes to the standard error."""
    process = subprocess.run(
        [sys.executable, "-c", LOOP, folder / "run"], stdout=output, stderr=subprocess.PIPE, text=True, check=False,
        timeout=240, env=BUFFERED, **settings,
    )  # fmt: skip
    assert (folder / "run/metrics.jsonl").read_text().count("\n") == 3
    return process.returncode, process.stderr


def assert_reported_once(code, errors, reason):
    first, second = errors.splitlines()
    assert first.startswith("console failed and may have lost log entries; training continues: ")
    assert reason in first
    assert second == "console failed 6 times in total"
    assert code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")  # noqa: PTH110  # a device
def test_a_full_disk_is_reported_once(tmp_path):
    with open("/dev/full", "w") as full:  # noqa: PTH123  # a device
        assert_reported_once(*run_loop(tmp_path, full), "No space left on device")


def test_a_closed_pipe_is_reported_once(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    assert_reported_once(*run_loop(tmp_path, write_end), "Broken pipe")
    os.close(write_end)


def test_a_process_without_a_standard_output_trains(tmp_path):
    """As in `python loop.py >&-`."""
    assert run_loop(tmp_path, None, preexec_fn=lambda: os.close(1)) == (0, "")


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    program = LOOP.replace('"x" * 10_000', '"\u4e00"')
    process = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "run"], env={**BUFFERED, "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    assert process.stderr == ""
    assert process.stdout.count(r"\u4e00") == 3
