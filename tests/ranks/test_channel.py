"""What ranks exchange: sums in their order, values in their order, and an error if they exchange different things."""

import math

import torch
from processes import run_on_ranks

from noether.distributed.channel import Channel, RankMismatchError
from noether.distributed.ranks import ONE_PROCESS, join


def exchange_everything():
    ranks = join(timeout_s=30)
    rank = ranks.rank
    reduced = ranks.control.reduce(
        "numbers",
        sums={"samples": rank + 1, "third": 1 / 3},
        means={"mse": (rank, rank), "absent": (math.nan, 0)},
        largest={"signal": rank == 1},
        smallest={"finite": rank != 1},
        of_rank_0={"time_s": 10.0 + rank},
    )
    tree = {"tensor": torch.full((rank,), float(rank)), "text": "x" * 600 * rank, "tuple": (rank, None)}
    gathered = ranks.saving.gather("trees", tree)
    mismatch = ""
    try:
        ranks.control.reduce("numbers", sums={"a" if rank else "b": 1.0})
    except RankMismatchError as error:
        mismatch = str(error)
    again = ranks.control.reduce("after the error", sums={"ranks": 1})
    return reduced, gathered, mismatch, again


def test_ranks_exchange_numbers_and_trees():
    results = run_on_ranks(exchange_everything, 3)
    reduced, gathered, mismatch, again = results[0]
    assert math.isnan(reduced.pop("absent"))
    assert reduced == {"samples": 6, "third": 1.0, "mse": 5 / 3, "signal": 1, "finite": 0, "time_s": 10.0}
    assert [each["tuple"] for each in gathered] == [(0, None), (1, None), (2, None)]
    assert [len(each["text"]) for each in gathered] == [0, 600, 1200]
    assert [each["tensor"].tolist() for each in gathered] == [[], [1.0], [2.0, 2.0]]
    assert "rank 0: numbers: sums b" in mismatch
    assert "rank 2: numbers: sums a" in mismatch
    assert again == {"ranks": 3}
    assert [result[2:] for result in results] == [(mismatch, again)] * 3


def test_one_process_exchanges_nothing():
    assert join() is ONE_PROCESS
    assert Channel().reduce("numbers", largest={"signal": False}) == {"signal": 0.0}
