"""Output of the command line: escapes text from files, and survives a closed standard output or a full disk."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

import click

from noether.core.text import escape_controls
from noether.distributed.launch import launched_rank

if TYPE_CHECKING:
    from rich.console import Console

    from noether.effects.console.run_panels import RunPanel


def echo(text: object, *, err: bool = False) -> None:
    """Print lines of text, with control characters escaped; of several processes that were launched, rank 0 prints.

    Args:
        text: The lines.
        err: Whether to print to the standard error.
    """
    if not launched_rank():
        write(f"{printable(str(text))}\n", err=err)


def write(text: str, *, err: bool = False) -> None:
    r"""Write a text; characters that the encoding of the stream does not have become escapes such as `\u2581`.

    Args:
        text: The text, unchanged otherwise.
        err: Whether to write to the standard error.
    """
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    # click would write UTF-8 to a stream of ASCII, and fail at other encodings
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), nl=False, err=err)


def make_console() -> Console:
    """Return a console of rich on the standard output, which writes escapes for characters that its encoding lacks."""
    from rich.console import Console

    console = Console()
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="backslashreplace")
    return console


def printable(text: str) -> str:
    r"""Return a text with its control characters escaped, other than line breaks and tabs.

    Example:
        >>> printable("val/\x1b[31m")
        'val/\\x1b[31m'
    """
    return escape_controls(text, keep="\n\t")


def print_line(text: str, *, err: bool = False) -> None:
    """Print a line of a run; if the stream cannot be written, try the standard error, and else print nothing.

    A run continues without its output, and its exit code does not depend on it.

    Args:
        text: The line.
        err: Whether it goes to the standard error.
    """
    try:
        write(f"{printable(text)}\n", err=err)
    except (OSError, ValueError):  # ValueError: the stream is closed
        if not err:
            print_line(text, err=True)


def print_panel(panel: RunPanel, console: Console) -> None:
    """Print a panel: with a border on a terminal, else as lines with its title."""
    from noether.effects.console.run_panels import command_lines, plain_lines

    if console.is_terminal and not console.is_dumb_terminal:
        console.print(panel)
        for line in command_lines(panel, console.width):
            console.print(line, soft_wrap=True)
    else:
        echo("\n".join((panel.title, *plain_lines(panel))))


def discard_unwritten() -> None:
    """Redirect streams that cannot be flushed to `os.devnull`; else Python flushes at exit and ends with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # AttributeError: there is no stream
            _discard(stream)


def _discard(stream: object) -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[attr-defined]  # a stream without a file raises ValueError
        os.close(null)
    except (OSError, ValueError, AttributeError):
        return
