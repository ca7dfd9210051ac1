"""Names of the files of a checkpoint, and of the shards of a file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from noether.core.effect import SaveCheckpoint


WEIGHTS: Final = "weights.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "state.json"
MEMORY: Final = "state.safetensors"
FILES: Final = frozenset({WEIGHTS, OPTIMIZER, STATE, MEMORY})
"""The names that a file of a checkpoint can have, its manifest and shards aside."""
_SHARD: Final = re.compile(r"(weights|optimizer|state)-(\d{5,})-of-(\d{5,})(\.safetensors)", re.ASCII)


def shard_name(file: str, rank: int, world_size: int) -> str:
    """Return the name of the file in which a rank writes its part of the tensors of `file`.

    Example:
        >>> shard_name("weights.safetensors", 0, 2)
        'weights-00001-of-00002.safetensors'
    """
    stem, _, suffix = file.rpartition(".")
    return f"{stem}-{rank + 1:05}-of-{world_size:05}.{suffix}"


def file_of(name: str) -> str | None:
    """Return the file of a checkpoint that a name means: itself, or that of which it is a shard; None for no such file.

    Example:
        >>> file_of("weights-00001-of-00002.safetensors"), file_of("state.json"), file_of("notes.txt")
        ('weights.safetensors', 'state.json', None)
    """
    if name in FILES:
        return name
    found = _SHARD.fullmatch(name)
    return None if found is None else found[1] + found[4]


def shard_names(names: Iterable[str], file: str) -> list[str]:
    """Return the shards of a file among the names of files, in the order of ranks; empty if there are none.

    Raises:
        ValueError: If one is missing, or they are not of one save.

    Example:
        >>> shard_names(["state.json", "weights-00002-of-00002.safetensors", "weights-00001-of-00002.safetensors"],
        ...             "weights.safetensors")
        ['weights-00001-of-00002.safetensors', 'weights-00002-of-00002.safetensors']
    """
    found = sorted(name for name in names if name != file and file_of(name) == file)
    if not found:
        return []
    count = int(found[0].rpartition("-")[2].partition(".")[0])
    expected = [shard_name(file, rank, count) for rank in range(min(count, len(found) + 1))]
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{missing[0]} is missing beside {found[0]}")
    if len(found) > len(expected):
        raise ValueError(f"{max(set(found).difference(expected))} lies beside {found[0]}, which is of another save")
    return expected


def requested_files(effect: SaveCheckpoint) -> set[str]:
    """Return the names of the files that every checkpoint of this request has.

    Files for tensors of the optimizer and of callbacks are added where the state has such tensors.
    """
    return ({WEIGHTS} if effect.weights else set()) | ({STATE} if effect.optimizer else set())
