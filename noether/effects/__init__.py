"""Effects: the only code that does I/O. The interpreter runs the effects that callbacks return.

A line here may touch files, streams and devices; it reads the state and never changes it.
"""

from noether.core.exports import load_lazily

__getattr__, __dir__, __all__ = load_lazily(__name__)
