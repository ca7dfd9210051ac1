"""Imports Keras with torch as its backend."""

from __future__ import annotations

import os
from typing import Any


def _import_keras() -> Any:
    # Keras chooses its backend at its first import; if that is here and no backend is set, it is torch.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras  # type: ignore[import-untyped]  # Keras is untyped

    check_backend(keras.backend.backend())
    return keras


def check_backend(name: str) -> None:
    """Refuse a backend that is not torch.

    Raises:
        ImportError: If it is another backend.

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


keras = _import_keras()
