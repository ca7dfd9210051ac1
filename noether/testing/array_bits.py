"""Whether two tensors or two arrays are equal bit for bit, whatever their layout, device and dtype."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from noether.core.tensors.dtensors import is_distributed, local_part

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by size in bytes, to compare floats as bits."""


def same_tensors(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in shape, dtype, device, layout and bits; all NaN are equal.

    Tensors without data (on the meta device) are equal if the rest is; DTensors, if the parts of this rank and the
    placements are.

    Example:
        >>> same_tensors(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
        >>> same_tensors(torch.eye(2).to_sparse(), torch.eye(2).to_sparse())
        True
    """
    if a is b:
        return True
    if a.is_nested or b.is_nested:
        if (a.is_nested, a.layout, a.dtype) != (b.is_nested, b.layout, b.dtype):
            return False
        ours, theirs = a.unbind(), b.unbind()
        return len(ours) == len(theirs) and all(map(same_tensors, ours, theirs))
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    if is_distributed(a) or is_distributed(b):
        placements = [getattr(each, "placements", None) for each in (a, b)]
        return placements[0] == placements[1] and same_tensors(local_part(a), local_part(b))
    a, b = a.detach(), b.detach()
    if a.is_meta:
        return True
    if a.layout is not torch.strided:
        return all(map(same_tensors, _sparse_parts(a), _sparse_parts(b)))
    if a.is_quantized:
        return _quantization(a) == _quantization(b) and same_tensors(a.int_repr(), b.int_repr())
    if a.is_complex():
        return same_tensors(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    return _same_dense(a, b)


def same_arrays(a: Any, b: Any) -> bool:
    """Return whether two arrays or scalars of numpy are equal in shape, dtype and bits; all NaN are equal.

    Example:
        >>> same_arrays(np.float32("nan"), np.float32("nan")), same_arrays(np.ones(2), np.ones(3))
        (True, False)
    """
    a, b = np.asarray(a), np.asarray(b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.dtype.names:
        return all(same_arrays(a[name], b[name]) for name in a.dtype.names)
    if a.tobytes() == b.tobytes():
        return True
    if a.dtype.kind == "c":
        return same_arrays(a.real, b.real) and same_arrays(a.imag, b.imag)
    if a.dtype.kind != "f":
        return False
    equal = (a == b) & (np.signbit(a) == np.signbit(b))
    return bool((equal | (np.isnan(a) & np.isnan(b))).all())


def _same_dense(a: Tensor, b: Tensor) -> bool:
    ours, theirs = (each.resolve_neg().reshape(-1).view(_INTEGERS[each.element_size()]) for each in (a, b))
    if torch.equal(ours, theirs):
        return True
    if not a.is_floating_point():
        return False
    both_nan = a.reshape(-1).to(torch.float64).isnan() & b.reshape(-1).to(torch.float64).isnan()
    return bool(((ours == theirs) | both_nan).all())


def _sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    rows = tensor.layout in {torch.sparse_csr, torch.sparse_bsr}
    indices = (tensor.crow_indices(), tensor.col_indices()) if rows else (tensor.ccol_indices(), tensor.row_indices())
    return (*indices, tensor.values())


def _quantization(tensor: Tensor) -> tuple[Any, ...]:
    scheme = tensor.qscheme()
    if scheme in {torch.per_tensor_affine, torch.per_tensor_symmetric}:
        return scheme, tensor.q_scale(), tensor.q_zero_point()
    scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return scheme, tensor.q_per_channel_axis(), tuple(scales.tolist()), tuple(zero_points.tolist())
