"""Sums of the gradients of all ranks, of which each rank gets those of its shards of the parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, final

import torch
import torch.distributed as dist

from noether.distributed.gradients import GradientReduction, refuse_sparse
from noether.distributed.sharding import as_real, plan_shard_buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from noether.distributed.gradients import Work
    from noether.distributed.sharding import Piece, Sharding

    Grads = Mapping[str, Tensor | None]

# Renamed in torch 2.13.
_reduce_scatter: Final[Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@final
class ShardedReduction:
    """Sums gradients of whole parameters over all ranks, as `GradientReduction` does, for parameters in shards.

    Sums of sharded parameters come from one reduce-scatter for each bucket; those of whole parameters, and the tail,
    from a `GradientReduction`. Gradients of half precision are summed in float32.

    Args:
        sharding: The placement of the parameters.
        params: Trained parameters by name; every rank has the same.
        tail_size: Numbers in the tail.
        start: Begins to sum a tensor over all ranks, in place.
        is_double: Whether the tail is of double precision even if no parameter is.
    """

    def __init__(
        self,
        sharding: Sharding,
        params: Mapping[str, Tensor],
        tail_size: int,
        start: Callable[[Tensor], Work],
        *,
        is_double: bool = False,
    ) -> None:
        self.names = tuple(params)
        """The parameters, in their order."""
        device = next(iter(params.values())).device
        whole = {name: param for name, param in params.items() if name not in sharding.shapes}
        # A reduction needs a parameter, to have a bucket for its tail.
        self._whole = GradientReduction(
            whole or {"": torch.zeros(0, device=device)}, tail_size, start, is_double=is_double
        )
        self._sharding, self._device = sharding, device
        self._dtypes = {name: param.dtype for name, param in params.items() if name in sharding.shapes}
        shapes = {name: sharding.shapes[name] for name in self._dtypes}
        dtypes = {name: torch.promote_types(dtype, torch.float32) for name, dtype in self._dtypes.items()}
        self._buckets = plan_shard_buckets(shapes, dtypes, sharding.ranks.world_size, sharding.bucket_bytes)
        self._sums: list[Tensor] = []

    def sum_over_ranks(self, grads: Grads, weight: float, write_tail: Callable[[Tensor], object]) -> Tensor:
        """Sum the gradients over all ranks and return the sum of the tails, a view that the next call overwrites.

        Args:
            grads: Gradients of this rank by parameter, whole; those that are None or missing add nothing.
            weight: Their factor; if it is 0, they add nothing, even if they are not finite.
            write_tail: Writes the tail of this rank, `(tail_size,)`.

        Raises:
            ValueError: If a gradient is sparse.
        """
        ranks, self._sums, works = self._sharding.ranks, [], []
        for index, (size, dtype) in enumerate(zip(self._buckets.sizes, self._buckets.dtypes, strict=True)):
            table = torch.zeros(ranks.world_size, size, dtype=dtype, device=self._device)
            for name in self._buckets.names(index):
                if weight and (grad := grads.get(name)) is not None:
                    refuse_sparse(name, grad)
                    _write(table, self._buckets.pieces[name], grad)
            if weight != 1:
                table.mul_(weight)
            self._sums.append(torch.empty(size, dtype=dtype, device=self._device))
            works.append(
                _reduce_scatter(as_real(self._sums[-1]), as_real(table.view(-1)), group=ranks.training, async_op=True)
            )
        tail = self._whole.sum_over_ranks(grads, weight, write_tail)
        for work in works:
            work.wait()
        return tail

    def divide(self, names: set[str], *, by: float) -> dict[str, Tensor | None]:
        """Return the sums divided by a number, in the dtypes of the parameters: of sharded ones the shard of this rank.

        Args:
            names: Parameters that have a gradient; the others have None.
            by: The sum of the weights.
        """
        if by != 1:
            for bucket in self._sums:
                bucket.div_(by)
        divided = self._whole.divide(names, by=by)
        for name, (bucket_index, start, _) in self._buckets.pieces.items():
            shape = self._sharding.local_shape(name)
            part = self._sums[bucket_index][start : start + math.prod(shape)].view(shape)
            divided[name] = part.to(self._dtypes[name]) if name in names else None  # a copy only of another dtype
        return {name: divided[name] for name in self.names}


def _write(table: Tensor, piece: Piece, grad: Tensor) -> None:
    """Write a whole gradient to a table whose rows are sent to one rank each, `(world_size, size)`."""
    flat, column = grad.reshape(-1), table[:, piece.start : piece.start + piece.size]
    full, rest = divmod(len(flat), piece.size)
    column[:full].copy_(flat[: full * piece.size].view(full, piece.size))
    if rest:
        column[full, :rest].copy_(flat[full * piece.size :])
