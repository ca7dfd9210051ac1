"""Reads YAML text into frozen settings and reports every problem at once, each with file and line.

A line here may touch YAML text, environment variables, signatures and importlib; it computes with no tensor, and
imports a module of the user only after `objects.import_policy` allowed it.
"""

from noether.core.exports import load_lazily

__getattr__, __dir__, __all__ = load_lazily(__name__)
