"""Text for a person: control characters made visible, counts, sizes and durations."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

# C0 and C1 controls, line separators, marks that reverse the direction of text, and halves of surrogate pairs, which no
# terminal can encode.
_CONTROLS: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
)

_THOUSAND: Final = 1000
_MINUTE_S: Final = 60.0
_DAY_S: Final = 86_400
_LONGEST_S: Final = timedelta.max.days * _DAY_S


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


def count_of(number: int, noun: str, plural: str | None = None, form: str = "") -> str:
    """Return a number with what it counts, in the singular for one.

    Args:
        number: The number.
        noun: What it counts.
        plural: Its plural; None to append an s.
        form: Format of the number, such as `,`.

    Example:
        >>> count_of(1, "checkpoint"), count_of(1200, "update", form=","), count_of(0, "batch", "batches")
        ('1 checkpoint', '1,200 updates', '0 batches')
    """
    return f"{number:{form}} {noun if number == 1 else plural or f'{noun}s'}"


def format_bytes(count: float) -> str:
    """Return a number of bytes as text.

    Example:
        >>> format_bytes(999), format_bytes(1_230), format_bytes(1_508_884), format_bytes(2.5e12)
        ('999 B', '1.23 kB', '1.51 MB', '2.50 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if round(count) < _THOUSAND:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= _THOUSAND
    return f"{count:,.2f} TB"


def format_duration(seconds: float) -> str:
    """Return a duration as `h:mm:ss`, whole seconds; a negative one is zero.

    Example:
        >>> format_duration(3661.5), format_duration(-1.0)
        ('1:01:01', '0:00:00')
    """
    if 0 <= seconds < _DAY_S:
        minutes, rest = divmod(int(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    return str(timedelta(seconds=int(min(max(seconds, 0.0), _LONGEST_S))))


def format_seconds(seconds: float) -> str:
    """Return a duration: in seconds below a minute, then as `h:mm:ss`.

    Example:
        >>> format_seconds(0.0312), format_seconds(12.34), format_seconds(75)
        ('0.03 s', '12.3 s', '0:01:15')
    """
    if seconds >= _MINUTE_S:
        return format_duration(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
