"""Output of the command line: text from files is escaped, and the standard output may be gone or its disk full."""

from __future__ import annotations

import os
import sys

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


def print_line(text: str, *, err: bool = False) -> None:
    """Print a line of a run; if the stream cannot be written, try the standard error, and else print nothing.

    A run goes on without its output, and no message decides its exit code.

    Args:
        text: The line.
        err: Whether it goes to the standard error.
    """
    try:
        echo(text, err=err)
    except (OSError, ValueError):  # ValueError: the stream is closed
        if not err:
            print_line(text, err=True)


def discard_unwritten() -> None:
    """Point streams that cannot be flushed to nowhere: Python would fail again as it exits, with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # AttributeError: there is no stream
            _discard(stream)


def _discard(stream: object) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]  # a stream without a file raises ValueError
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        return
