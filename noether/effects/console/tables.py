"""Tables, columns and texts as lines that fit a terminal: broken between words, and long words after a separator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, final

from rich.cells import cell_len, chop_cells

from noether.core.text import escape_controls

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    Line = tuple[tuple[str, str], ...]  # parts of a line, each with its style

GAP: Final = 2
COLUMN_GAP: Final = "    "  # between entries that are arranged in columns
MIN_TEXT: Final = 16  # smallest width of a column of texts; below it, texts go under their name
NAME, HEAD, TEXT = "cyan", "bold", ""
_PARTS: Final = re.compile(r"[^/._=[-]*[/._=[-]?")
_MAX_WHOLE: Final = 20  # characters of an entry, such as a time or an iteration, that stays in one line


@final
@dataclass(frozen=True)
class Table:
    """A table whose first column may have long texts; columns whose entries are all empty are left out.

    Args:
        columns: The names of the columns.
        rows: The entries of each row.
        right: Names of the right-aligned columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Collection[str] = ()


def table_lines(table: Table, width: int | None) -> list[str]:
    r"""Return the lines of a table as plain text.

    Args:
        table: The table.
        width: Columns of the terminal; None for lines of any length.

    Example:
        >>> table = Table(("metric", "value"), [("loss", "0.5"), ("accuracy", "10")], ["value"])
        >>> print(*table_lines(table, None), sep="|\n")
        metric    value|
        loss        0.5|
        accuracy     10
    """
    return ["".join(text for text, _ in line).rstrip() for line in layout_table(table, width)]


def layout_table(table: Table, width: int | None) -> list[Line]:
    """Return the lines of a table that fits the terminal.

    If the terminal is too narrow, the names of the columns are wrapped first, and then the entries of the widest
    columns. If the columns do not fit even so, each row becomes a paragraph.

    Args:
        table: The table.
        width: Columns of the terminal; None for lines of any length.
    """
    rows = [[escape_controls(entry) for entry in row] for row in (table.columns, *table.rows)]
    used = [number for number, column in enumerate(zip(*rows[1:], strict=True)) if any(column)]
    right = {place for place, number in enumerate(used) if table.columns[number] in table.right}
    rows = [[row[number] for number in used] for row in rows]
    widths = _fit_columns(rows, width)
    if widths is None:
        return list(_layout_paragraphs(rows, width or 0))
    lines: list[Line] = []
    for number, row in enumerate(rows):
        styles = (HEAD, HEAD) if number == 0 else (NAME, TEXT)
        cells = [
            wrap_words(entry, each) if cell_len(entry) > each else [entry]
            for entry, each in zip(row, widths, strict=True)
        ]
        for entries in zip_longest(*cells, fillvalue=""):
            name, *values = (
                pad(entry, each, right=place in right)
                for place, (entry, each) in enumerate(zip(entries, widths, strict=True))
            )
            text = "".join(" " * GAP + value for value in values).rstrip()
            lines.append(((name, styles[0]), (text, styles[1])))
    return lines


def _fit_columns(rows: Sequence[Sequence[str]], width: int | None) -> list[int] | None:
    """Return a width for each column with which all fit side by side; None if there is none."""
    widths = [width_of(column) for column in zip(*rows, strict=True)]
    if width is None:
        return widths
    room = width - GAP * (len(widths) - 1)
    if sum(widths) <= room:
        return widths
    for number, (head, *entries) in list(enumerate(zip(*rows, strict=True)))[1:]:
        widths[number] = max(2, width_of(entries), width_of(_PARTS.findall(head.replace(" ", "/"))))
    for limit in range(max(widths), MIN_TEXT - 1, -1):
        fitted = [min(each, limit if number == 0 else max(limit, _MAX_WHOLE)) for number, each in enumerate(widths)]
        if sum(fitted) <= room:
            return fitted
    return None


def _layout_paragraphs(rows: Sequence[Sequence[str]], width: int) -> Iterator[Line]:
    columns = rows[0][1:]
    indent = min(GAP, width - 2)
    for name, *entries in rows[1:]:
        yield from (((line, NAME),) for line in wrap_words(name, width))
        text = ", ".join(f"{column} {entry}" for column, entry in zip(columns, entries, strict=True) if entry)
        yield from (((" " * indent + line, TEXT),) for line in wrap_words(text, width - indent) if line)


def arrange_columns(texts: Sequence[str], width: int) -> list[str]:
    r"""Return lines of texts in as many columns as fit into `width` characters, each read from top to bottom.

    Example:
        >>> print(*arrange_columns(["train", "val", "test"], width=14), sep="|\n")
        train    test|
        val
    """
    longest = width_of(texts)
    column_count = max(1, (width + len(COLUMN_GAP)) // (longest + len(COLUMN_GAP)))
    row_count = -(-len(texts) // column_count)
    by_column = [texts[start : start + row_count] for start in range(0, len(texts), row_count)]
    rows = zip_longest(*by_column, fillvalue="")
    return [COLUMN_GAP.join(pad(text, longest) for text in row).rstrip() for row in rows]


def wrap_words(text: str, width: int) -> list[str]:
    """Return a text in lines of at most `width` characters; only words that are longer than a line are broken.

    Args:
        text: The text; any white space between two words counts as one space.
        width: Width in characters, >= 2.

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
    """Return a word in pieces of at most `width` characters, broken after separators where possible."""
    pieces = [""]
    for part in _PARTS.findall(word):
        for piece in chop_cells(part, width) if cell_len(part) > width else [part]:
            if cell_len(pieces[-1] + piece) <= width:
                pieces[-1] += piece
            else:
                pieces.append(piece)
    return pieces


def width_of(texts: Iterable[str]) -> int:
    """Return the width of the widest text in columns of a terminal; 0 without texts."""
    return max(map(cell_len, texts), default=0)


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Return a text padded with spaces to `width` columns of a terminal, left-aligned or right-aligned."""
    spaces = " " * (width - cell_len(text))
    return spaces + text if right else text + spaces
