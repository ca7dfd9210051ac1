"""Panels that describe a run at its start and at its end, as boxes on a terminal and as aligned lines in a file.

`layout_panel` fits a panel into the width of a terminal: it breaks lines between words, and words that are longer than
a line after a `/` or another separator. In a file, each fact is one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, Final, final

from rich.box import ROUNDED
from rich.cells import cell_len
from rich.panel import Panel
from rich.text import Text

from noether.core.text import count_of, escape_controls
from noether.effects.console.next_commands import wrap_command
from noether.effects.console.tables import (
    GAP,
    HEAD,
    MIN_TEXT,
    NAME,
    TEXT,
    Table,
    arrange_columns,
    layout_table,
    pad,
    width_of,
    wrap_words,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from noether.effects.console.tables import Line

    Facts = Sequence[tuple[str, Sequence[str]]]

_BORDER: Final = 4  # columns of a line that the border and its padding take


@final
@dataclass(frozen=True, kw_only=True)
class RunPanel:
    r"""The content of a panel: a title, named facts, a table and commands.

    Args:
        title: The title, in the border.
        facts: Names, each with one or several entries.
        table: A table below the facts.
        commands: Names, each with a command; on a terminal they are below the border, so that they can be copied.
        style: Style of the border, as rich names it.
        max_lines: Maximum number of lines on a terminal, with the border; the last line counts the lines that are left
            out. None for no maximum.

    Example:
        >>> facts = [("model", ["Net, 1,638 parameters"]), ("data", ["train 1,205 samples", "val 296 samples"])]
        >>> print(*plain_lines(RunPanel(title="a run", facts=facts, commands=[("show", "noether show a")])), sep="|\n")
        model  Net, 1,638 parameters|
        data   train 1,205 samples; val 296 samples|
        show   noether show a
    """

    title: str
    facts: Facts = ()
    table: Table | None = None
    commands: Sequence[tuple[str, str]] = ()
    style: str = "dim"
    max_lines: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the panel for a terminal; the commands follow below its border."""
        width = options.max_width - _BORDER
        fits = cell_len(self.title) <= width - GAP
        lines = [] if fits else [((line, HEAD),) for line in wrap_words(escape_controls(self.title), width)]
        content = Text("\n").join(map(_to_text, self._fit_height([*lines, *layout_panel(self, width)])))
        title = Text(escape_controls(self.title), HEAD) if fits else None
        yield Panel(content, ROUNDED, title=title, title_align="left", border_style=self.style, expand=False)

    def _fit_height(self, lines: list[Line]) -> list[Line]:
        if self.max_lines is None or len(lines) <= self.max_lines - 2:
            return lines
        shown = lines[: max(self.max_lines - 3, 0)]
        left_out = count_of(len(lines) - len(shown), "more line")
        return [*shown, ((f"and {left_out}: make the terminal taller", self.style),)]


def plain_lines(panel: RunPanel) -> list[str]:
    """Return a panel as aligned lines for a file, without title and border."""
    name_width = width_of(name for name, _ in [*panel.facts, *panel.commands])
    facts = [(name, "; ".join(entries)) for name, entries in panel.facts]
    table = [] if panel.table is None or not panel.table.rows else layout_table(panel.table, None)
    lines = [*_lay_out_names(facts, name_width), *table, *_lay_out_names(panel.commands, name_width)]
    return [_to_text(line).plain.rstrip() for line in lines]


def command_lines(panel: RunPanel, width: int) -> list[Text]:
    """Return the commands of a panel, wrapped to `width` characters so that a shell still reads each as one command."""
    indent = width_of(name for name, _ in panel.commands) + GAP
    lines: list[Line] = []
    for name, command in panel.commands:
        heads = chain([name], repeat(""))
        for head, text in zip(heads, wrap_command(command, width - indent), strict=False):
            lines.append(((pad(escape_controls(head), indent), NAME), (escape_controls(text), TEXT)))
    return [_to_text(line) for line in lines]


def layout_panel(panel: RunPanel, width: int) -> list[Line]:
    """Return the facts and the table of a panel as lines of at most `width` characters."""
    name_width = width_of(name for name, _ in panel.facts)
    is_wide = width - name_width - GAP >= MIN_TEXT
    lines: list[Line] = []
    for name, entries in panel.facts:
        indent = name_width + GAP if is_wide else min(GAP, width - 2)
        texts = _arrange([escape_controls(entry) for entry in entries], width - indent)
        if is_wide:
            heads = [f"{pad(escape_controls(name), indent)}", *[" " * indent] * (len(texts) - 1)]
        else:
            lines += [((part, NAME),) for part in wrap_words(escape_controls(name), width)]
            heads = [" " * indent] * len(texts)
        lines += [((head, NAME), (text, TEXT)) for head, text in zip(heads, texts, strict=True)]
    if panel.table is not None and panel.table.rows:
        lines += [*([((("", TEXT)),)] if lines else []), *layout_table(panel.table, width)]
    return lines


def _arrange(entries: Sequence[str], width: int) -> list[str]:
    """Return entries in columns; if one is wider than a line, each on lines of its own, wrapped and indented."""
    if len(entries) <= 1 or width < MIN_TEXT:
        return [line for entry in entries for line in wrap_words(entry, width)] or [""]
    if width_of(entries) > width:
        wrapped = (wrap_words(entry, width if cell_len(entry) <= width else width - GAP) for entry in entries)
        return [f"{' ' * (GAP * (number > 0))}{line}" for lines in wrapped for number, line in enumerate(lines)]
    return arrange_columns(entries, width)


def _lay_out_names(entries: Iterable[tuple[str, str]], width: int) -> list[Line]:
    return [((pad(escape_controls(name), width + GAP), NAME), (escape_controls(text), TEXT)) for name, text in entries]


def _to_text(line: Line) -> Text:
    return Text.assemble(*line)
