"""Sharded tensors in a checkpoint: which rank writes which part of a tensor, and tensors made of such parts."""

from __future__ import annotations

import heapq
import itertools
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from noether.core.errors import NoetherError
from noether.core.tensors.dtensors import is_distributed, local_part, with_local_part
from noether.effects.disk.tensor_files import is_permuted, read_offsets, read_shapes, read_tensors, tensor_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from noether.core.state import TrainState

_INDEX: Final = "whole"
"""The entry of the first of several files with shape and dtype of all whole tensors, in their order."""
_CACHED_LAYOUTS: Final = 4096
_SMALL_BYTES: Final = 1 << 20


class ShardingError(NoetherError, TypeError):
    """A tensor is distributed over ranks in a way that a checkpoint cannot hold."""


class Placement(NamedTuple):
    """What this rank stores of the tensors in sharded files.

    Args:
        find: Returns a DTensor of the shape of a tensor in the placement that it gets, by its name and shape; None for
            the whole tensor.
        read_header: Returns the begin of a file, at least its header; it need not be verified.
    """

    find: Callable[[str, tuple[int, ...]], torch.Tensor | None]
    read_header: Callable[[str], bytes]


class Region(NamedTuple):
    """A rectangular part of a tensor.

    Args:
        offsets: Where it begins, by dimension.
        shape: Its shape.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def chunk(self, dimension: int, index: int, count: int) -> Region:
        """Return one of `count` chunks along a dimension, cut as by `torch.chunk`; the last ones may be empty.

        Example:
            >>> [Region((0,), (5,)).chunk(0, index, 4) for index in (0, 2, 3)]
            [Region(offsets=(0,), shape=(2,)), Region(offsets=(4,), shape=(1,)), Region(offsets=(5,), shape=(0,))]
        """
        offsets, shape = list(self.offsets), list(self.shape)
        size = -(-shape[dimension] // count)
        begin = min(index * size, shape[dimension])
        offsets[dimension] += begin
        shape[dimension] = min(size, shape[dimension] - begin)
        return Region(tuple(offsets), tuple(shape))

    def intersect(self, other: Region) -> Region:
        """Return the part that two regions of one tensor have in common; it may be empty."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, map(sum, zip(*self, strict=True)), map(sum, zip(*other, strict=True)))
        return Region(begins, tuple(max(0, end - begin) for begin, end in zip(begins, ends, strict=True)))

    def slices_in(self, outer: Region) -> tuple[slice, ...]:
        """Return the slices of this region in a tensor that holds the region `outer`."""
        begins = [begin - start for begin, start in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(begin, begin + size) for begin, size in zip(begins, self.shape, strict=True))


def whole_region(shape: Sequence[int]) -> Region:
    """Return the region of a whole tensor.

    Example:
        >>> whole_region((2, 3))
        Region(offsets=(0, 0), shape=(2, 3))
    """
    return Region((0,) * len(shape), tuple(shape))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether ranks store different parts of a tensor.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    if not is_distributed(tensor):
        return False
    distributed: Any = tensor
    sizes = distributed.device_mesh.mesh.shape
    return any(size > 1 and not each.is_replicate() for size, each in zip(sizes, distributed.placements, strict=True))


def assign_regions(tensors: Mapping[str, torch.Tensor], world_size: int) -> dict[str, Mapping[int, Region]]:
    """Return which rank writes which region of each tensor; no rank has to ask another one.

    Of a sharded tensor each rank writes the part that it stores, and of equal parts the first of their ranks writes it.
    Other tensors, which all ranks have, go to the rank that writes the fewest bytes so far, the largest first; small
    ones to rank 0, so that a rank which loads them needs its own part and the first file only.

    Args:
        tensors: Tensor by name; at least one is sharded.
        world_size: Number of ranks.

    Returns:
        Region by rank, for each tensor. Ranks without a part are left out, so a tensor without elements has none.

    Raises:
        ShardingError: If a tensor is distributed in a way that a checkpoint cannot hold.
    """
    plan: dict[str, Mapping[int, Region]] = {}
    loads = [0] * world_size
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            plan[name] = _stored_regions(name, tensor, world_size)
            for rank, region in plan[name].items():
                loads[rank] += math.prod(region.shape) * tensor.element_size()
    sizes = {name: each.numel() * each.element_size() for name, each in tensors.items() if name not in plan}
    small = {name for name, size in sizes.items() if size <= _SMALL_BYTES}
    plan |= {name: {0: whole_region(tensors[name].shape)} for name in small}
    loads[0] += sum(sizes[name] for name in small)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for name in sorted(sizes.keys() - small, key=lambda name: (-sizes[name], name)):
        load, rank = heap[0]
        heapq.heapreplace(heap, (load + sizes[name], rank))
        plan[name] = {rank: whole_region(tensors[name].shape)}
    return plan


