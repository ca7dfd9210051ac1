"""Panels that describe a run at its start and at its end: what they say, and how they look on a terminal and in a file.

`layout` fits a panel into the width of a terminal. It breaks lines between words, and a word that is longer than a line
after a `/` or another separator. Without a width, each fact is one line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest
from typing import TYPE_CHECKING, Final, final

from rich.box import ROUNDED
from rich.cells import cell_len, chop_cells
from rich.panel import Panel
from rich.text import Text

from noether.core.text import count_of, escape_controls
from noether.effects.console.next_commands import wrap_command

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    Line = tuple[tuple[str, str], ...]  # parts of a line, each with its style
    Facts = Sequence[tuple[str, Sequence[str]]]

_GAP: Final = 2
_MIN_TEXT: Final = 16  # characters for which a column of texts is worth its place
_BORDER: Final = 4  # characters of a line that are left and right of the content of a panel
_PARTS: Final = re.compile(r"[^/._=-]*[/._=-]?")
_NAME, _HEAD, _TEXT = "cyan", "bold", ""


@final
@dataclass(frozen=True)
class Table:
    """A table whose first column has texts that may be long; columns without any entry are left out.

    Args:
        columns: The names of the columns.
        rows: The entries of each row.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@final
@dataclass(frozen=True, kw_only=True)
class RunPanel:
    r"""What a panel says.

    Args:
        title: Its first line.
        facts: Names with what there is to say, each in one or several entries.
        table: A table below the facts.
        commands: Names with commands; a terminal has them below the border, so that they can be copied.
        style: Colour of the border.
        max_lines: Most lines on a terminal, border included; the last one says how many are left out. None for all.

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
        fits = cell_len(self.title) <= width - _GAP
        lines = [] if fits else [((line, _HEAD),) for line in wrap_words(escape_controls(self.title), width)]
        content = Text("\n").join(map(_to_text, self._fit_height([*lines, *layout(self, width)])))
        title = Text(escape_controls(self.title), _HEAD) if fits else None
        yield Panel(content, ROUNDED, title=title, title_align="left", border_style=self.style, expand=False)

    def _fit_height(self, lines: list[Line]) -> list[Line]:
        if self.max_lines is None or len(lines) <= self.max_lines - 2:
            return lines
        shown = lines[: max(self.max_lines - 3, 0)]
        left_out = count_of(len(lines) - len(shown), "more line")
        return [*shown, ((f"and {left_out}: make the terminal taller", self.style),)]


def plain_lines(panel: RunPanel) -> list[str]:
    """Return a panel as lines of a file: aligned, without title and border."""
    names = _width(name for name, _ in [*panel.facts, *panel.commands])
    facts = [(name, "; ".join(entries)) for name, entries in panel.facts]
    table = [] if panel.table is None or not panel.table.rows else _layout_table(panel.table, None)
    lines = [*_name_lines(facts, names), *table, *_name_lines(panel.commands, names)]
    return [_to_text(line).plain.rstrip() for line in lines]


def command_lines(panel: RunPanel, width: int) -> list[Text]:
    """Return the commands of a panel as lines for a terminal of `width` characters, so that they can be copied."""
    indent = _width(name for name, _ in panel.commands) + _GAP
    lines: list[Line] = []
    for name, command in panel.commands:
        heads = chain([name], repeat(""))
        for head, text in zip(heads, wrap_command(command, width - indent), strict=False):
            lines.append(((_pad(escape_controls(head), indent), _NAME), (escape_controls(text), _TEXT)))
    return [_to_text(line) for line in lines]


def layout(panel: RunPanel, width: int) -> list[Line]:
    """Return facts and table as lines of at most `width` characters."""
    names = _width(name for name, _ in panel.facts)
    is_wide = width - names - _GAP >= _MIN_TEXT
    lines: list[Line] = []
    for name, entries in panel.facts:
        indent = names + _GAP if is_wide else min(_GAP, width - 2)
        texts = _arrange([escape_controls(entry) for entry in entries], width - indent)
        if is_wide:
            heads = [f"{_pad(escape_controls(name), indent)}", *[" " * indent] * (len(texts) - 1)]
        else:
            lines += [((part, _NAME),) for part in wrap_words(escape_controls(name), width)]
            heads = [" " * indent] * len(texts)
        lines += [((head, _NAME), (text, _TEXT)) for head, text in zip(heads, texts, strict=True)]
    if panel.table is not None and panel.table.rows:
        lines += [*([((("", _TEXT)),)] if lines else []), *_layout_table(panel.table, width)]
    return lines


def wrap_words(text: str, width: int) -> list[str]:
    """Return a text in lines of at most `width` characters, which is at least 2; only longer words are broken.

    Example:
        >>> wrap_words("the run is in runs/digits/20260102-030405", 20)
        ['the run is in', 'runs/digits/', '20260102-030405']
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += _break_word(word, width)
    return [line for line in lines if line] or [""]


