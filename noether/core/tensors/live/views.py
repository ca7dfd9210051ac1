"""Fields of a state that view a live module: they are read from the module whenever the state is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, final

from noether.core.tensors.live.buffers import describe_constructed
from noether.core.tensors.live.extra_state import read_extra_state
from noether.core.tensors.module import buffers_of, non_persistent_of, params_of
from noether.core.tensors.tied_names import find_tied_names
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

Part = Literal["params", "buffers", "non_persistent", "extra_state", "tied_names"]

PARTS: Final[Mapping[Part, Callable[[nn.Module], FrozenDict]]] = {
    "params": params_of,
    "buffers": buffers_of,
    "non_persistent": non_persistent_of,
    "extra_state": read_extra_state,
    "tied_names": find_tied_names,
}
"""The fields of a state that a module has, and the function that reads each."""


class LiveView:
    """What a field of a state holds in place of values of a live object; reading the field reads the object."""

    __slots__ = ()

    def read(self) -> FrozenDict:
        """Return the values that the object has now, by name; tensors share its memory."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self.read()),)  # a copy views nothing


@final
class ModuleView(LiveView):
    """What a state holds in place of params, buffers, extra state or tied names of a live module.

    It finds tensors by path and name at each read, so a state shows what the module has now, such as tensors that were
    assigned, converted, loaded with `assign=True` or registered later.

    Args:
        model: The live module.
        part: What to read of it.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> view = ModuleView(model, "params")
        >>> _ = model.to(torch.float64)
        >>> view.read()["bias"].dtype
        torch.float64
    """

    __slots__ = ("model", "part")

    def __init__(self, model: nn.Module, part: Part) -> None:
        self.model, self.part = model, part

    def read(self) -> FrozenDict:
        """Return the values that the module has now, by name; tensors share its memory."""
        return PARTS[self.part](self.model)


class LiveField:
    """A field of a frozen dataclass that reads a `LiveView` at each access, and returns any other value as it is.

    Args:
        name: Name of the field.
        default: The value of the class attribute, which is the default of the field.
    """

    def __init__(self, name: str, default: Any) -> None:
        self._name, self._default = name, default

    def __get__(self, state: Any, owner: type | None = None) -> Any:
        if state is None:
            return self._default
        value = state.__dict__[self._name]
        return value.read() if isinstance(value, LiveView) else value

    def __set__(self, state: Any, value: Any) -> None:
        state.__dict__[self._name] = value  # called by the constructor of the dataclass only


VIEWS: Final = (*PARTS, "opt_state")
"""The fields of a state that may hold a `LiveView`."""


def views_of(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a state that view a live module, and what its constructor made of its buffers."""
    return {**{part: ModuleView(model, part) for part in PARTS}, "constructed": describe_constructed(model)}
