"""Refuses evaluation data that is split over processes in a way that noether does not put together again."""

from __future__ import annotations

from typing import Any, Final

from noether.core.errors import NoetherError
from noether.core.object_graph import parts_of_loader

_COUNTS: Final = ("num_replicas", "num_processes")
"""Attributes with the number of shares: of torch's and Lightning's samplers, and of the wrappers of Accelerate."""


class ShardedDataError(NoetherError, ValueError):
    """A loader yields the share of one process, and a callback would take it for the whole data set."""


def check_not_sharded(data: Any, key: str) -> None:
    """Refuse evaluation data that is split over processes, of which a callback would see one share.

    A `Session` on several ranks puts together what it knows, such as loaders with `DistributedSampler`.

    Args:
        data: Anything that yields batches.
        key: The dataset key, for the message.

    Raises:
        ShardedDataError: If the data is split; the message names the loader or sampler that splits it.

    Example:
        >>> from torch.utils.data import DataLoader, DistributedSampler
        >>> data = [1, 2, 3]
        >>> check_not_sharded(DataLoader(data), "val")
        >>> check_not_sharded(DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0)), "val")
        Traceback (most recent call last):
        noether.core.shards.ShardedDataError: data['val'] yields one of 2 shares: its DistributedSampler has ...
    """
    for part in parts_of_loader(data):
        name, count = _find_count(part)
        if count > 1:
            raise ShardedDataError(
                f"data[{key!r}] yields one of {count} shares: its {type(part).__name__} has {name}={count}, and "
                "noether does not put these together, so metrics would be those of one share: pass a loader of the "
                "whole data set, not split by DistributedSampler, accelerator.prepare or split_dataset_by_node"
            )


def _find_count(part: Any) -> tuple[str, int]:
    """Return the attribute that says into how many shares a part of a loader splits the data, and the number."""
    places = [(part, name, name) for name in _COUNTS]
    if type(part).__name__ == "DataLoaderDispatcher":  # of Accelerate
        places.append((getattr(part, "state", None), "num_processes", "state.num_processes"))
    if type(part).__module__.startswith("datasets."):  # of Hugging Face, after split_dataset_by_node
        places.append((getattr(part, "_distributed", None), "world_size", "world_size"))
    for holder, name, shown in places:
        count = getattr(holder, name, None)
        if type(count) is int and count > 1:
            return shown, count
    return "", 1
