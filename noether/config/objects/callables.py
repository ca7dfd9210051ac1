"""Where a class or function comes from, and whether it has a name."""

from __future__ import annotations

import sys
import types
from typing import Any

from noether.core.callables import without_partial


def is_lambda(target: Any) -> bool:
    """Return whether `target` is a bare lambda, which has no name."""
    return isinstance(target, types.FunctionType) and target.__name__ == "<lambda>"


def is_from(target: Any, *packages: str) -> bool:
    """Return whether the class or function that `target` is, or is an instance of, was defined in one of `packages`."""
    return _package_of(target) in packages


def is_foreign(target: Any) -> bool:
    """Return whether `target` comes from torch or from Python's own library."""
    package = _package_of(target)
    return package == "torch" or package in sys.stdlib_module_names - {"__main__"}


def _package_of(target: Any) -> str:
    module = getattr(without_partial(target), "__module__", None)
    return str(module).partition(".")[0]
