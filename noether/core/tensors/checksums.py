"""Checksums of tensors, by which ranks compare values without sending them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by size in bytes."""


def sum_bits(tensors: Sequence[Tensor]) -> list[int]:
    """Return the sum over each tensor of its elements, read as integers of the same bits; 0 for an empty tensor.

    Sums of integers are exact, so a checksum does not depend on the order of summation. Those of the tensors on one
    device are read in one transfer.

    Args:
        tensors: Dense or sparse tensors; sums wrap around at 64 bits.

    Example:
        >>> sum_bits([torch.tensor([1, 2]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
        [3, 1065353216, 1065353216]
    """
    sums = {i: _as_integers(each.detach()).sum(dtype=torch.int64) for i, each in enumerate(tensors) if each.numel()}
    results = [0] * len(tensors)
    for device in {each.device for each in sums.values()}:
        here = [index for index, each in sums.items() if each.device == device]
        for index, value in zip(here, torch.stack([sums[index] for index in here]).tolist(), strict=True):
            results[index] = int(value)
    return results


def _as_integers(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor if tensor.dtype is torch.bool else tensor.view(_INTEGERS[tensor.element_size()])
