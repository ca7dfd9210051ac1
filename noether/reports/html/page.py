"""The page of a report: a template around sections, with all scripts and styles inside the file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, final

from noether.reports.html.labels import escape_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ASSETS: Final = files("noether.reports.html") / "assets"
GENERATOR: Final = '<meta name="generator" content="noether report">'
"""The line by which a file is recognized as a report."""


@final
@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report, with a heading and an entry in the table of contents.

    Args:
        title: The heading, as text.
        anchor: Its id in the page: lowercase letters and `-`, used by no other section. The ids inside of `html` begin
            with it.
        html: The content, in which all text of a run is escaped.
        plots: Charts of bokeh, as `bokeh.embed.json_item` returns them, by the id of the element in `html` that each
            replaces.
    """

    title: str
    anchor: str
    html: str
    plots: Mapping[str, Any] = field(default_factory=dict)


def render_page(title: str, sections: Sequence[Section], data: Any) -> str:
    """Return a whole HTML page, which fetches nothing.

    Args:
        title: The title, as text.
        sections: The sections, in their order.
        data: What the script of the page draws charts from, as `charts.chart_data` returns it.

    Raises:
        ImportError: If bokeh is not installed.

    Example:
        >>> page = render_page("digits", [Section(title="Notes", anchor="notes", html="<p>1 &lt; 2</p>")], {})
        >>> page.startswith("<!doctype html>"), "Notes</h2><p>1 &lt; 2</p>" in page
        (True, True)
    """
    from bokeh.resources import Resources

    plots = {element: item for section in sections for element, item in section.plots.items()}
    scripts = Resources(mode="inline", components=["bokeh"]).js_raw
    contents = "".join(f'<li><a href="#{each.anchor}">{escape_text(each.title)}</a></li>' for each in sections)
    body = "".join(
        f'<section id="{each.anchor}" aria-labelledby="{each.anchor}-title"><h2 id="{each.anchor}-title">'
        f"{escape_text(each.title)}</h2>{each.html}</section>"
        for each in sections
    )
    parts = {
        "GENERATOR": GENERATOR,
        "TITLE": escape_text(title),
        "STYLE": _read("report.css"),
        "CONTENTS": contents,
        "BODY": body,
        "DATA": to_script_json({"charts": data, "plots": plots}),
        "SCRIPTS": "".join(f"<script>{_escape_script(script)}</script>\n" for script in [*scripts, _read("report.js")]),
    }
    page = _read("page.html")
    head, *rest = page.split("{{")
    pieces = [head]
    for piece in rest:  # `str.replace` would also replace names of parts inside of other parts
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def to_script_json(value: Any) -> str:
    r"""Return a value as JSON that may stand inside of a `<script>` element.

    Example:
        >>> to_script_json({"key": "</script>"})
        '{"key":"\\u003c/script>"}'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _escape_script(text: str) -> str:
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
