"""Tables of a report as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.reports.html.labels import escape_text

if TYPE_CHECKING:
    from collections.abc import Sequence


def html_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose first column has the headings of its rows; every cell is text and is escaped.

    Args:
        caption: What the table shows.
        head: Headings of the columns.
        rows: Cells of each row, as many as `head`; None is an empty cell, and numbers are aligned on the right.

    Example:
        >>> html_table("Sizes", ["name", "bytes"], [["<a>", 12]])
        '<div class="scroll" tabindex="0" role="region" aria-label="Sizes"><table><caption>Sizes</caption>...'
        >>> "&lt;a&gt;" in html_table("Sizes", ["name", "bytes"], [["<a>", 12]])
        True
    """
    headings = "".join(f'<th scope="col">{escape_text(each)}</th>' for each in head)
    body = "".join(_row(row) for row in rows)
    name = escape_text(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[object]) -> str:
    first, *others = cells
    return f'<tr><th scope="row">{_text(first)}</th>{"".join(map(_cell, others))}</tr>'


def _cell(value: object) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f'<td class="number">{_text(value)}</td>' if is_number else f"<td>{_text(value)}</td>"


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return escape_text(f"{value:.5g}" if isinstance(value, float) else str(value))
