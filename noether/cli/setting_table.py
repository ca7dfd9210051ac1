"""Tables of settings that fit the terminal: words are wrapped, and a narrow terminal gets fewer columns."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from noether.distributed.launch import launched_rank

if TYPE_CHECKING:
    from collections.abc import Iterable

    from noether.config.docstrings import Setting

_WIDTH = 100
_LONGEST_LINE = 120


def output_width() -> int:
    """Return the width of the terminal in characters; 100 without a terminal."""
    return shutil.get_terminal_size((_WIDTH, 1)).columns if sys.stdout.isatty() else _WIDTH


def wrap(text: str) -> str:
    """Return a text whose paragraphs are wrapped at words."""
    width = min(output_width(), _LONGEST_LINE)
    fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(fill(each) for each in text.split("\n\n"))


def print_settings(settings: Iterable[Setting]) -> None:
    """Print one row for each setting: its name, type, default and text."""
    width = output_width()
    print_table(narrow_table(settings) if width < _WIDTH else wide_table(settings))


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal."""
    Console(width=output_width(), highlight=False, quiet=launched_rank() > 0).print(table)


def wide_table(settings: Iterable[Setting]) -> Table:
    """Return a table with a column for each of name, type, default and text."""
    table = Table("setting", "type", "default", "description", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for each in settings:
        default = "required" if each.default is None else each.default
        table.add_row(*map(_cell, (each.name, each.kind, default, each.text)))
    return table


def narrow_table(settings: Iterable[Setting]) -> Table:
    """Return a table with the type and the default of a setting above its text."""
    table = Table("setting", "description", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for each in settings:
        table.add_row(Text(each.name), _cell(f"{each.kind}; {describe_default(each)}\n{each.text}"))
    return table


def _cell(text: str) -> Text:
    return Text(text, overflow="fold")


def describe_default(setting: Setting) -> str:
    """Return the default of a setting after the word `default`; `required` if it has no default.

    Example:
        >>> from noether.config.docstrings import Setting
        >>> describe_default(Setting("seed", "whole number", "0", "Seed of the run."))
        'default 0'
    """
    return "required" if setting.default is None else f"default {setting.default}"
