"""Writing to the terminal: text from files is escaped, so that it cannot send commands to the terminal."""

from __future__ import annotations

import click

from noether.core.text import escape_controls


def echo(text: object, *, err: bool = False) -> None:
    """Print lines of text, with control characters escaped.

    Args:
        text: The lines.
        err: Whether to print to the standard error.
    """
    click.echo(printable(str(text)), err=err)


def printable(text: str) -> str:
    r"""Return a text with its control characters escaped, other than line breaks and tabs.

    Example:
        >>> printable("val/\x1b[31m")
        'val/\\x1b[31m'
    """
    return escape_controls(text, keep="\n\t")
