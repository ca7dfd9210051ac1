"""Checks that saved weights fit a live model, and writes them into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.parameter import is_lazy

from noether.core.errors import NoetherError, suggest
from noether.core.tensors.dtensors import are_same_memory, copy_into
from noether.core.tensors.live.buffers import describe_constructed, find_none_buffers
from noether.core.tensors.module import (
    device_of,
    named_buffers,
    named_modules,
    named_parameters,
    non_persistent_names,
    persistent_buffers,
    without_wrappers,
)
from noether.core.tensors.tied_names import find_tied_names
from noether.core.tensors.torch_internals import buffers_in
from noether.core.tensors.tree import FrozenDict, have_same_bits, storages

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from torch import Tensor, nn

_SHOWN: Final = 10


class MismatchError(NoetherError, KeyError, ValueError):
    """A saved state does not fit the model or the optimizer; nothing was written.

    Example:
        >>> from noether import TrainState
        >>> saved = TrainState.from_module(torch.nn.Linear(2, 1))
        >>> saved.into_module(torch.nn.Linear(2, 3))
        Traceback (most recent call last):
        noether.core.tensors.live.weights.MismatchError: the state does not fit: parameter 'bias' has shape (1,) in the
        state and (3,) in the model; parameter 'weight' has shape (1, 2) in the state and (3, 2) in the model. Nothing
        was loaded: build the model and the optimizer as they were saved
    """

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would quote it


def raise_mismatch(problems: Iterable[str]) -> None:
    """Raise all problems as one error; do nothing if there are none.

    Raises:
        MismatchError: If there are problems.
    """
    found = list(problems)
    if found:
        raise MismatchError(
            f"the state does not fit: {join_problems(found)}. Nothing was loaded: build the model and the optimizer as "
            "they were saved"
        )


def join_problems(problems: list[str]) -> str:
    """Return problems as one text, which names the first ten and counts the others."""
    more = len(problems) - _SHOWN
    return "; ".join([*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


@torch.no_grad()
def write_weights(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], reshaped: Collection[str] = ()
) -> None:
    """Write params and buffers into a live model, after checking all of them.

    Names may have the parts that `torch.compile`, DDP and FSDP add. A buffer that the model has as None is set.

    Args:
        model: The model.
        params: Its parameters by name.
        buffers: Its buffers, those with `persistent=False` among them if they are to be written, too.
        reshaped: Names of the buffers that training gave another form than the constructor of the model.

    Raises:
        MismatchError: If the model does not have exactly these parameters and buffers, with these shapes and dtypes;
            the message names all that differ.
    """
    raise_mismatch(find_weight_problems(model, params, buffers, reshaped))
    live = {**named_parameters(model), **named_buffers(model)}
    places, tied = dict(_buffer_places(model)), find_tied_names(model)
    saved = {**match_names(params, live, tied), **match_names(buffers, [*live, *places], tied)}
    changed = {
        name: tensor for name, tensor in saved.items() if name not in live or not are_same_memory(live[name], tensor)
    }
    viewed = storages(live)  # a view of a tensor that is written to first would change: a copy is written
    changed = {name: each.clone() if storages(each) & viewed else each for name, each in changed.items()}
    for name, tensor in changed.items():
        if name in live and (live[name].shape, live[name].dtype) == (tensor.shape, tensor.dtype):
            copy_into(live[name], tensor)
        else:
            place, key = places[name]
            place[key] = tensor.to(device_of(model.parameters()), copy=True)
    for name in places.keys() & _find_forward_buffers(model) - saved.keys():  # forward had not filled them yet
        place, key = places[name]
        place[key] = None


def find_weight_problems(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], reshaped: Collection[str] = ()
) -> list[str]:
    """Return each difference between params and buffers of a saved state and those of a live model, by name.

    Args:
        model: The model.
        params: Saved parameters by name.
        buffers: Saved buffers by name.
        reshaped: Names of the buffers that may have any form.
    """
    live, tied = persistent_buffers(model), find_tied_names(model)
    saved = match_names(buffers, [*live, *dict(_buffer_places(model))], tied)
    strict = [{name: each for name, each in tensors.items() if name not in reshaped} for tensors in (live, saved)]
    late = _find_forward_buffers(model) | non_persistent_names(model)
    return [
        *find_differences("parameter", named_parameters(model), params, tied=tied),
        *find_differences("buffer", *strict, optional=late, tied=tied),
    ]


def find_differences(
    kind: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    optional: Iterable[str] = (),
    tied: Mapping[str, str] = FrozenDict(),
    source: str = "state",
) -> Iterator[str]:
    """Yield each difference between the tensors of a model and saved ones: names, shapes and dtypes.

    Args:
        kind: What the tensors are, for the message.
        expected: Tensors of the model by name.
        found: Saved tensors by name.
        optional: Names that only one side may have.
        tied: As for `match_names`.
        source: Where the saved tensors are, for the message.

    Example:
        >>> list(find_differences("buffer", {"a": torch.zeros(1)}, {"a": torch.zeros(1).double()}))
        ["buffer 'a' is torch.float64 in the state and torch.float32 in the model: convert the model first, with
        model.to(torch.float64)"]
    """
    yield from find_tied_differences(found, tied)
    yield from compare_tensors(kind, expected, match_names(found, [*expected, *optional], tied), set(optional), source)


def compare_tensors(
    kind: str, expected: Mapping[str, Tensor], matched: Mapping[str, Tensor], optional: Collection[str], source: str
) -> Iterator[str]:
    """Yield each difference as `find_differences` does, between tensors whose names are those of the model already.

    Args:
        kind: As for `find_differences`, and so are `expected`, `optional` and `source`.
        expected: Tensors of the model by name.
        matched: Saved tensors by name in the model.
        optional: Names that only the saved tensors may have.
        source: Where the saved tensors are.
    """
    for name in sorted((expected.keys() ^ matched.keys()) - set(optional)):
        others = (matched if name in expected else expected).keys() - {name}
        where = source if name in expected else "model"
        yield f"{kind} {name!r} is not in the {where}{suggest(name, others).replace('; ', ', ')}"
    for name in sorted(expected.keys() & matched.keys()):
        ours, theirs = expected[name], matched[name]
        if is_lazy(ours):
            yield f"{kind} {name!r} has no shape in the model yet: call the model on a batch before loading"
        elif ours.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)} in the {source} and {tuple(ours.shape)} in the model"
            yield f"{kind} {name!r} has shape {shapes}"
        elif ours.dtype != theirs.dtype:
            fix = f"convert the model first, with model.to({theirs.dtype})"
            yield f"{kind} {name!r} is {theirs.dtype} in the {source} and {ours.dtype} in the model: {fix}"


def match_names(
    saved: Mapping[str, Any], names: Iterable[str], tied: Mapping[str, str] = FrozenDict()
) -> dict[str, Any]:
    """Return saved values under the names of a model, where they differ only in names that wrappers add.

    Args:
        saved: Saved values by name.
        names: Names in the model.
        tied: One of `names` for each other name that the model has for it; saved values may have either.

    Example:
        >>> match_names({"module.weight": 1, "scale": 2}, ["weight", "scale"])
        {'weight': 1, 'scale': 2}
        >>> match_names({"head.weight": 1}, ["emb.weight"], {"head.weight": "emb.weight"})
        {'emb.weight': 1}
    """
    names = set(names)
    if saved.keys() <= names:
        return dict(saved)
    own_names = {**{name: name for name in names}, **{other: name for other, name in tied.items() if name in names}}
    plain: dict[str, list[str]] = {}
    for name in own_names.keys() - saved.keys():
        plain.setdefault(without_wrappers(name), []).append(name)
    matched: dict[str, Any] = {}
    for name, value in saved.items():
        candidates = [] if name in own_names else plain.get(without_wrappers(name), [])
        new = candidates[0] if len(candidates) == 1 else name
        matched[name if new in matched else new] = value
    renamed: dict[str, Any] = {}
    for name, value in matched.items():
        renamed.setdefault(own_names.get(name, name), value)
    return renamed


def find_tied_differences(saved: Mapping[str, Any], tied: Mapping[str, str]) -> Iterator[str]:
    """Yield each pair of saved tensors with different values that a model has as one tensor under two names.

    Example:
        >>> saved = {"emb.weight": torch.zeros(1), "head.weight": torch.ones(1)}
        >>> list(find_tied_differences(saved, {"head.weight": "emb.weight"}))
        ["'emb.weight' and 'head.weight' have different values, and are one tensor (tied) in the model"]
    """
    first = {own: own for own in tied.values()}
    for other, own in tied.items():
        if other in saved:
            known = first[own] if first[own] in saved else other
            first[own] = known
            if not have_same_bits(saved[known], saved[other]):
                yield f"{known!r} and {other!r} have different values, and are one tensor (tied) in the model"


def _buffer_places(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    """Yield the dict and the key under which a module keeps each buffer, those registered as None included."""
    for path, module in named_modules(model):
        for key in buffers_in(module):
            yield f"{path}.{key}" if path else key, (buffers_in(module), key)


def _find_forward_buffers(model: nn.Module) -> set[str]:
    """Return the names of the buffers that forward fills or registers."""
    constructed = describe_constructed(model)
    empty = {name for name, (place, key) in _buffer_places(model) if place[key] is None or name not in constructed}
    return empty | find_none_buffers(constructed)
