"""The share of one rank in work that all ranks do together."""

from __future__ import annotations


def share_of(rank: int, world_size: int, count: int) -> range:
    """Return the items of one rank, of `count` items in order: contiguous, and of sizes that differ by at most one.

    The shares of all ranks, one after the other, are all items, each once.

    Args:
        rank: Index of the process, `0 <= rank < world_size`.
        world_size: Number of processes.
        count: Number of items, >= 0.

    Example:
        >>> [list(share_of(rank, 3, 5)) for rank in range(3)]
        [[0], [1, 2], [3, 4]]
    """
    return range(rank * count // world_size, (rank + 1) * count // world_size)
