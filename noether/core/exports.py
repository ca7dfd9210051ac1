"""Lazy exports of a package: its stub lists each name once, for type checkers and for the import at run time.

Most modules import torch, which takes seconds. A package that exports lazily imports a module when one of its names is
first used, so `noether --help` and `import noether` do without torch.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from noether.core.errors import suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LINE: Final = re.compile(
    r"^(?:# (?P<heading>\w+)|from (?P<module>[\w.]+) import (?P<name>\w+) as (?P=name))$", re.MULTILINE
)


class Export(NamedTuple):
    """A name that a stub exports.

    Args:
        name: The name.
        module: The module that defines it.
        heading: The last comment of one word above it in the stub, or an empty text.
    """

    name: str
    module: str
    heading: str

    def load(self) -> Any:
        """Return the object, after importing its module."""
        return getattr(import_module(self.module), self.name)


def read_exports(package: str, stub: str = "__init__.pyi") -> dict[str, Export]:
    """Return the exports of a stub by name, in its order, without importing the modules that define them.

    Args:
        package: The package that contains the stub.
        stub: File name of the stub. Lines other than `from MODULE import NAME as NAME` and headings are skipped.

    Example:
        >>> read_exports("noether")["TrainState"]
        Export(name='TrainState', module='noether.core.state', heading='')
    """
    text = (pkgutil.get_data(package, stub) or b"").decode()
    exports, heading = {}, ""
    for line in _LINE.finditer(text):
        heading = line["heading"] or heading
        if line["name"]:
            exports[line["name"]] = Export(line["name"], line["module"], heading)
    return exports


def load_lazily(
    package: str, exports: Mapping[str, Export] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package that imports each of its names at its first use.

    Args:
        package: Name of the package.
        exports: Its names; None for those in its stub.

    Example:
        >>> load, names, _ = load_lazily("noether.config")
        >>> load("ConfigErorr")
        Traceback (most recent call last):
        AttributeError: module 'noether.config' has no attribute 'ConfigErorr'; did you mean 'ConfigError'?
    """
    known = read_exports(package) if exports is None else exports

    def load(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{suggest(name, known)}", name=name)
        value = known[name].load()
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted(known), list(known)
