"""Paths of callbacks in YAML of a class-based framework; the callbacks are in `noether.core.callbacks`."""

from noether.core.callbacks.evaluation import OfflineLossCallback

__all__ = ["OfflineLossCallback"]
