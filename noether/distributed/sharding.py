"""Parameters that are sharded over the ranks of a run: which rank stores which rows, and gathers of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor

from noether.core.tensors.dtensors import local_part, whole_tensor
from noether.distributed.gradients import BUCKET_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from noether.distributed.ranks import Ranks

SMALLEST: Final = 1024
"""Fewest numbers of a parameter that is sharded: smaller ones, such as those of norms, would not save memory."""
_all_gather: Final[Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in 2.13


class Piece(NamedTuple):
    """Where the shards of a tensor are in a bucket.

    Args:
        bucket: Index of the bucket.
        start: Number of the bucket at which it begins.
        size: Numbers of the largest shard; the others are padded.
    """

    bucket: int
    start: int
    size: int


class Buckets(NamedTuple):
    """A layout of buckets, which is a pure function of shapes and dtypes, so that bits do not depend on history.

    Args:
        pieces: Place of each tensor by name.
        sizes: Numbers of one rank in each bucket.
        dtypes: Dtype of each bucket.
    """

    pieces: dict[str, Piece]
    sizes: list[int]
    dtypes: list[torch.dtype]

    def names(self, bucket: int) -> list[str]:
        """Return the names of the tensors of a bucket."""
        return [name for name, piece in self.pieces.items() if piece.bucket == bucket]


def plan_shard_buckets(
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    world_size: int,
    bucket_bytes: int = BUCKET_BYTES,
) -> Buckets:
    """Return the layout of tensors that are sharded in their first dimension.

    Args:
        shapes: Shape of each whole tensor by name.
        dtypes: Dtype of each, in which it is sent.
        world_size: Number of ranks.
        bucket_bytes: Most bytes of a bucket of several tensors, of all ranks together.

    Example:
        >>> plan = plan_shard_buckets({"a": (3, 2), "b": (4,)}, dict.fromkeys("ab", torch.float32), world_size=2)
        >>> plan.pieces["b"], plan.sizes
        (Piece(bucket=0, start=4, size=2), [6])
    """
    pieces: dict[str, Piece] = {}
    sizes: list[int] = []
    bucket_dtypes: list[torch.dtype] = []
    for dtype in dict.fromkeys(dtypes[name] for name in shapes):
        sizes.append(0)
        bucket_dtypes.append(dtype)
        for name, (rows, *rest) in ((name, shape) for name, shape in shapes.items() if dtypes[name] is dtype):
            size = -(-rows // world_size) * math.prod(rest)
            if sizes[-1] and (sizes[-1] + size) * world_size * dtype.itemsize > bucket_bytes:
                sizes.append(0)
                bucket_dtypes.append(dtype)
            pieces[name] = Piece(len(sizes) - 1, sizes[-1], size)
            sizes[-1] += size
    return Buckets(pieces, sizes, bucket_dtypes)


@final
class Sharding:
    """Shards parameters over the ranks of a run, by rows, and gathers whole parameters from the shards.

    A sharded parameter is a DTensor in the placement `Shard(0)` on a mesh of all ranks. Small parameters, and those
    with fewer rows than ranks, are whole on each rank.

    Args:
        params: All parameters by name, whole or DTensors; every rank has the same.
        ranks: The ranks of the run.
        bucket_bytes: Most bytes of several tensors in one collective.

    Attributes:
        shapes: Shape of each whole parameter that is sharded, by name.
    """

    def __init__(self, params: Mapping[str, Tensor], ranks: Ranks, bucket_bytes: int = BUCKET_BYTES) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        self.ranks, self.bucket_bytes, self._dtensor = ranks, bucket_bytes, DTensor
        self.shapes = {name: tuple(each.shape) for name, each in params.items() if self._is_sharded(each)}
        self._dtypes = {name: each.dtype for name, each in params.items()}
        self._device = next((each.device for each in params.values()), torch.device("cpu"))
        # Of the default group, which outlives the run: DTensors that a run returned use it, and torch takes meshes of
        # the same ranks for one, also in its caches.
        self._mesh = init_device_mesh(self._device.type, (ranks.world_size,))
        self._placements = (Shard(0),)
        self._buckets = plan_shard_buckets(self.shapes, self._dtypes, ranks.world_size, bucket_bytes)

    def _is_sharded(self, param: Tensor) -> bool:
        has_rows = param.ndim > 0 and param.shape[0] >= self.ranks.world_size
        return has_rows and param.numel() >= SMALLEST

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the placement of the parameter `name`; the same object if it is there.

        Args:
            name: Name of the parameter.
            tensor: The parameter, or memory of the same shape: the whole, equal on all ranks, or a DTensor in any
                placement. One in another placement is gathered, so every rank has to make the call.
        """
        if name not in self.shapes:
            return whole_tensor(tensor)
        source: Any = tensor
        is_placed = isinstance(tensor, self._dtensor) and source.placements == self._placements
        if is_placed and source.device_mesh == self._mesh:
            return tensor
        rows = self._rows(name)
        return self.wrap(
            name, whole_tensor(tensor)[rows.start : rows.stop].clone(memory_format=torch.contiguous_format)
        )

    def wrap(self, name: str, local: Tensor) -> Tensor:
        """Return the DTensor of the shape of the parameter `name` of which this rank stores `local`.

        A tensor of another shape, such as a counter of an optimizer, is whole on each rank and returned as it is.
        """
        shape = self.shapes.get(name)
        if shape is None or tuple(local.shape) != self.local_shape(name):
            return local
        stride = torch.empty(shape, device="meta").stride()
        with torch.no_grad():
            return self._dtensor.from_local(
                local, self._mesh, self._placements, run_check=False, shape=torch.Size(shape), stride=stride
            )

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the shard that this rank stores of a parameter."""
        return len(self._rows(name)), *self.shapes[name][1:]

    def _rows(self, name: str) -> range:
        """Return the rows of this rank, as `Shard(0)` splits them."""
        rows = self.shapes[name][0]
        per_rank = -(-rows // self.ranks.world_size)
        return range(min(self.ranks.rank * per_rank, rows), min((self.ranks.rank + 1) * per_rank, rows))

    def gather(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole parameters, sent in one collective for each bucket.

        Args:
            params: All parameters by name, in their placement.
        """
        locals_ = {name: local_part(param) for name, param in params.items()}
        received, works = [], []
        for index, (size, dtype) in enumerate(zip(self._buckets.sizes, self._buckets.dtypes, strict=True)):
            own = torch.zeros(size, dtype=dtype, device=self._device)
            for name in self._buckets.names(index):
                start = self._buckets.pieces[name].start
                own[start : start + locals_[name].numel()].copy_(locals_[name].reshape(-1))
            received.append(torch.empty(size * self.ranks.world_size, dtype=dtype, device=self._device))
            works.append(_all_gather(as_real(received[-1]), as_real(own), group=self.ranks.training, async_op=True))
        whole = dict(locals_)
        for index, work in enumerate(works):
            with self.ranks.failures.explain("gathering of the weights"):
                work.wait()
            table = received[index].view(self.ranks.world_size, -1)
            for name in self._buckets.names(index):
                _, start, size = self._buckets.pieces[name]
                shape = self.shapes[name]
                whole[name] = table[:, start : start + size].reshape(-1)[: math.prod(shape)].view(shape)
        return whole

    def total_norm(self, grads: Mapping[str, Tensor | None]) -> Tensor:
        """Return the 2-norm of all gradients together, from the parts of all ranks; in one collective."""
        squares = self._sum(grads, lambda grad: torch.linalg.vector_norm(grad, dtype=torch.float64).square())
        return squares.sqrt().float()

    def all_finite(self, grads: Mapping[str, Tensor | None]) -> Tensor:
        """Return whether every entry of every gradient is finite, on all ranks; in one collective."""
        return self._sum(grads, lambda grad: (~grad.isfinite()).any().double()) == 0

    def _sum(self, grads: Mapping[str, Tensor | None], measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of a measure over all gradients: of parts over all ranks, of whole ones once."""
        whole, parts = (torch.zeros((), dtype=torch.float64, device=self._device) for _ in range(2))
        for name, grad in grads.items():
            if grad is not None:
                (parts if name in self.shapes else whole).add_(measure(as_real(grad)))
        with self.ranks.failures.explain("sum over all shards"):
            dist.all_reduce(parts, group=self.ranks.training)
        return whole + parts


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of complex numbers as twice as many real ones in one dimension; any other tensor as it is."""
    return torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor
