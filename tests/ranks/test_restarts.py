"""What a process that torchrun restarts finds of its earlier life."""

from processes import run_on_ranks

from noether.distributed import restarts
from noether.distributed.restarts import Restart


def restart_after_10_s():
    """Return what the first process and its successor find under one command."""
    found = []
    for now_s in (1000.0, 1010.0):
        restarts._STARTS.clear()  # noqa: SLF001  # as in a new process
        restart = Restart("train numbers", wall_s=lambda now_s=now_s: now_s)
        found.append((restart.find(), restart.elapsed_s()))
        restart.note("runs/numbers")
    again = Restart("train numbers", wall_s=lambda: 1020.0)  # the second run of this process
    return [*found, (again.find(), again.elapsed_s())]


def test_a_restarted_process_finds_its_run_and_the_time_that_passed():
    assert run_on_ranks(restart_after_10_s, 1) == [[(None, 0.0), ("runs/numbers", 10.0), (None, 0.0)]]


def test_without_torchrun_nothing_is_found():
    restart = Restart("train numbers")
    restart.note("runs/numbers")
    assert (restart.find(), restart.elapsed_s()) == (None, 0.0)
