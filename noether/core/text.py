"""Text for a person: control characters made visible."""

from __future__ import annotations

import re
from typing import Final

# C0 and C1 controls, line separators, marks that reverse the direction of text, and halves of surrogate pairs, which no
# terminal can encode.
_CONTROLS: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
)


def escape_controls(text: str, keep: str = "") -> str:
    r"""Return text with control characters as visible escapes, so that printing it never controls a terminal.

    Args:
        text: The text.
        keep: Control characters that stay, such as line ends.

    Example:
        >>> print(escape_controls("a\x1b[2Jb\r\n"))
        a\x1b[2Jb\r\n
        >>> print(escape_controls("a\tb\x07", keep="\t"))
        a   b\x07
    """
    if text.isascii() and text.isprintable():  # the usual case
        return text
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
