"""State that modules keep by `get_extra_state` and `set_extra_state`, beside params and buffers."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from torch import nn

from noether.core.errors import NoetherError, StateWarning
from noether.core.tensors.live.weights import match_names
from noether.core.tensors.module import named_modules
from noether.core.tensors.tree import FrozenDict, clone_tensors, freeze, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_CHECKED_MODELS: WeakSet[nn.Module] = WeakSet()
"""Models whose extra state can be saved, as far as it was there at the start."""
_EMPTY: Final = FrozenDict()


class ExtraStateError(NoetherError, TypeError):
    """A module returns extra state that a checkpoint cannot contain, or does not take back what it returned."""


def read_extra_state(model: nn.Module) -> FrozenDict:
    """Return what the modules of `model` return from `get_extra_state`, by their path; the tensors are copies.

    Raises:
        ExtraStateError: If a module returns something other than tensors, numbers, text, None, lists, tuples, and dicts
            with text as keys.

    Example:
        >>> class Counting(nn.Linear):
        ...     calls = 3
        ...     def get_extra_state(self):
        ...         return {"calls": self.calls}
        >>> read_extra_state(nn.Sequential(Counting(2, 1), nn.ReLU()))
        FrozenDict({'0': FrozenDict({'calls': 3})})
    """
    found = {path: _read(path, module) for path, module in modules_with_extra_state(model)}
    return FrozenDict(found) if found else _EMPTY


def write_extra_state(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Call `set_extra_state` of each module that has an entry in `saved`.

    A checkpoint of an earlier version has no extra state; a warning names the modules that keep theirs.
    """
    if missing := set_extra_state(model, saved):
        warnings.warn(
            f"the checkpoint has no extra state of {', '.join(missing)}, which starts as the model has it now",
            StateWarning,
            stacklevel=4,
        )


def set_extra_state(model: nn.Module, values: Mapping[str, Any]) -> list[str]:
    """Call `set_extra_state` of each module that has an entry in `values`; return descriptions of the others.

    Raises:
        ExtraStateError: If one of them raises an exception.
    """
    owners = dict(modules_with_extra_state(model))
    matched = match_names(values, owners)
    for path in owners.keys() & matched.keys():
        _write(path, owners[path], matched[path])
    return [_describe(path, module) for path, module in owners.items() if path not in matched]


@contextmanager
def use_extra_state(model: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Return a context in which a model has other extra state."""
    before = read_extra_state(model)
    set_extra_state(model, values)
    try:
        yield
    finally:
        set_extra_state(model, before)


def find_extra_state_problems(model: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """Return the paths in saved extra state at which the model has no module that takes it, as problems."""
    owners = dict(modules_with_extra_state(model))
    return [
        f"extra state of {path!r} is in the state, and the model has no module with get_extra_state there"
        for path in match_names(saved, owners).keys() - owners.keys()
    ]


def check_extra_state(model: nn.Module) -> None:
    """Refuse a model whose extra state no checkpoint can contain, or that cannot take it back; it is checked once.

    Raises:
        ExtraStateError: As `read_extra_state`; or if a module has no `set_extra_state`.
    """
    if model not in _CHECKED_MODELS:
        for path, module in modules_with_extra_state(model):
            if type(module).set_extra_state is nn.Module.set_extra_state:
                raise ExtraStateError(
                    f"{_describe(path, module)} defines get_extra_state without set_extra_state, so a resumed run "
                    "could not give the module its extra state back: define both"
                )
        read_extra_state(model)
        _CHECKED_MODELS.add(model)


def modules_with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that define `get_extra_state`, with their paths."""
    yield from (pair for pair in named_modules(model) if has_extra_state(pair[1]))


def has_extra_state(module: nn.Module) -> bool:
    """Return whether a module defines `get_extra_state`."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _read(path: str, module: nn.Module) -> Any:
    try:
        return clone_tensors(freeze(pack("it", module.get_extra_state())))
    except TypeError as error:
        raise ExtraStateError(
            f"get_extra_state of {_describe(path, module)} returns a value that a checkpoint cannot contain: {error}; "
            "return tensors, numbers, text, None, lists, tuples, and dicts with text as keys"
        ) from error


def _write(path: str, module: nn.Module, saved: Any) -> None:
    try:
        module.set_extra_state(unpack(saved))
    except Exception as error:
        raise ExtraStateError(
            f"set_extra_state of {_describe(path, module)} raised {type(error).__name__}: {error}; it got what "
            "get_extra_state returned as the state was saved: let it accept that, or build the model as it was saved"
        ) from error


def _describe(path: str, module: nn.Module) -> str:
    return f"{path!r} ({type(module).__name__})" if path else type(module).__name__
