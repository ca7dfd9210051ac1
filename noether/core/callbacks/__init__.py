"""The callbacks that noether ships, and the base classes for your own; `registry` lists them.

A callback touches its arguments, its settings (fields) and its memory (in the state), and nothing else.
"""

from noether.core.callbacks.registry import EXPORTS
from noether.core.exports import load_lazily

__getattr__, __dir__, __all__ = load_lazily(__name__, EXPORTS)
