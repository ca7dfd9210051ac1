"""Reads a batch: its size, the inputs of the model, and the target."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from operator import index
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, final

import torch
from torch.nn.utils.rnn import PackedSequence

from noether.core.errors import NoetherError
from noether.core.tensors.losses import name_of
from noether.core.tensors.module import wrapped_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

TARGETS: Final = ("target", "targets", "label", "labels", "y")
_SHOWN: Final = 6
"""Largest number of tensors that a message lists."""
_LEVELS: Final = 3
"""Levels of objects within objects in which tensors are looked for: an object may contain itself."""
_SEQUENCES: Final = frozenset({tuple, list})
_SCALARS: Final = frozenset({str, bytes, int, float, bool, complex, type(None)})


class UnknownBatchSizeError(NoetherError, ValueError):
    """The shapes in a batch do not tell its number of samples."""


def batch_size(batch: Any) -> int:
    """Return the number of samples in `batch`: the first dimension of its tensors, which has to be the same for all.

    Tensors are looked for in tuples, lists, mappings, dataclasses and other objects; those without a dimension do not
    count. An object may tell its own size: by `num_graphs` or `batch_size`, or as the number of sequences of a
    `PackedSequence`. None and an empty container have no samples; a `collate` that finds no usable sample may return
    them.

    Raises:
        UnknownBatchSizeError: If `batch` contains no tensor with a dimension, or tensors that differ in their first
            dimension, such as packed point clouds, or weights of classes beside samples.

    Example:
        >>> import torch
        >>> batch_size((torch.zeros(8, 3), torch.zeros(8)))
        8
    """
    sizes: set[int] = set()
    _add_sizes(batch, sizes)
    if len(sizes) == 1:
        return sizes.pop()
    if not sizes and _is_empty(batch):
        return 0
    if sizes:
        shapes = ", ".join(f"{name} {shape}" for name, shape in islice(_shapes_in(batch), _SHOWN))
        found = f"the tensors of the batch, a {type(batch).__name__}, differ in their first dimension ({shapes})"
    else:
        found = f"no tensor with a dimension is found in the batch, a {type(batch).__name__}"
    raise UnknownBatchSizeError(
        f"{found}: pass run=noether.Run(batch_size=...), a function of the batch that returns its number of samples; "
        "in a configuration, data.batch_size: module.function"
    )


def count_samples(batch: Any, function: Callable[[Any], Any], setting: str = "") -> int:
    """Return the number of samples of a batch, as a function says.

    Args:
        batch: The batch.
        function: Returns the number.
        setting: Where the function is given, for messages, such as `config.yaml:3: data.batch_size: `.

    Raises:
        ValueError: If it is not a whole number >= 0.

    Example:
        >>> count_samples("abc", len)
        3
    """
    size = function(batch)
    if type(size) is int and size >= 0:
        return size
    try:
        number = -1 if isinstance(size, bool) else index(size)  # a tensor or a number of numpy may be a whole number
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(
            f"{setting}{name_of(function)} returned {size!r} as the number of samples of a {type(batch).__name__}: "
            "return a whole number >= 0"
        )
    return number


def collated_size(batch: Any, given: int) -> int:
    """Return the number of samples of a batch that a dataset's own `collate` made of `given` samples.

    It is `given`, whatever the shapes, unless the batch is empty or all its tensors have the same smaller first
    dimension: then `collate` left samples out.

    Example:
        >>> import torch
        >>> packed = {"points": torch.zeros(55, 3), "target": torch.zeros(4)}
        >>> collated_size(packed, given=4), collated_size((torch.zeros(3, 2), torch.zeros(3)), given=4)
        (4, 3)
    """
    if _is_empty(batch):
        return 0
    sizes: set[int] = set()
    _add_sizes(batch, sizes)
    return min(given, *sizes) if len(sizes) == 1 else given


def _is_empty(batch: Any) -> bool:
    return batch is None or (isinstance(batch, (tuple, list, Mapping)) and not batch)


def _add_sizes(batch: Any, sizes: set[int], depth: int = 0) -> None:
    """Add the first dimension of each tensor in a batch, and the size of each object that knows it."""
    if isinstance(batch, torch.Tensor):
        if batch.ndim:
            sizes.add(batch.size(0))  # a nested tensor has no shape
        return
    kind = type(batch)
    # Containers of tensors first: reading an object takes longer, and this runs at every update of a session.
    if kind in _SEQUENCES or kind is dict:
        for part in batch.values() if kind is dict else batch:
            if type(part) is torch.Tensor and part.ndim:
                sizes.add(part.size(0))
            else:
                _add_sizes(part, sizes, depth)
    elif kind not in _SCALARS:
        size = _declared_size(batch)
        if size is not None:
            sizes.add(size)
            return
        for part in _parts(batch, depth).values():
            _add_sizes(part, sizes, depth + 1)


def _declared_size(batch: Any) -> int | None:
    """Return the size that an object declares, or None."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    for name in ("num_graphs", "batch_size"):
        size = getattr(batch, name, None)
        size = size[0] if isinstance(size, tuple) and size else size  # the batch size of a TensorDict is a shape
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def _parts(batch: Any, depth: int) -> Mapping[Any, Any]:
    """Return the parts of a container or an object by name; none of an object that `depth` others contain."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, (tuple, list)):
        return dict(zip(getattr(batch, "_fields", range(len(batch))), batch, strict=True))
    if depth == _LEVELS or isinstance(batch, (type, ModuleType, FunctionType, torch.nn.Module)):
        return {}
    slots = getattr(batch, "__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return {**{name: getattr(batch, name, None) for name in names}, **getattr(batch, "__dict__", {})}


def _shapes_in(batch: Any, name: str = "batch", depth: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of each tensor of a batch that has a dimension, and of each object with a size."""
    if isinstance(batch, torch.Tensor):
        if batch.ndim:
            yield name, tuple(batch.shape)
        return
    if type(batch) in _SCALARS:
        return
    is_container = isinstance(batch, (Mapping, tuple, list))
    size = None if type(batch) in {tuple, list, dict} else _declared_size(batch)
    if size is not None:
        yield name, (size,)
        return
    for key, part in _parts(batch, depth).items():
        yield from _shapes_in(part, f"{name}[{key!r}]" if is_container else f"{name}.{key}", depth + (not is_container))