def _stored_regions(name: str, tensor: torch.Tensor, world_size: int) -> Mapping[int, Region]:
    distributed: Any = tensor
    ranks, placements = distributed.device_mesh.mesh, distributed.placements
    for each in placements:
        # A strided shard, of FSDP above tensor parallelism, interleaves its rows.
        if not each.is_replicate() and type(each).__name__ != "Shard":
            raise ShardingError(
                f"{name} has the placement {each}; a checkpoint holds tensors with Shard and Replicate: "
                "redistribute it before the save"
            )
    if ranks.numel() != world_size:
        raise ShardingError(
            f"{name} is sharded over {ranks.numel()} ranks, and {world_size} save: pass ranks= of all processes to "
            "open_run, and give its mesh all ranks"
        )
    dimensions = tuple(None if each.is_replicate() else each.dim % tensor.ndim for each in placements)
    return split_regions(tuple(tensor.shape), tuple(ranks.shape), tuple(ranks.flatten().tolist()), dimensions)


@lru_cache(_CACHED_LAYOUTS)
def split_regions(
    shape: tuple[int, ...], mesh: tuple[int, ...], ranks: tuple[int, ...], dimensions: tuple[int | None, ...]
) -> Mapping[int, Region]:
    """Return the region that each rank writes of a tensor; ranks that write nothing are left out.

    Args:
        shape: Shape of the tensor.
        mesh: Shape of the mesh of ranks.
        ranks: The ranks in the mesh, in its order.
        dimensions: For each dimension of the mesh the dimension of the tensor that it cuts; None if it replicates.

    Example:
        >>> split_regions((3, 2), (2, 2), (0, 1, 2, 3), (None, 0))
        {0: Region(offsets=(0, 0), shape=(2, 2)), 1: Region(offsets=(2, 0), shape=(1, 2))}
    """
    found: dict[int, Region] = {}
    for rank, coordinate in zip(ranks, itertools.product(*map(range, mesh)), strict=True):
        if any(index and dimension is None for index, dimension in zip(coordinate, dimensions, strict=True)):
            continue  # a rank before it has the same
        region = whole_region(shape)
        for index, count, dimension in zip(coordinate, mesh, dimensions, strict=True):
            if dimension is not None:
                region = region.chunk(dimension, index, count)
        if 0 not in region.shape:
            found[rank] = region
    return found


