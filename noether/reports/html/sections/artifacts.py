"""The section of artifacts: figures, images, histograms, tables and texts that a run logged, the newest first.

Those of one event, such as the histograms of all layers, are in the order in which they were logged.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Final

from noether.core.text import count_of, format_bytes
from noether.reports.html.histograms import draw_histograms
from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section
from noether.reports.html.tables import html_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from noether.reports.reading.run_record import ArtifactRecord, RunRecord

_PICTURE_BYTES: Final = 450_000  # of all pictures of a page, so that it stays below 2 MB
_TEXT_CHARACTERS: Final = 10_000
_TABLE_ROWS: Final = 50
_MIME: Final = {".png": "image/png", ".svg": "image/svg+xml"}


def artifacts_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section of the artifacts; None if there are none.

    The page embeds pictures up to 450 kB in total, and lists how many it leaves out, with the path of the newest.
    """
    parts: list[str] = []
    budget = _Budget(_PICTURE_BYTES)
    for label, run in zip(run_labels(runs), runs, strict=True):
        by_key: dict[str, list[ArtifactRecord]] = {}
        for each in sorted(run.artifacts, key=lambda each: (each.point.update, each.point.epoch), reverse=True):
            by_key.setdefault(each.key, []).append(each)
        for key, records in by_key.items():
            heading = key if len(runs) == 1 else f"{key} of {label}"
            content = "".join(_show_all(run.path.resolve(), heading, records, budget))
            parts.append(f"<h3>{escape_text(heading)}</h3>{content}")
    return Section(title="Artifacts", anchor="artifacts", html="".join(parts)) if parts else None


class _Budget:
    """Bytes that may still be embedded."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, size: int) -> bool:
        """Return whether `size` bytes may be embedded, and count them if so."""
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


def _show_all(folder: Path, heading: str, records: Sequence[ArtifactRecord], budget: _Budget) -> Iterator[str]:
    """Yield the HTML of the artifacts of one key, given the newest first."""
    newest = records[0]
    if newest.kind == "histogram":
        histograms = [(each.point.update, _read_json(folder, each)) for each in reversed(records)]
        yield draw_histograms(heading, [(update, each) for update, each in histograms if each is not None])
        return
    if newest.kind not in {"figure", "images"}:
        yield _show_text(folder, heading, newest)
        if len(records) > 1:
            yield f"<p>{count_of(len(records) - 1, 'earlier one')} in {escape_text(str(folder / 'artifacts'))}.</p>"
        return
    embedded = [budget.take(4 * each.bytes // 3) for each in records]
    pictures = [_picture(folder, each) for each, fits in zip(records, embedded, strict=True) if fits]
    left_out = [each for each, fits in zip(records, embedded, strict=True) if not fits]
    yield "".join(pictures[:1])
    if pictures[1:]:
        earlier = "".join(pictures[1:])
        yield f"<details><summary>{count_of(len(pictures) - 1, 'earlier one')}</summary>{earlier}</details>"
    if left_out:
        size = format_bytes(sum(each.bytes for each in left_out))
        yield (
            f"<p>Left out, because the page would be too large: {count_of(len(left_out), 'picture')} of {size}; "
            f"the newest is {escape_text(str(left_out[0].path))}.</p>"
        )


def _picture(folder: Path, record: ArtifactRecord) -> str:
    content, mime = _read(folder, record), _MIME.get(record.path.suffix)
    where = f"update {record.point.update:,}"
    if content is None or mime is None:
        return _missing(record)
    text = f"{record.key} at {where}"
    caption = f"{where}: {record.caption}" if record.caption else where
    # An SVG file in an `img` runs no script and fetches nothing.
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img class="{record.kind}" loading="lazy" alt="{escape_text(text)}" src="data:{mime};base64,{data}">'
        f"<figcaption>{escape_text(caption)}</figcaption></figure>"
    )


def _show_text(folder: Path, heading: str, record: ArtifactRecord) -> str:
    """Return a table or a text; of another file, its name and size."""
    where = f"{heading} at update {record.point.update:,}"
    if record.kind == "table":
        table = _read_json(folder, record)
        if table is not None and table.get("columns"):
            rows = table["rows"][:_TABLE_ROWS]
            more = len(table["rows"]) - len(rows)
            note = f"<p>{count_of(more, 'more row')} in {escape_text(str(record.path))}.</p>" if more else ""
            return html_table(where, table["columns"], rows) + note
    elif record.kind == "text":
        content = _read(folder, record)
        if content is not None:
            text = content.decode(errors="replace")
            return f'<p>{escape_text(where)}</p><pre tabindex="0">{escape_text(text[:_TEXT_CHARACTERS])}</pre>'
    elif record.path.exists():
        return f"<p>{escape_text(where)}: {escape_text(str(record.path))}, {format_bytes(record.bytes)}</p>"
    return _missing(record)


def _missing(record: ArtifactRecord) -> str:
    return f"<p>The file {escape_text(str(record.path))} is missing or cannot be shown.</p>"


def _read_json(folder: Path, record: ArtifactRecord) -> Any:
    content = _read(folder, record)
    try:
        value = None if content is None else json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read(folder: Path, record: ArtifactRecord) -> bytes | None:
    """Return the content of the file; None if it is missing, or lies outside of the run."""
    try:
        path = record.path.resolve()
        return path.read_bytes() if path.is_relative_to(folder) else None
    except OSError:
        return None
