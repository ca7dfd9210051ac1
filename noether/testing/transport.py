"""Bytes of a callback, and the callback that another process makes from them; functions and classes go by value.

The bytes go through the pipe of a process that this one started, never through a file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import io
import sys
import types
from multiprocessing.reduction import ForkingPickler
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.testing.functions import names_of

if TYPE_CHECKING:
    from collections.abc import Callable

_FOUND_BY_NAME: Final = {
    id(value): (module, name)
    for module in (types, dataclasses)
    for name, value in vars(module).items()
    if isinstance(value, type) or type(value).__name__ in {"_FIELD_BASE", "_MISSING_TYPE", "_KW_ONLY_TYPE"}
}
"""Types that have no name among the builtins, and objects that dataclasses compare by identity."""
_CODE_FIELDS: Final = (
    "argcount", "posonlyargcount", "kwonlyargcount", "nlocals", "stacksize", "flags", "code", "consts", "names",
    "varnames", "filename", "name", "qualname", "firstlineno", "linetable", "exceptiontable", "freevars", "cellvars",
)  # fmt: skip


def encode(value: Any) -> bytes:
    """Return the bytes of a value, which may contain lambdas, closures and classes of any module.

    Raises:
        Exception: If it contains an object of the operating system, such as an open file.

    Example:
        >>> offset = 2
        >>> decode(encode(lambda number: number + offset))(1)
        3
    """
    buffer = io.BytesIO()
    _Pickler(buffer, 4).dump(value)
    return buffer.getvalue()


def decode(data: bytes) -> Any:
    """Return the value that `encode` was given."""
    return ForkingPickler.loads(data)


class _Pickler(ForkingPickler):
    """Sends functions and classes that another process cannot import by value."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to make `value` in another process; the base class calls it for each object."""
        if id(value) in _FOUND_BY_NAME:
            return getattr, _FOUND_BY_NAME[id(value)]
        if isinstance(value, FunctionType) and not _is_importable(value):
            body = value.__code__, value.__module__
            return _new_function, body, _function_fields(value), None, None, _fill_function
        if isinstance(value, type) and not _is_importable(value):
            metaclass = type(value)
            return (
                _new_class,
                (metaclass, value.__name__, value.__bases__),
                _class_fields(value),
                None,
                None,
                _fill_class,
            )
        reduce = next((reduce for kind, reduce in _REDUCERS.items() if isinstance(value, kind)), None)
        return NotImplemented if reduce is None else reduce(value)


def _is_importable(value: Any) -> bool:
    """Return whether another process finds a function or a class under its name."""
    module = sys.modules.get(value.__module__)
    if value.__module__ == "builtins":
        return True  # pickle knows those without a name, such as the class of None
    if module is None or value.__module__ == "__main__" or "<locals>" in value.__qualname__:
        return False
    try:
        found = functools.reduce(getattr, value.__qualname__.split("."), module)
        return found is value and (
            module.__name__ == "builtins" or importlib.util.find_spec(module.__name__) is not None
        )
    except (AttributeError, ImportError, ValueError):
        return False


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def _fill_cell(cell: CellType, contents: tuple[Any, ...]) -> None:
    if contents:
        cell.cell_contents = contents[0]


def _function_fields(function: FunctionType) -> tuple[dict[str, Any], dict[str, Any], tuple[CellType, ...]]:
    names = [name for name in names_of(function.__code__) if name in function.__globals__]
    attributes = ("__name__", "__qualname__", "__defaults__", "__kwdefaults__", "__dict__", "__doc__")
    fields = {name: getattr(function, name) for name in attributes}
    return {name: function.__globals__[name] for name in names}, fields, function.__closure__ or ()


_globals: dict[str | None, dict[str, Any]] = {}  # of the functions that were sent, by module


def _new_function(code: CodeType, module: str | None) -> FunctionType:
    found = _globals.setdefault(module, {"__name__": module, "__builtins__": __builtins__})
    return FunctionType(code, found, None, None, tuple(CellType() for _ in code.co_freevars))


def _fill_function(function: FunctionType, fields: tuple[dict[str, Any], dict[str, Any], tuple[CellType, ...]]) -> None:
    named, attributes, cells = fields
    function.__globals__.update(named)
    for cell, sent in zip(function.__closure__ or (), cells, strict=True):
        _fill_cell(cell, _contents(sent))
    for name, value in attributes.items():
        setattr(function, name, value)


_NOT_SENT: Final = frozenset({"__dict__", "__weakref__", "__module__", "__slots__", "_abc_impl"})


def _class_fields(cls: type) -> dict[str, Any]:
    members = {
        name for each in (vars(cls).get("__slots__", ()),) for name in ((each,) if isinstance(each, str) else each)
    }
    fields = {name: value for name, value in vars(cls).items() if name not in _NOT_SENT | members}
    return {**fields, "__module__": cls.__module__}


def _new_class(metaclass: type, name: str, bases: tuple[type, ...]) -> Any:
    return metaclass(name, bases, {})


def _fill_class(cls: type, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        setattr(cls, name, value)


def _wrap_in_cache(function: Any, settings: dict[str, Any]) -> Any:
    return functools.lru_cache(**settings)(function)


_REDUCERS: Final[dict[type | tuple[type, ...], Callable[[Any], Any]]] = {
    # By value; `torch.multiprocessing` would share the memory.
    (torch.Tensor, torch.UntypedStorage, torch.TypedStorage): lambda tensor: tensor.__reduce_ex__(2),
    ModuleType: lambda module: (importlib.import_module, (module.__name__,)),
    CodeType: lambda code: (CodeType, tuple(getattr(code, f"co_{field}") for field in _CODE_FIELDS)),
    CellType: lambda cell: (CellType, (), _contents(cell), None, None, _fill_cell),
    MappingProxyType: lambda proxy: (MappingProxyType, (dict(proxy),)),
    property: lambda found: (property, (found.fget, found.fset, found.fdel, found.__doc__)),
    (staticmethod, classmethod): lambda method: (type(method), (method.__func__,)),
    functools._lru_cache_wrapper: lambda cached: (_wrap_in_cache, (cached.__wrapped__, cached.cache_parameters())),  # noqa: SLF001  # the class has no public name
}
"""How to send objects of some types that pickle cannot send, or sends otherwise."""
