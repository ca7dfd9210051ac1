"""What holds for all tests."""

import compileall
import gc
import os
import signal
import threading
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
import torch
from hypothesis import Phase, settings
from law_examples import select_examples

from noether.testing import counterexamples
from noether.training.runs import start_panel

ROOT = Path(__file__).parents[1]

# The models here are so small that a second thread only waits for the first, here and in each process that a test
# starts, where it would take the processor from another test meanwhile.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Under `nohup` SIGHUP is ignored, here and in every process that a test starts, where a run then ignores it, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Likewise SIGINT, where a script starts the tests with `&`.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A run prints a line if its model takes seconds to build. Here, that would depend on how busy the machine is.
start_panel._BUILDING_AFTER_S = threading.TIMEOUT_MAX  # noqa: SLF001  # no user sets it

# A deadline is a timed assertion: it fails on a busy machine, not on a wrong program. To explain a failure, hypothesis
# varies every part of the simplest example: `hypothesis.find`, which doctests call, spends most of its time on that.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("noether", settings(), deadline=None, phases=PHASES)
settings.load_profile("noether")

# There are no doctests here, and several folders have a module of this name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]

# Each is several times as long as most files. Workers of pytest-xdist take the files in this order, and would
# otherwise end minutes apart: one would begin the longest file when the others are done.
LONGEST_FIRST = (
    "test_compiled",
    "test_every_law",
    "test_habits",
    "test_train",
    "test_crashes",
    "test_damage",
    "test_endings",
    "test_signals",
    "README",
)


@pytest.fixture
def first_counterexample(monkeypatch):
    """A broken law raises the error of the first example that breaks it; to find the simplest one takes longer."""
    monkeypatch.setattr(counterexamples, "_PHASES", (Phase.generate,))


def pytest_configure(config):
    select_examples(config.option.markexpr)
    if not hasattr(config, "workerinput"):  # not a worker of pytest-xdist
        # Where Python writes no bytecode, each process that a test starts would compile the library again.
        mode = PycInvalidationMode.CHECKED_HASH  # not by time: an edit may follow within the same second
        compileall.compile_dir(ROOT / "noether", quiet=2, invalidation_mode=mode)


def pytest_collection_finish():
    # Else each full collection searches 10,000 collected tests and every library, which no test frees.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
