"""The callbacks that noether ships, by name and category, as strings: reading them imports no torch.

`shipped.pyi` lists them, one line each, as import statements for type checkers. The names of `noether` and of
`noether.core.callbacks`, the list of `noether callbacks`, the law tests and the README's table follow it.
"""

from __future__ import annotations

from typing import Final

from noether.core.exports import Export, read_exports

CATEGORIES: Final = ("watch", "describe", "measure", "save", "act")

SHIPPED: Final[dict[str, Export]] = read_exports("noether.core.callbacks", "shipped.pyi")
"""Callbacks by name; the heading of each is its category."""

EXPORTS: Final[dict[str, Export]] = {**SHIPPED, **read_exports("noether.core.callbacks")}
"""All names of `noether.core.callbacks`: callbacks, base classes and aliases."""

ALIASES: Final = tuple(name for name, export in EXPORTS.items() if export.heading == "aliases")
"""Names that a class-based framework gives to some of the callbacks."""
