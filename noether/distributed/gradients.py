"""Gradients of all ranks, summed in flat buckets whose layout depends on the parameters only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from noether.core.tensors.torch_internals import foreach_copy_

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Grads = Mapping[str, Tensor | None]

BUCKET_BYTES: Final = 25 * 2**20
"""Most bytes of a bucket of several tensors, as in torch's DistributedDataParallel."""
_ALIGNMENT: Final = 4
"""Each gradient starts at a multiple of so many numbers, as kernels with vectors and complex numbers need it."""
_DOUBLE: Final = frozenset({torch.float64, torch.complex128})


class Work(Protocol):
    """A reduction that has begun."""

    def wait(self) -> object:
        """Return once the result can be used."""


def start_all_reduce(group: dist.ProcessGroup | None) -> Callable[[Tensor], Work]:
    """Return the function that begins to sum a tensor over the ranks of a group, in place."""
    return partial(dist.all_reduce, group=group, async_op=True)


class _Place(NamedTuple):
    """Where a gradient is: in which bucket, at which number, and of how many real numbers."""

    bucket: int
    start: int
    size: int


class _Plan(NamedTuple):
    """Layout of the buckets.

    Args:
        places: Place of each gradient by name of its parameter.
        ends: Numbers of gradients of each bucket.
        dtypes: Dtype of each bucket.
    """

    places: dict[str, _Place]
    ends: list[int]
    dtypes: list[torch.dtype]