def shard_pieces(
    tensors: Mapping[str, torch.Tensor], rank: int, world_size: int, facts: Mapping[str, Any]
) -> Iterator[bytes | memoryview]:
    """Yield the file with the parts of tensors that a rank writes, as `tensor_pieces` does.

    The file of rank 0 also has `facts`, and shape and dtype of all tensors.

    Raises:
        ShardingError: As `assign_regions`.
        TypeError: As `tensor_pieces`.
    """
    plan = assign_regions(tensors, world_size)
    own = {name: regions[rank] for name, regions in plan.items() if rank in regions}
    parts = {name: local_part(tensors[name]) for name in own}
    for name, region in own.items():
        if parts[name].shape != region.shape:
            stored = tuple(parts[name].shape)
            raise ShardingError(f"rank {rank} stores {stored} of {name}, and its placement says {region.shape}")
    if rank == 0:
        facts = {**facts, _INDEX: {name: _describe(tensor) for name, tensor in tensors.items()}}
    offsets = {name: region.offsets for name, region in own.items()}
    yield from tensor_pieces(parts, offsets=offsets, **(facts if rank == 0 else {}))


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Return shape and dtype of a whole tensor, and the order of its dimensions in memory if that is another one."""
    described = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    strides = tensor.stride()
    layout = sorted(range(tensor.ndim), key=lambda dimension: (-strides[dimension], dimension))
    in_order = layout == sorted(layout) or not (is_distributed(tensor) or is_permuted(tensor))
    return described if in_order else {**described, "layout": layout}


class _Target:
    """A tensor, or the part of it that this rank stores, which is filled with what files have of it."""

    def __init__(self, name: str, described: Mapping[str, Any], placement: Placement | None) -> None:
        shape, dtype = tuple(described["shape"]), getattr(torch, described["dtype"])
        self._like = None if placement is None else placement.find(name, shape)
        self.ndim = len(shape)
        self._name, self._region = name, whole_region(shape)
        if self._like is not None:
            local = local_part(self._like)
            self._region = _own_region(self._like)
            if local.shape != self._region.shape:
                raise ShardingError(f"{name}: this rank stores {tuple(local.shape)}, not {self._region.shape}")
        layout = described.get("layout", range(len(shape)))
        self._tensor = torch.empty_permuted(self._region.shape, tuple(layout), dtype=dtype)
        self._missing = self._tensor.numel()

    def needs(self, region: Region) -> bool:
        """Return whether a part of the region belongs here."""
        return 0 not in self._region.intersect(region).shape

    def fill(self, region: Region, part: torch.Tensor) -> None:
        """Copy what belongs here from a part of the whole tensor."""
        if part.dtype != self._tensor.dtype or part.shape != region.shape:
            raise ValueError(f"a shard of {self._name} has another shape or dtype")
        common = self._region.intersect(region)
        if 0 not in common.shape:
            self._tensor[common.slices_in(self._region)].copy_(part[common.slices_in(region)])
            self._missing -= math.prod(common.shape)

    def result(self) -> torch.Tensor:
        """Return the complete tensor.

        Raises:
            ValueError: If elements are missing.
        """
        if self._missing != 0:
            raise ValueError(f"the files do not have every part of {self._name} once")
        return self._tensor if self._like is None else with_local_part(self._like, self._tensor.to(self._like.device))


def _own_region(like: torch.Tensor) -> Region:
    distributed: Any = like
    region = whole_region(like.shape)
    coordinate = distributed.device_mesh.get_coordinate()
    for index, count, each in zip(coordinate, distributed.device_mesh.mesh.shape, distributed.placements, strict=True):
        if not each.is_replicate():
            region = region.chunk(each.dim % like.ndim, index, count)
    return region


def find_placement(like: TrainState) -> Callable[[str, tuple[int, ...]], torch.Tensor | None]:
    """Return the function that finds where a tensor of a checkpoint belongs: where the parameter of its name does.

    A tensor of an optimizer or a callback, such as a moment or an average, has the name of its parameter in its path;
    if it has the same shape, too, it gets the same placement. Others are whole on each rank.

    Args:
        like: A state whose params have the placements.
    """
    distributed = {name: param for name, param in like.params.items() if is_distributed(param)}
    named = {**distributed, **{name: distributed[own] for name, own in like.tied_names.items() if own in distributed}}

    def find(path: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        parts = path.split(".")
        ends = ((begin, end) for begin in range(len(parts)) for end in range(len(parts), begin, -1))
        for begin, end in ends:  # the longest name first, from the left
            found = named.get(".".join(parts[begin:end]))
            if found is not None and found.shape == shape:
                return found
        return None

    return find


def read_shards(
    names: Sequence[str], files: Mapping[str, bytes], placement: Placement | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors whose parts are in several files, on the CPU, and the facts in the first file.

    Args:
        names: Names of the files in their order.
        files: Content of the files by name; each is needed only until the next one is read.
        placement: What this rank stores; by default each tensor is whole. Files without a part of that are not read.

    Raises:
        Exception: If the files are not exactly those that `shard_pieces` makes.
    """
    targets: dict[str, _Target] = {}
    facts: dict[str, Any] = {}
    for index, name in enumerate(names):
        if index and placement is not None and not _has_part(placement.read_header(name), targets):
            continue
        content = files[name]
        parts, found = read_tensors(content)
        if index == 0:
            facts = found
            targets = {key: _Target(key, described, placement) for key, described in facts.pop(_INDEX).items()}
        offsets = read_offsets(content)
        for key, part in parts.items():
            targets[key].fill(Region(tuple(offsets[key][: part.ndim]), tuple(part.shape)), part)
    return {name: target.result() for name, target in targets.items()}, facts


def _has_part(header: bytes, targets: Mapping[str, _Target]) -> bool:
    """Return whether a file has a part that belongs here, by its header, which is not verified.

    A part that a damaged header hides is missing in the end, which is an error.
    """
    offsets = read_offsets(header)
    return any(
        targets[name].needs(Region(tuple(offsets[name][: targets[name].ndim]), tuple(shape[: targets[name].ndim])))
        for name, shape in read_shapes(header).items()
    )
