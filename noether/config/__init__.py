"""YAML text into frozen settings: everything that is wrong is said at once, each with file and line."""

from __future__ import annotations

from noether.config.errors import ConfigError
from noether.config.loading import load, load_callbacks
from noether.config.schema import Config

__all__ = ["Config", "ConfigError", "load", "load_callbacks"]