def plan_buckets(params: Mapping[str, Tensor], *, is_double: bool = False, bucket_bytes: int = BUCKET_BYTES) -> _Plan:
    """Return the layout of the gradients of `params`.

    Gradients in double precision come last, in buckets of double precision; all others are summed in float32. Complex
    numbers are pairs of real numbers.

    Args:
        params: Trained parameters by name.
        is_double: Whether the last bucket is of double precision even if no parameter is.
        bucket_bytes: Most bytes of a bucket of several gradients.

    Example:
        >>> plan_buckets({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}).places["bias"]
        _Place(bucket=0, start=8, size=2)
    """
    ends: list[int] = []
    dtypes: list[torch.dtype] = []
    places: dict[str, _Place] = {}
    for dtype in (torch.float32, torch.float64):
        members = {name: param for name, param in params.items() if (param.dtype in _DOUBLE) == (dtype in _DOUBLE)}
        is_last = dtype is torch.float64 and is_double
        if members or (is_last and not (dtypes and dtypes[-1] is dtype)):
            ends.append(0)
            dtypes.append(dtype)
        for name, param in members.items():
            size = param.numel() * (2 if param.is_complex() else 1)
            if ends[-1] and (ends[-1] + size) * dtype.itemsize > bucket_bytes:
                ends.append(0)
                dtypes.append(dtype)
            places[name] = _Place(len(ends) - 1, ends[-1], size)
            ends[-1] += -(-size // _ALIGNMENT) * _ALIGNMENT
    return _Plan(places, ends, dtypes)


@final
class GradientReduction:
    """Sums the gradients of all ranks, each times the weight of its rank.

    Gloo adds in an order that depends on the position in a buffer; because the layout is fixed, a repeated run, and one
    that was resumed, has the same bits. Behind the last gradients is a tail with other numbers to sum.

    The gradients that it returns are views of its buckets, which the next reduction overwrites.

    Args:
        params: Trained parameters by name; every rank has the same.
        tail_size: Numbers in the tail.
        start: Begins to sum a tensor over all ranks, in place.
        is_double: Whether the tail is of double precision even if no parameter is.
        bucket_bytes: Most bytes of a bucket of several gradients.

    Example:
        >>> class Done:
        ...     def wait(self):
        ...         pass
        >>> reduction = GradientReduction({"weight": torch.zeros(2)}, 1, lambda bucket: Done())
        >>> grads, weight = {"weight": torch.tensor([1.0, 2.0])}, 4.0
        >>> tail = reduction.sum_over_ranks(grads, weight, lambda tail: tail.fill_(weight))
        >>> reduction.divide({"weight"}, by=tail.item())
        {'weight': tensor([1., 2.])}
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        tail_size: int,
        start: Callable[[Tensor], Work],
        *,
        is_double: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        plan = plan_buckets(params, is_double=is_double, bucket_bytes=bucket_bytes)
        self.names = tuple(params)
        """The parameters, in their order."""
        self._start = start
        self._dtypes = {name: param.dtype for name, param in params.items()}
        device = next(iter(params.values())).device
        last = len(plan.ends) - 1
        self._buckets = [
            torch.zeros(end + (tail_size if index == last else 0), dtype=dtype, device=device)
            for index, (end, dtype) in enumerate(zip(plan.ends, plan.dtypes, strict=True))
        ]
        self._parts = [bucket[:end] for bucket, end in zip(self._buckets, plan.ends, strict=True)]
        self._tail = self._buckets[-1][plan.ends[-1] :]
        self._views = {name: self._view(plan.places[name], param) for name, param in params.items()}
        self._members: list[list[str]] = [[] for _ in plan.ends]
        for name, place in plan.places.items():
            self._members[place.bucket].append(name)

    def sum_over_ranks(self, grads: Grads, weight: float, write_tail: Callable[[Tensor], object]) -> Tensor:
        """Sum the gradients over all ranks and return the sum of the tails, a view that the next call overwrites.

        Args:
            grads: Gradients of this rank by parameter; those that are None or missing add nothing.
            weight: Their factor; if it is 0, they add nothing, even if they are not finite.
            write_tail: Writes the tail of this rank, `(tail_size,)`.

        Raises:
            ValueError: If a gradient is sparse.
        """
        works = []
        for index, bucket in enumerate(self._buckets):
            self._fill(index, grads, weight)
            if index == len(self._buckets) - 1:
                write_tail(self._tail)
            works.append(self._start(bucket))
        for work in works:
            work.wait()
        return self._tail

    def divide(self, names: set[str], *, by: float) -> dict[str, Tensor | None]:
        """Return the sums divided by a number, in the dtypes of the parameters.

        Args:
            names: Parameters that have a gradient; the others have None.
            by: The sum of the weights.
        """
        if by != 1:
            for part in self._parts:
                part.div_(by)
        return {
            name: view.to(self._dtypes[name]) if name in names else None  # a copy only of another dtype
            for name, view in self._views.items()
        }

    def _fill(self, index: int, grads: Grads, weight: float) -> None:
        """Write the gradients of this rank to a bucket."""
        if not weight:
            self._parts[index].zero_()
            return
        views: list[Tensor] = []
        present: list[Tensor] = []
        for name in self._members[index]:
            grad = grads.get(name)
            if grad is None:
                self._views[name].zero_()
                continue
            refuse_sparse(name, grad)
            views.append(self._views[name])
            present.append(grad)
        if present:
            foreach_copy_(views, present)
        if weight != 1:
            self._parts[index].mul_(weight)

    def _view(self, place: _Place, param: Tensor) -> Tensor:
        """Return the view of a bucket with the shape and, if it is dense, the strides of a parameter."""
        part = self._buckets[place.bucket][place.start : place.start + place.size]
        if param.is_complex():
            part = torch.view_as_complex(part.view(-1, 2))
        strides: Sequence[int] = torch.empty_like(param, device="meta").stride()
        return part.as_strided(param.shape, strides, part.storage_offset())


def refuse_sparse(name: str, grad: Tensor) -> None:
    """Refuse a sparse gradient, which buckets cannot have.

    Raises:
        ValueError: If the gradient of the parameter `name` is sparse.
    """
    if grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {name!r} is sparse, and several ranks sum dense gradients: write sparse=False where the "
            "module is constructed"
        )
