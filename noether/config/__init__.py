"""Reads YAML text into frozen settings and reports every problem at once, each with file and line.

A line here may touch YAML text, environment variables, signatures and importlib; it computes with no tensor, and
imports a module of the user only after `objects.import_policy` allowed it.
"""

from __future__ import annotations

from noether.config.errors import ConfigError
from noether.config.loading import load, load_callbacks
from noether.config.schema import Config

__all__ = ["Config", "ConfigError", "load", "load_callbacks"]
