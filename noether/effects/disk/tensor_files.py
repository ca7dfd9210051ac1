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
    from collections.abc import Iterable, Iterator, Mapping, Sequence

FACTS: Final = "noether"
METADATA: Final = "__metadata__"
"""The one name that no tensor in a file can have."""
SHARDING_INFO: Final = "DCP_SHARDING_INFO"
"""Metadata of a file with shards: where each tensor lies in the whole; torch.distributed.checkpoint reads it, too."""
_OFFSETS: Final = "saved_offsets"
_OF_TORCH: Final = {"format": "pt"}
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
_OTHER_DTYPES: Final = {
    str(each).removeprefix("torch."): each
    for each in vars(torch).values()
    if isinstance(each, torch.dtype) and each not in _DTYPES and not str(each).startswith(("torch.q", "torch.bits"))
}
"""Dtypes that the format does not have, by name; their values are stored as bytes, or as parts."""
_PARTS: Final = {torch.complex128: torch.float64, torch.complex32: torch.float16}
"""Dtypes of real and imaginary part, which `torch.view_as_real` returns; any reader can join them again."""


def tensor_pieces(
    tensors: Mapping[str, torch.Tensor], *, offsets: Mapping[str, Sequence[int]] | None = None, **facts: Any
) -> Iterator[bytes | memoryview]:
    """Yield the content of a safetensors file; equal tensors and facts give equal bytes.

    A large tensor is one piece and is not copied. Small tensors are joined, so that a background writer does not wait
    for Python's global lock once for each of them.

    Args:
        tensors: Tensor by name, on any device. Of a dtype that the format does not have, complex128 and complex32 are
            stored as `torch.view_as_real` returns them, the others as bytes.
        offsets: In a file with shards: where each tensor begins in the whole, by dimension.
        facts: JSON values that are stored beside them.

    Raises:
        TypeError: If a tensor is not dense, quantized or without values, or cannot be read from its device; the message
            has its name. A tensor is read when its piece is requested.

    Example:
        >>> content = b"".join(tensor_pieces({"w": torch.ones(2)}, note="x"))
        >>> read_tensors(content)
        ({'w': tensor([1., 1.])}, {'note': 'x', 'strides': {}})
        >>> read_tensors(b"".join(tensor_pieces({"column of one row": torch.ones(1, 3)[:, 0]})))[0]
        {'column of one row': tensor([1.])}
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    facts["strides"] = {name: tensor.stride() for name, tensor in tensors.items() if is_permuted(tensor)}
    if other := {name: str(each.dtype) for name, each in tensors.items() if each.dtype not in _DTYPES}:
        facts["dtypes"] = {name: dtype.removeprefix("torch.") for name, dtype in other.items()}
    metadata = {FACTS: json.dumps(facts)}
    if offsets is not None:
        # A dtype that the format does not have is stored with one more dimension.
        info = {name: {_OFFSETS: [*begin, *([0] if name in other else [])]} for name, begin in offsets.items()}
        metadata |= {**_OF_TORCH, SHARDING_INFO: json.dumps(info)}
    yield from _file_pieces(tensors, metadata)


def plain_tensor_pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file without facts, as other programs write it.

    Raises:
        TypeError: As `tensor_pieces`, and if the format does not have the dtype of a tensor.

    Example:
        >>> load(b"".join(plain_tensor_pieces({"w": torch.ones(2)})))
        {'w': tensor([1., 1.])}
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is of type {tensor.dtype}, which safetensors files do not have")
    yield from _file_pieces(tensors, _OF_TORCH)


def _file_pieces(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    # Sorted by decreasing element size, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {METADATA: metadata}  # the format allows only text there
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        if tensor.dtype in _DTYPES:
            dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        else:
            stored = _PARTS.get(tensor.dtype, torch.uint8)
            dtype, shape = _DTYPES[stored], [*tensor.shape, tensor.element_size() // stored.itemsize]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
    yield from _join_small(_tensor_bytes(name, tensor) for name, tensor in ordered)


def read_tensors(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors in a safetensors file, on the CPU and with their strides, and its facts.

    Raises:
        SafetensorError: If `content` is not a safetensors file.
        ValueError, KeyError, TypeError: If its facts are not those that `tensor_pieces` writes.
    """
    tensors = _load(content)  # which also validates the header
    facts = json.loads(_read_metadata(content)[FACTS])
    for name, dtype in facts.get("dtypes", {}).items():
        tensors[name] = _from_bytes(tensors[name], dtype)
    return tensors | {name: _with_stride(tensors[name], stride) for name, stride in facts["strides"].items()}, facts


