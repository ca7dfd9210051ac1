"""Tensors as safetensors files, in pieces and without copies; the safetensors library reads them back.

The library can only write to a path or into memory. Here every byte has to pass through `Disk`, where it is hashed and
tests inject faults, so the writer is ours: eight bytes with the length of a JSON header, the header, and the tensors
one after the other. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_FACTS: Final = "noether"
_METADATA: Final = "__metadata__"
_LENGTH_BYTES: Final = 8
_PIECE_BYTES: Final = 1 << 20
_DTYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


def tensor_pieces(tensors: Mapping[str, torch.Tensor], **facts: Any) -> Iterator[bytes | memoryview]:
    """Yield the content of a safetensors file; equal tensors and facts give equal bytes.

    A large tensor is one piece and is not copied. Small tensors are joined, so that a background writer does not wait
    for Python's global lock once for each of them.

    Args:
        tensors: Tensor by name, on any device; each is read when its piece is requested.
        facts: JSON values that are stored beside them.

    Raises:
        TypeError: If the format does not support a tensor's dtype or layout.

    Example:
        >>> content = b"".join(tensor_pieces({"w": torch.ones(2)}, note="x"))
        >>> read_tensors(content)
        ({'w': tensor([1., 1.])}, {'note': 'x', 'strides': {}})
    """
    # Sorted by decreasing element size, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    facts["strides"] = {name: tensor.stride() for name, tensor in tensors.items() if _is_permuted(tensor)}
    # The format allows only text as metadata.
    header: dict[str, Any] = {_METADATA: {_FACTS: json.dumps(facts)}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
    yield from _join_small(_tensor_bytes(tensor) for _, tensor in ordered)


def read_tensors(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors in a safetensors file, on the CPU and with their strides, and its facts.

    Raises:
        SafetensorError: If `content` is not a safetensors file.
        ValueError, KeyError, TypeError: If its facts are not those that `tensor_pieces` writes.
    """
    tensors = load(content)  # which also validates the header
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    facts = json.loads(json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])[_METADATA][_FACTS])
    return tensors | {name: _with_stride(tensors[name], stride) for name, stride in facts["strides"].items()}, facts


def _dtype(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
        kind = f"of type {tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise TypeError(f"{name} is {kind}, which cannot be saved")
    return _DTYPES[tensor.dtype]


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    content: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _join_small(contents: Iterable[memoryview]) -> Iterator[bytes | memoryview]:
    small: list[memoryview] = []
    size = 0
    for content in contents:
        if size + len(content) > _PIECE_BYTES:
            yield b"".join(small)
            small, size = [], 0
        if len(content) >= _PIECE_BYTES:
            yield content
        else:
            small.append(content)
            size += len(content)
    yield b"".join(small)


def _is_permuted(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense in memory but in another order, as channels last is."""
    return not tensor.is_contiguous() and torch.empty_like(tensor).stride() == tensor.stride()


def _with_stride(tensor: torch.Tensor, stride: list[int]) -> torch.Tensor:
    # The order in memory decides which kernel runs, and so the last bits of later results.
    last = sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    fits = last + 1 == tensor.numel() and min(stride) >= 1
    permuted = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype) if fits else tensor
    if not _is_permuted(permuted):
        raise ValueError(f"stride {stride} does not fit the shape {tuple(tensor.shape)}")
    return permuted.copy_(tensor)
