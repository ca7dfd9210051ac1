"""Outputs of models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def drop_loss(outputs: Any) -> Any:
    """Return the outputs of a model without the loss, and a single one bare, as transformers does for predictions."""
    if isinstance(outputs, Mapping):
        outputs = {name: value for name, value in outputs.items() if name != "loss"}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs
    others = tuple(outputs[1:])
    return others[0] if len(others) == 1 else others
