"""A rank that fails, is killed or hangs ends all ranks, and all of them name it."""

import logging
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from processes import outcomes_on_ranks, run_on_ranks

from noether.core.tensors.torch_internals import default_store
from noether.distributed import ranks as module
from noether.distributed.failures import Failures, RankError
from noether.distributed.launch import LaunchError
from noether.distributed.ranks import ONE_PROCESS, current_ranks, join, leave_at_end

TIMEOUT_S = 2


def join_impatient_ranks():
    """Return ranks that wait for a short time, but not while the processes start."""
    join(timeout_s=60)
    return join(timeout_s=TIMEOUT_S)


def reduce_gradients(ranks):
    with ranks.failures.explain("reduction of gradients"):
        dist.all_reduce(torch.ones(1000), group=ranks.training)


COLLECTIVES = {
    "reduction of gradients": reduce_gradients,
    "losses": lambda ranks: ranks.control.reduce("losses", sums={"samples": 1}),
    "save": lambda ranks: ranks.saving.gather("save", "x" * 2000),
}


def fail(ranks, how):
    if how == "raise":
        ranks.failures.report(ValueError("no such file"))
        raise ValueError("no such file")
    if how == "kill":
        signal.raise_signal(signal.SIGKILL)
    while ranks.failures.first() is None:  # hangs until the others give up
        time.sleep(0.05)
    os._exit(3)


def meet_failure(what, faulty, how):
    """Return the failure that each other rank raises, and whether that rank shows it."""
    ranks = join_impatient_ranks()
    COLLECTIVES[what](ranks)  # works
    if ranks.rank == faulty:
        fail(ranks, how)
    with pytest.raises(RankError) as caught:
        COLLECTIVES[what](ranks)
    failure = caught.value.failure
    assert ranks.failures.first() == failure
    assert ranks.failures.report(KeyError("a later error")) == failure
    return str(caught.value), failure.rank, failure.reporter


ABSENT = "rank {0} ended or hangs during {1}"
EXPECTED = {
    ("raise", "plain"): "rank {0} failed: ValueError: no such file",
    ("kill", "plain"): "rank {0} ended without a message (killed, or out of memory?) during {1}",
    ("hang", "plain"): "rank {0} hangs: the others waited 2 s for it in {1}",
    ("raise", "detail"): "rank {0} failed: ValueError: no such file",
    ("kill", "detail"): ABSENT,
    ("hang", "detail"): ABSENT,
}


def check_failure(what, faulty, how, debug):
    outcomes = outcomes_on_ranks(meet_failure, 3, what, faulty, how, limit_s=30, detail=debug == "detail")
    learned = [value for kind, value in outcomes if kind == "returned"]
    assert len(learned) == 2, outcomes
    assert learned[0] == learned[1]
    text, rank, reporter = learned[0]
    assert text == EXPECTED[how, debug].format(faulty, what)
    assert rank == faulty
    assert (reporter == faulty) == (how == "raise")


def test_all_ranks_name_the_rank_that_hangs():
    check_failure("losses", 1, "hang", "plain")


@pytest.mark.slow
@pytest.mark.parametrize("what", COLLECTIVES)
@pytest.mark.parametrize("faulty", range(3))
@pytest.mark.parametrize(("how", "debug"), EXPECTED)
def test_all_ranks_name_the_rank_that_failed_in_each_collective(what, faulty, how, debug):
    check_failure(what, faulty, how, debug)


def explain_error(failures, what, message):
    """Return the error of a collective that fails with a message."""
    with pytest.raises(RankError) as caught, failures.explain(what):
        raise RuntimeError(message)
    return str(caught.value)


def test_ranks_that_wait_in_different_places_name_them():
    store = dist.HashStore()
    store.set("arrived/1", "save")
    failures = [Failures(store, rank=rank, world_size=2, timeout_s=2.0) for rank in range(2)]
    expected = "the ranks lost each other after up to 2 s: rank 0 in losses, rank 1 in save"
    assert explain_error(failures[0], "losses", "Timed out waiting 2000ms for recv") == expected
    assert explain_error(failures[1], "save", "Connection closed by peer") == expected


def test_a_rank_that_works_for_too_long_is_named_with_its_work_and_the_setting():
    store = dist.HashStore()
    worker, waiting = (Failures(store, rank=rank, world_size=2, timeout_s=2.0) for rank in range(2))
    with worker.announce_work("an earlier save"):
        pass
    with worker.announce_work("a save at E1_U8_S32"):
        text = explain_error(waiting, "time of AfterEpoch", "Timed out waiting 2000ms for recv")
    assert text == (
        "rank 0 hangs in a save at E1_U8_S32, or needs longer for it than the 2 s for which the others waited in time "
        "of AfterEpoch: trainer.rank_timeout_s sets how long they wait"
    )


def test_a_rank_that_has_ended_its_work_hangs_elsewhere():
    store = dist.HashStore()
    worker, waiting = (Failures(store, rank=rank, world_size=2, timeout_s=2.0) for rank in range(2))
    with worker.announce_work("a save at E1_U8_S32"):
        pass
    text = explain_error(waiting, "losses", "Timed out waiting 2000ms for recv")
    assert text == "rank 0 hangs: the others waited 2 s for it in losses"