def _break_word(word: str, width: int) -> list[str]:
    """Return a word in pieces that fit: broken after a separator where that is possible."""
    pieces = [""]
    for part in _PARTS.findall(word):
        for piece in chop_cells(part, width) if cell_len(part) > width else [part]:
            if cell_len(pieces[-1] + piece) <= width:
                pieces[-1] += piece
            else:
                pieces.append(piece)
    return pieces


def _arrange(entries: Sequence[str], width: int) -> list[str]:
    """Return short entries in columns, read downwards, and long ones wrapped, with further lines indented."""
    longest = _width(entries)
    if len(entries) <= 1 or width < _MIN_TEXT:
        return [line for entry in entries for line in wrap_words(entry, width)] or [""]
    if longest > width:
        wrapped = (wrap_words(entry, width if cell_len(entry) <= width else width - _GAP) for entry in entries)
        return [f"{' ' * (_GAP * (number > 0))}{line}" for lines in wrapped for number, line in enumerate(lines)]
    columns = max(1, (width + 2 * _GAP) // (longest + 2 * _GAP))
    rows = -(-len(entries) // columns)
    by_column = [entries[start : start + rows] for start in range(0, len(entries), rows)]
    padded = ([_pad(entry, longest + 2 * _GAP) for entry in row] for row in zip_longest(*by_column, fillvalue=""))
    return ["".join(row).rstrip() for row in padded]


def _layout_table(table: Table, width: int | None) -> list[Line]:
    """Return the lines of a table; where its columns do not fit beside each other, each row is a paragraph.

    In a narrow terminal, the names of columns are wrapped to the width of their entries, and then the first column.
    """
    rows = [[escape_controls(entry) for entry in row] for row in (table.columns, *table.rows)]
    used = [number for number, column in enumerate(zip(*rows[1:], strict=True)) if any(column)]
    rows = [[row[number] for number in used] for row in rows]
    widths = [_width(column) for column in zip(*rows, strict=True)]
    if width is not None and sum(widths) + _GAP * (len(widths) - 1) > width:
        for number, (head, *entries) in list(enumerate(zip(*rows, strict=True)))[1:]:
            widths[number] = max(2, _width(entries), _width(_PARTS.findall(head.replace(" ", "/"))))
        left = width - sum(widths[1:]) - _GAP * (len(widths) - 1)
        if left < min(widths[0], _MIN_TEXT):
            return list(_layout_paragraphs(rows, width))
        widths[0] = min(widths[0], left)
    lines: list[Line] = []
    for number, row in enumerate(rows):
        styles = (_HEAD, _HEAD) if number == 0 else (_NAME, _TEXT)
        cells = [
            wrap_words(entry, each) if cell_len(entry) > each else [entry]
            for entry, each in zip(row, widths, strict=True)
        ]
        for name, *entries in zip_longest(*cells, fillvalue=""):
            values = "".join(" " * _GAP + _pad(entry, each) for entry, each in zip(entries, widths[1:], strict=True))
            lines.append(((_pad(name, widths[0]), styles[0]), (values.rstrip(), styles[1])))
    return lines


def _layout_paragraphs(rows: Sequence[Sequence[str]], width: int) -> Iterator[Line]:
    columns = rows[0][1:]
    indent = min(_GAP, width - 2)
    for name, *entries in rows[1:]:
        yield from (((line, _NAME),) for line in wrap_words(name, width))
        text = ", ".join(f"{column} {entry}" for column, entry in zip(columns, entries, strict=True) if entry)
        yield from (((" " * indent + line, _TEXT),) for line in wrap_words(text, width - indent) if line)


def _name_lines(entries: Iterable[tuple[str, str]], width: int) -> list[Line]:
    return [
        ((_pad(escape_controls(name), width + _GAP), _NAME), (escape_controls(text), _TEXT)) for name, text in entries
    ]


def _width(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _to_text(line: Line) -> Text:
    return Text.assemble(*line)
