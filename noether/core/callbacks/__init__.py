"""The callbacks that noether ships, and the base classes for your own; `registry` lists them.

A callback touches its arguments, its settings (fields) and its memory (in the state), and nothing else.
"""

from typing import Any

from noether.core.callbacks.registry import EXPORTS
from noether.core.errors import suggest

__all__ = list(EXPORTS)  # the stub lists them


def __getattr__(name: str) -> Any:
    """Return a callback or base class, imported at its first use."""
    if name not in EXPORTS:
        hint = suggest(name, EXPORTS)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}", name=name)
    value = globals()[name] = EXPORTS[name].load()
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
