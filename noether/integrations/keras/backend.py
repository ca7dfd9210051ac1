"""Keras, with torch as its backend."""

from __future__ import annotations

import os
from typing import Any


def _on_torch() -> Any:
    # Keras chooses its backend when it is first imported; whoever imports it here first, and chose none, gets torch.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras  # type: ignore[import-untyped]  # it has no types

    check_backend(keras.backend.backend())
    return keras


def check_backend(name: str) -> None:
    """Refuse a backend that is not torch.

    Raises:
        ImportError: If it is another one.

    Example:
        >>> check_backend("jax")
        Traceback (most recent call last):
        ImportError: Keras runs on 'jax', and states view tensors of torch: set KERAS_BACKEND=torch in the environment
        before keras is imported
    """
    if name != "torch":
        raise ImportError(
            f"Keras runs on {name!r}, and states view tensors of torch: set KERAS_BACKEND=torch in the environment "
            "before keras is imported"
        )


keras = _on_torch()
