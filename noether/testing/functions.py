"""What functions hold and refer to, and copies and proxies of callbacks."""

from __future__ import annotations

import copy
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.callback import Callback

_Value = TypeVar("_Value")
_LIBRARIES: Final = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})


@cache
def is_library(module: str) -> bool:
    """Return whether a module belongs to Python, to an installed package or to noether, and not to the tested code.

    Example:
        >>> is_library("torch.nn"), is_library("noether.core.callbacks.ema"), is_library("__main__")
        (True, True, False)
    """
    package = module.partition(".")[0]
    if package == "noether" or package in sys.stdlib_module_names:
        return module != "__main__"
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and str(Path(file).resolve()).startswith(_LIBRARIES)


def closure_of(function: FunctionType) -> dict[str, Any]:
    """Return the variables that a function took from the functions around it; those not assigned yet are left out.

    Example:
        >>> def scale_by(factor):
        ...     return lambda value: value * factor
        >>> closure_of(scale_by(3))
        {'factor': 3}
    """
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if not _is_empty(cell)}


def globals_of(function: FunctionType) -> dict[str, Any]:
    """Return the globals of its module that a function names, and the attributes that it reads of user modules."""
    found: dict[str, Any] = {}
    names = names_of(function.__code__)
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        if isinstance(value, type(sys)):
            attributes = [] if is_library(value.__name__) else [each for each in names if each in vars(value)]
            found |= {f"{name}.{each}": vars(value)[each] for each in attributes}
        else:
            found[name] = value
    return found


class CallbackProxy:
    """Base of objects that call a callback in a special way; they have its name, memory and declarations.

    Args:
        callback: The callback.
    """

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def __getattr__(self, name: str) -> Any:
        # By the other special names, `inspect` would take this object for a function with the parameters of another.
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        return getattr(self._callback, name)


def copy_callback(callback: _Value) -> _Value:
    """Return a deep copy of a callback, with copies of the closures, defaults and attributes of its functions.

    `copy.deepcopy` shares functions, so memory in a closure would outlive the copy. What cannot be copied, such as an
    open file, is shared.

    Example:
        >>> def counting():
        ...     calls = []
        ...     return lambda: calls.append(0) or len(calls)
        >>> count = counting()
        >>> copied = copy_callback(count)
        >>> count(), count(), copied()
        (1, 2, 1)
    """
    memo: dict[int, Any] = {}
    cells: dict[int, CellType] = {}
    functions = list(_functions(callback, set()))
    for function in functions:
        new = [cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ()]
        copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(new))
        memo[id(function)] = copied
    for function in functions:
        copied = memo[id(function)]
        copied.__defaults__ = _copy_or_share(function.__defaults__, memo)
        copied.__kwdefaults__ = _copy_or_share(function.__kwdefaults__, memo)
        copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
        copied.__dict__.update(_copy_or_share(vars(function), memo))
        for cell in function.__closure__ or ():
            if not _is_empty(cell) and _is_empty(cells[id(cell)]):
                cells[id(cell)].cell_contents = _copy_or_share(cell.cell_contents, memo)
    return copy.deepcopy(callback, memo)


def _functions(value: Any, seen: set[int]) -> Iterator[FunctionType]:
    """Yield the functions of user code that `value` holds: itself, in containers, in attributes, in closures."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, FunctionType):
        if is_library(value.__module__ or "") and not value.__closure__:
            return
        yield value
        parts = [*closure_of(value).values(), *vars(value).values(), value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif not isinstance(value, (type, type(sys))):
        bound = [getattr(value, name, None) for name in ("func", "__self__", "__func__")]  # of partials and methods
        parts = [*bound, *getattr(value, "args", ()), *getattr(value, "__dict__", {}).values()]
    for part in parts:
        yield from _functions(part, seen)


def _copy_or_share(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001  # what a class raises that cannot be copied is unknown
        return value


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises if it is empty
    except ValueError:
        return True
    return False


@cache
def names_of(code: CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes that a function uses, those of the functions inside it included."""
    inner = [name for each in code.co_consts if isinstance(each, CodeType) for name in names_of(each)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))
