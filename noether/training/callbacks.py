"""Callbacks under the path that the class-based framework gives them; they live in `noether.core.callbacks`."""

from noether.core.callbacks.evaluation import OfflineLossCallback

__all__ = ["OfflineLossCallback"]