def test_the_rank_that_a_monitored_barrier_names_is_to_blame():
    for named, expected in (("Ranks 2", "rank 2"), ("Ranks 2, 3", "one of ranks 2, 3")):
        failures = Failures(dist.HashStore(), rank=0, world_size=4, timeout_s=2.0)
        text = explain_error(failures, "losses", f"[Rank 0]: {named} failed to pass monitoredBarrier in 2000 ms")
        assert text == f"{expected} ended or hangs during losses"


def test_an_error_of_this_rank_in_a_collective_is_its_own():
    failures = Failures(dist.HashStore(), rank=0, world_size=2, timeout_s=2.0)
    with pytest.raises(RuntimeError, match="invalid tensor size"), failures.explain("losses"):
        raise RuntimeError("invalid tensor size")
    with pytest.raises(torch.OutOfMemoryError), failures.explain("losses"):
        raise torch.OutOfMemoryError("timed out")
    assert failures.first() is None


def test_a_collective_of_the_model_blames_the_rank_that_is_gone():
    failures = Failures(dist.HashStore(), rank=1, world_size=2, timeout_s=2.0)
    message = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:6378: Connection reset by peer."
    failure = failures.report(RuntimeError(message))
    assert (failure.rank, failure.reporter) == (0, 1)
    assert failure.text == "rank 0 ended without a message (killed, or out of memory?) during a collective"
    own = Failures(dist.HashStore(), rank=1, world_size=2, timeout_s=2.0)
    assert own.report(ConnectionResetError("Connection reset by peer")).rank == 1


def wait_in_different_places():
    ranks = join_impatient_ranks()
    ranks.control.reduce("losses", sums={"samples": 1})
    with pytest.raises(RankError) as caught:
        COLLECTIVES["save" if ranks.rank else "losses"](ranks)
    return str(caught.value)


@pytest.mark.slow
def test_processes_that_wait_in_different_places_name_them():
    expected = "the ranks lost each other after up to 2 s: rank 0 in losses, rank 1 in save"
    assert run_on_ranks(wait_in_different_places, 2, detail=False) == [expected] * 2


@leave_at_end()
def fail_in_block():
    join(timeout_s=30)
    raise ValueError(f"of rank {dist.get_rank()}")


def leave_groups():
    """Return what an earlier block left behind, and whether an error of a later one is reported."""
    join(timeout_s=60)
    before = current_ranks()
    for _ in range(2):
        with leave_at_end():
            ranks = join(timeout_s=30)
            ranks.control.reduce("ranks", sums={"ranks": 1})
            assert current_ranks() is ranks
    assert current_ranks() is before
    with pytest.raises(ValueError, match="of rank"):
        fail_in_block()
    return str(current_ranks().failures.first())


def test_ranks_leave_their_groups_unless_one_failed():
    first, second = run_on_ranks(leave_groups, 2)
    assert first == second
    assert first.startswith("rank ")
    assert "ValueError: of rank" in first


def join_again():
    results = []
    for _ in range(2):
        ranks = join(timeout_s=30)
        again = join(timeout_s=30)  # adopts the group of the first
        ranks.failures.report(ValueError("of an earlier run"))
        results.append((again.failures.first(), again.control.reduce("ranks", sums={"ranks": 1})["ranks"]))
        dist.barrier()
        dist.destroy_process_group()
    return results


def test_ranks_join_again_and_adopt_a_group():
    assert run_on_ranks(join_again, 2) == [[(None, 2), (None, 2)]] * 2


@pytest.mark.parametrize("missing", ["MASTER_ADDR, MASTER_PORT", "TORCHELASTIC_RUN_ID"])
def test_an_incomplete_launch_says_how_to_start(missing, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    for name in missing.split(", "):
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=rf"WORLD_SIZE is set to 2, but not {missing}: start .* torchrun"):
        join()


def test_processes_of_slurm_are_independent(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert join() is ONE_PROCESS


def wait_alone():
    try:
        join(timeout_s=1)
    except LaunchError as error:
        return str(error)


@pytest.mark.slow
def test_a_rank_that_no_other_joins_says_so():
    text = run_on_ranks(wait_alone, 1, environment={"WORLD_SIZE": "2"})[0]
    assert text == "rank 0 waited 1 s for the others to join: rank 1 did not"


def join_on_rank_0_only():
    """Return the warning and the error of the rank that joins alone."""
    dist.init_process_group("gloo")
    if dist.get_rank() > 0:
        return default_store().wait(["rank 0 gave up"])
    warnings, module.LONG_WAIT_S = [], 0.1
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger(module.__name__).addHandler(handler)
    with pytest.raises(LaunchError) as caught:
        join(timeout_s=0.3)
    default_store().set("rank 0 gave up", "")
    return warnings, str(caught.value)


def test_a_rank_that_joins_alone_names_the_others_and_what_to_write():
    warnings, error = run_on_ranks(join_on_rank_0_only, 3)[0]
    assert [each.partition(":")[0] for each in warnings] == [
        "rank 0 has waited 0.1 s for ranks 1, 2 of the process group"
    ]
    assert error.startswith("rank 0 has waited 0.3 s for ranks 1, 2 of the process group: make the Session (or call")
    assert "not inside of `if rank == 0:`" in error
