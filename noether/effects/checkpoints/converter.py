"""Converts plain classes to JSON values and back, and describes why that failed."""

from __future__ import annotations

from typing import Final

from cattrs import transform_error
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter

from noether.core.iteration import TrainingIteration

_MAX_ERROR_CHARS: Final = 300

CONVERTER: Final = make_converter(forbid_extra_keys=True)
"""Converts between classes and JSON values; it refuses unknown keys."""
CONVERTER.register_unstructure_hook(TrainingIteration, str)
CONVERTER.register_structure_hook(TrainingIteration, lambda text, _: TrainingIteration.parse(text))


def error_text(error: BaseException) -> str:
    r"""Return the message of a library's error in one printable line of at most 300 characters.

    Example:
        >>> error_text(ValueError("no\n"))
        'ValueError: no\\n'
    """
    validation = isinstance(error, BaseValidationError)
    text = "; ".join(transform_error(error)) if validation else f"{type(error).__name__}: {error}"
    return text.encode("unicode_escape").decode()[:_MAX_ERROR_CHARS]