def read_offsets(content: bytes) -> dict[str, list[int]]:
    """Return where each tensor in a file with shards begins in the whole; the header of the file is enough.

    Raises:
        KeyError, ValueError, TypeError: If it is no file with shards.

    Example:
        >>> content = b"".join(tensor_pieces({"w": torch.ones(2, 3)}, offsets={"w": (4, 0)}))
        >>> read_offsets(content)
        {'w': [4, 0]}
    """
    return {name: each[_OFFSETS] for name, each in json.loads(_read_metadata(content)[SHARDING_INFO]).items()}


def read_shapes(content: bytes) -> dict[str, list[int]]:
    """Return the shapes with which the tensors in a file are stored, by name; the header of the file is enough."""
    return {name: each["shape"] for name, each in _read_header(content).items() if name != METADATA}


def header_bytes(begin: bytes) -> int:
    """Return the size of the header of a file, from its first eight bytes."""
    return _LENGTH_BYTES + int.from_bytes(begin[:_LENGTH_BYTES], "little")


def _read_header(content: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(content[_LENGTH_BYTES : header_bytes(content)])
    return header


def _read_metadata(content: bytes) -> dict[str, str]:
    metadata: dict[str, str] = _read_header(content)[METADATA]
    return metadata


def find_unsavable(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield a line for each tensor that no file can hold, such as a sparse or a quantized one.

    Example:
        >>> list(find_unsavable({"adjacency": torch.eye(2).to_sparse()}))
        ['adjacency is of type torch.float32, torch.sparse_coo on cpu, which cannot be saved']
    """
    for name, tensor in tensors.items():
        dense = tensor.layout is torch.strided and not tensor.is_nested
        if not dense or (tensor.dtype not in _DTYPES and tensor.dtype not in _OTHER_DTYPES.values()):
            kind = "nested" if tensor.is_nested else tensor.layout
            yield f"{name} is of type {tensor.dtype}, {kind} on {tensor.device}, which cannot be saved"


def describe_unsavable(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return which weights of a model no checkpoint can contain, and what to write instead; None if there are none."""
    problems = "; ".join(find_unsavable(tensors))
    fix = "store dense tensors, and register a constant with persistent=False"
    return f"{problems}: {fix}" if problems else None


def _check(name: str, tensor: torch.Tensor) -> None:
    for problem in find_unsavable({name: tensor}):
        raise TypeError(problem)
    if tensor.is_meta:
        raise TypeError(f"{name} is of type {tensor.dtype}, {tensor.layout} on meta, which cannot be saved")
    if name == METADATA or name.encode(errors="ignore").decode() != name:
        raise TypeError(f"a tensor has the name {name!r:.80}, which cannot be saved")


def _tensor_bytes(name: str, tensor: torch.Tensor) -> memoryview:
    try:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = plain.as_strided((plain.numel(),), (1,))  # `reshape` keeps any stride of one number
        content: Any = flat.view(torch.uint8).numpy()
    except RuntimeError as error:  # a lost device, for example
        raise TypeError(f"{name} cannot be read from {tensor.device}: {error}") from error
    return memoryview(content)


def _from_bytes(content: torch.Tensor, name: str) -> torch.Tensor:
    """Return the tensor of a dtype that the format does not have; its bytes or parts are the last dimension."""
    dtype = _OTHER_DTYPES[name]
    known = content.dtype in {torch.uint8, _PARTS.get(dtype, torch.uint8)}  # earlier versions stored bytes of all
    if not known or content.shape[-1] * content.element_size() != dtype.itemsize:
        raise ValueError(f"the bytes of a tensor are no values of {name}")
    return content.view(dtype).squeeze(-1)


def is_panic(error: BaseException) -> bool:
    """Return whether code in Rust failed; its exception is not an `Exception`, and its class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _load(content: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(content)
    except BaseException as error:  # a panic of the library is not an Exception
        if not is_panic(error):
            raise
        raise ValueError(f"the safetensors library fails: {error}") from error


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


def is_permuted(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense in memory but in another order, as channels last is."""
    return not tensor.is_contiguous() and torch.empty_like(tensor).stride() == tensor.stride()


def _with_stride(tensor: torch.Tensor, stride: list[int]) -> torch.Tensor:
    # The order in memory decides which kernel runs, and so the last bits of later results.
    last = sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    fits = last + 1 == tensor.numel() and min(stride) >= 1
    permuted = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype) if fits else tensor
    if not is_permuted(permuted):
        raise ValueError(f"stride {stride} does not fit the shape {tuple(tensor.shape)}")
    return permuted.copy_(tensor)