@final
class SizedBatches(tuple[Any, ...]):  # noqa: SLOT001  # a tuple cannot have slots
    """The micro-batches of an update, whose numbers of samples are known.

    Args:
        batches: The micro-batches.
        sizes: Samples of each.

    Example:
        >>> SizedBatches(["packed"], [3]).sizes
        (3,)
    """

    sizes: tuple[int, ...]

    def __new__(cls, batches: Iterable[Any], sizes: Iterable[int]) -> Self:
        """Return the tuple of `batches` with its `sizes`."""
        self = super().__new__(cls, batches)
        self.sizes = tuple(sizes)
        return self


def model_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments for calling `model` on `batch`.

    A tuple or list is `(inputs, *targets)`: the model gets the first entry. From a mapping the model gets the entries
    that its `forward` names. Any other batch is passed unchanged. A `forward` that requires one argument only gets the
    whole batch if that is named `batch`, or annotated as a mapping and the batch is one. So does a first parameter
    named `batch` if none is required, and `forward(*args)` for a mapping.

    Raises:
        TypeError: If `forward` requires no argument, and no entry of a mapping is one of its parameters.

    Example:
        >>> import torch
        >>> model_arguments(torch.nn.Linear(3, 1), ("inputs", "targets"))
        (('inputs',), {})
        >>> class Whole(torch.nn.Module):
        ...     def forward(self, batch):
        ...         return batch["image"]
        >>> model_arguments(Whole(), {"image": "pixels", "label": "cat"})
        (({'image': 'pixels', 'label': 'cat'},), {})
    """
    if isinstance(batch, (tuple, list)):
        return (batch,) if _signature_of(model).takes_batch else (batch[0],), {}
    if isinstance(batch, torch.Tensor) or not isinstance(batch, Mapping):
        return (batch,), {}
    signature = _signature_of(model)
    if signature.names is None:
        return (), dict(batch)
    if (signature.takes_batch or signature.takes_mapping) and signature.first not in batch:
        return (batch,), {}
    named = {name: batch[name] for name in signature.names if name in batch}
    if not named and signature.names and not signature.is_required:  # it would compute with its defaults
        raise TypeError(
            f"{type(model).__name__}.forward({', '.join(signature.names)}) takes none of the entries of the batch, "
            f"{', '.join(map(str, batch))}: name its parameters as the entries, or a single one batch to get all"
        )
    return (), named


def takes_whole_batch(model: nn.Module) -> bool:
    """Return whether the parameter of `forward` is named `batch`, so that it gets all of a tuple, too.

    Example:
        >>> import torch
        >>> takes_whole_batch(torch.nn.Linear(3, 1))
        False
    """
    return _signature_of(model).takes_batch


class _Signature(NamedTuple):
    """What a `forward` takes.

    Args:
        names: Names of its parameters; None if it accepts any keyword.
        first: The parameter without default, if there is one only; the first one if all have a default.
        is_required: Whether a parameter has no default.
        takes_batch: Whether the first one is the whole batch.
        takes_mapping: Whether that is annotated as a mapping, or there are only variadic ones.
    """

    names: tuple[str, ...] | None
    first: str | None
    is_required: bool
    takes_batch: bool
    takes_mapping: bool


def _signature_of(model: nn.Module) -> _Signature:
    function = getattr(model.forward, "__func__", None)
    signature = None if function is None else _read_method(function)
    if signature is not None and signature.names is not None:
        return signature
    wrapped = wrapped_module(model)  # it takes whatever the module takes
    if wrapped is not None:
        return _signature_of(wrapped)
    return signature or _read_signature(model.forward)


@lru_cache  # reading a signature is as slow as a small model; the key is a function, which keeps no model alive
def _read_method(function: Callable[..., Any]) -> _Signature:
    return _read_signature(function, bound=False)


def _read_signature(function: Callable[..., Any], *, bound: bool = True) -> _Signature:
    parameters = list(inspect.signature(function).parameters.values())[0 if bound else 1 :]
    variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    named = [p for p in parameters if p.kind not in variadic]
    required = [p for p in named if p.default is p.empty]
    only = next(iter(required or named), None) if len(required) <= 1 else None
    only = None if only is not None and only.kind is only.KEYWORD_ONLY else only
    takes_any = not named and any(p.kind is p.VAR_POSITIONAL for p in parameters)
    has_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return _Signature(
        names=None if has_any else tuple(p.name for p in named),
        first=None if only is None else only.name,
        is_required=bool(required),
        takes_batch=only is not None and only.name == "batch",
        takes_mapping=takes_any or (only is not None and bool(required) and _is_mapping(_annotation(function, only))),
    )


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the annotation of a parameter; if it is text whose names are not there at runtime, the text."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return typing.get_type_hints(function)[parameter.name]
    except Exception:  # noqa: BLE001  # an annotation may be any expression
        return parameter.annotation


def _is_mapping(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2].partition("[")[0] in {"dict", "Dict", "Mapping", "MutableMapping"}
    kind = typing.get_origin(annotation) or annotation
    return typing.is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, Mapping))


def target_of(batch: Any) -> torch.Tensor:
    """Return the target of a batch: the second entry of a tuple, or an entry with a usual name.

    Raises:
        ValueError: If `batch` has no such entry.

    Example:
        >>> import torch
        >>> target_of({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})
        tensor([0, 1])
    """
    found: Any = None
    if isinstance(batch, (tuple, list)):
        found = batch[1] if len(batch) > 1 else None
    elif isinstance(batch, Mapping):
        found = next((batch[name] for name in TARGETS if name in batch), None)
    if found is None:
        names = ", ".join(TARGETS)
        raise ValueError(f"the batch has no target: make it (inputs, target), or a dict with one of {names}")
    target: torch.Tensor = found
    return target
