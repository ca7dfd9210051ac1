"""What ranks exchange: sums in their order, values in their order, and an error if they exchange different things."""

import math
import threading

import pytest
import torch
from processes import run_on_ranks

from noether.distributed.channel import Channel, RankMismatchError
from noether.distributed.ranks import ONE_PROCESS, join

LONG = "x" * 3000
MISMATCHES = {
    "names": lambda channel, rank: channel.reduce("numbers", sums={"a" if rank else "b": 1.0}),
    "kinds": lambda channel, rank: channel.reduce("numbers", **{"sums" if rank else "largest": {"a": 1.0}}),
    "counts": lambda channel, rank: channel.reduce("numbers", sums={str(i): 1.0 for i in range(rank)}),
    "operations": lambda channel, rank: (
        channel.gather("numbers", 1.0) if rank else channel.reduce("numbers", sums={"a": 1})
    ),
    "places": lambda channel, rank: channel.gather("update" if rank else LONG, {}),
    "sizes": lambda channel, rank: channel.reduce(
        "numbers", means={f"{rank}/{index}": (1.0, 1.0) for index in range(100 * rank)}
    ),
}
"""What ranks may do differently at one point."""


def exchange_everything():
    ranks = join(timeout_s=30)
    rank = ranks.rank
    reduced = ranks.control.reduce(
        "numbers",
        sums={"samples": rank + 1, "third": 1 / 3, "inf": math.inf},
        means={"mse": (rank, rank), "absent": (math.nan, 0), "nan": (math.nan if rank == 1 else 1.0, 1)},
        largest={"signal": rank == 1, "nan_largest": math.nan if rank == 2 else 9.0},
        smallest={"finite": rank != 1, "nan_smallest": math.nan if rank == 0 else -9.0},
        of_rank_0={"time_s": 10.0 + rank},
    )
    counts = ranks.control.collectives, ranks.control.sent_bytes
    tree = {"tensor": torch.full((rank,), float(rank)), "text": "x" * 600 * rank, "tuple": (rank, None)}
    gathered = ranks.saving.gather("trees", tree)
    many, taken = [], []
    for _ in range(2):
        before = ranks.control.collectives
        sums = ranks.control.reduce("many", sums={f"{index:04}": index + rank for index in range(1000)})
        many.append(list(sums.values()))
        taken.append(ranks.control.collectives - before)
    return reduced, gathered, many, (counts, taken)


def test_ranks_exchange_numbers_and_trees():
    results = run_on_ranks(exchange_everything, 3)
    reduced, gathered, many, counts = results[0]
    for name in ("absent", "nan", "nan_largest", "nan_smallest"):
        assert math.isnan(reduced.pop(name)), name
    assert reduced == {
        "samples": 6,
        "third": 1.0,
        "inf": math.inf,
        "mse": 5 / 3,
        "signal": 1,
        "finite": 0,
        "time_s": 10.0,
    }
    assert [each["tuple"] for each in gathered] == [(0, None), (1, None), (2, None)]
    assert [len(each["text"]) for each in gathered] == [0, 600, 1200]
    assert [each["tensor"].tolist() for each in gathered] == [[], [1.0], [2.0, 2.0]]
    assert many == [[3 * index + 3 for index in range(1000)]] * 2
    assert counts == ((1, 1024), [2, 1])
    assert [result[2:] for result in results] == [(many, counts)] * 3


def disagree():
    ranks = join(timeout_s=30)
    errors = {}
    for name, exchange in MISMATCHES.items():
        with pytest.raises(RankMismatchError) as caught:
            exchange(ranks.control, ranks.rank)
        errors[name] = str(caught.value)
    return errors, ranks.control.reduce("after the errors", sums={"ranks": 1})


def test_ranks_that_exchange_different_things_raise_an_error_with_both():
    results = run_on_ranks(disagree, 3)
    errors, after = results[0]
    assert results == [(errors, {"ranks": 3})] * 3
    assert after == {"ranks": 3}
    lines = {name: error.splitlines()[1:] for name, error in errors.items()}
    assert lines["names"] == [f"  rank {rank}: numbers: sums {'b' if rank == 0 else 'a'}" for rank in range(3)]
    assert lines["kinds"][:2] == ["  rank 0: numbers: largest a", "  rank 1: numbers: sums a"]
    assert lines["counts"] == [
        "  rank 0: numbers: nothing",
        "  rank 1: numbers: sums 0",
        "  rank 2: numbers: sums 0, 1",
    ]
    assert lines["operations"][:2] == ["  rank 0: numbers: sums a", "  rank 1: numbers: gather"]
    assert lines["places"][0].startswith("  rank 0: xxx")
    assert "1/99" in lines["sizes"][1]


def use_two_threads():
    ranks = join(timeout_s=30)
    ranks.control.gather("first", 1)
    errors = []

    def exchange():
        try:
            ranks.control.gather("second", 2)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=exchange, name="other")
    thread.start()
    thread.join()
    saved = []
    for number in range(2):  # a thread that has ended leaves its channel to the next
        thread = threading.Thread(target=lambda number=number: saved.append(ranks.saving.gather("save", number)))
        thread.start()
        thread.join()
    return errors, saved


def test_a_channel_refuses_a_second_thread():
    errors, saved = run_on_ranks(use_two_threads, 2)[0]
    assert errors == ["second: thread other uses a channel of thread MainThread; give each thread its own"]
    assert saved == [[0, 0], [1, 1]]


def test_one_process_exchanges_nothing():
    assert join() is ONE_PROCESS
    channel = Channel()
    assert channel.reduce("numbers", largest={"signal": False}) == {"signal": 0.0}
    assert (channel.collectives, channel.sent_bytes) == (0, 0)
