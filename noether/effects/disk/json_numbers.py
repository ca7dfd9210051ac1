"""Numbers as strict JSON can hold them: NaN and the infinities by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

NUMBER_TYPES: Final = frozenset({float, int, bool})
NUMBERS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def json_number(value: float) -> float | str:
    """Return a number as strict JSON can hold it: NaN and the infinities by name.

    Example:
        >>> json_number(0.5), json_number(float("nan")), json_number(float("-inf"))
        (0.5, 'NaN', '-Infinity')
    """
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def to_plain(value: Any) -> Any:
    """Return a logged value as strict JSON can hold it; tensors and scalars of numpy become numbers."""
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    number = value.item() if hasattr(value, "item") else value  # this module imports no torch
    return json_number(number) if isinstance(number, float) else number
