"""The shard of a stream that one rank reads, and the check that all ranks are at one position of the whole stream."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any

from noether.core.errors import NoetherError
from noether.effects.disk.encoding import encode_tree
from noether.effects.disk.tensor_files import tensor_pieces
from noether.training.data.readers import position_of

if TYPE_CHECKING:
    import torch

    from noether.core.run import Run
    from noether.core.state import Memory


class StreamShardError(NoetherError, ValueError):
    """The shards of a stream do not make up the stream, so a run would depend on the number of ranks."""


def shard_stream(dataset: Any, rank: int, world_size: int, *, num_workers: int = 0) -> Any:
    """Return the stream that one rank reads: what `dataset.shard(rank, world_size)` returns.

    It yields the samples `rank`, `rank + world_size` and so on of each epoch of the whole stream, and then ends. Its
    `state_dict()` is the position of all ranks in the whole stream: after its k-th sample of an epoch that is
    `k * world_size` samples, and after the end of an epoch the start of the next one. So it is the same on all ranks,
    and `load_state_dict()` of the stream, and of the shards for any number of ranks, continues from there.

    Args:
        dataset: The whole stream.
        rank: Index of the process.
        world_size: Number of processes, > 1.
        num_workers: Processes of each rank that would read the stream.

    Raises:
        TypeError: If the stream has no such method, or workers would share what a rank reads: then its order would
            depend on the number of ranks.
        StreamShardError: If the shard does not start at the position of the stream.
    """
    kind = type(dataset).__name__
    if num_workers:
        raise TypeError(
            f"{kind} is a stream, and the workers of {world_size} ranks would read it in an order that depends on the "
            "number of ranks: set trainer.num_workers: 0"
        )
    if not _takes_rank(getattr(dataset, "shard", None)):
        raise TypeError(
            f"{kind} is a stream, and each of the {world_size} ranks would read all of it: give it a method "
            "shard(rank, world_size) that returns a stream of the samples rank, rank + world_size, ... of each epoch, "
            "whose state_dict() is the position of all ranks in the whole stream, the same on each"
        )
    shard = dataset.shard(rank=rank, world_size=world_size)
    missing = [name for name in ("__iter__", "state_dict", "load_state_dict") if not hasattr(shard, name)]
    if missing:
        raise TypeError(
            f"{kind}.shard returns a {type(shard).__name__} without {', '.join(missing)}: return a stream with these"
        )
    if _digest(position_of(shard)) != _digest(position_of(dataset)):
        raise StreamShardError(
            f"the state_dict of {kind}.shard({rank}, {world_size}) is not that of the whole stream at its start: "
            "return the position in the whole stream, without anything that only one rank has"
        )
    return shard


def _takes_rank(shard: Any) -> bool:
    """Return whether a method has the parameters of the protocol; those of other libraries mean something else."""
    try:
        return {"rank", "world_size"} <= inspect.signature(shard).parameters.keys()
    except (TypeError, ValueError):
        return False


def check_positions_agree(run: Run, position: Memory, name: str) -> None:
    """Refuse ranks that are at different positions of a stream: a checkpoint would have that of rank 0.

    All ranks call it at the same point; it is one exchange.

    Args:
        run: Its `gather` exchanges the positions.
        position: That of this rank.
        name: Key of the dataset in the configuration, for messages.

    Raises:
        StreamShardError: On all ranks, if one is elsewhere.
    """
    digests = run.gather(f"position of the stream data.{name}", _digest(position))
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise StreamShardError(
            f"after the same number of updates, the state_dict of data.{name} on rank {', '.join(others)} is not that "
            "of rank 0: return the position of all ranks in the whole stream, k * world_size samples after the k-th "
            "sample of a shard, and the start of the next epoch after the end of one"
        )


def _digest(position: Memory) -> str:
    tensors: dict[str, torch.Tensor] = {}
    tree = encode_tree(position, tensors)
    content = hashlib.sha256()
    for piece in tensor_pieces(tensors, tree=tree):
        content.update(piece)
    return content.hexdigest()
