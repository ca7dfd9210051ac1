"""The section of the environment: code, machine and packages of each process that trained a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section
from noether.reports.html.tables import html_table
from noether.reports.setting_paths import walk_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.reports.reading.run_record import RunRecord

_DIFF_CHARACTERS: Final = 200_000


def environment_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section of code, machine and packages; None if no run has recorded them."""
    columns: dict[str, Mapping[str, Any]] = {}
    diffs = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        for begin, process in run.provenance.items():
            if isinstance(process, dict):
                name = label if len(run.provenance) == 1 else f"{label} from {begin}"
                columns[name] = dict(walk_settings(process))
                diffs.append(_diff(name, run, process))
    if not columns:
        return None
    names = dict.fromkeys(name for each in columns.values() for name in each)
    rows = [[name, *(_show(each.get(name)) for each in columns.values())] for name in names]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if row not in differ]
    tables = html_table("Differences", ["", *columns], differ) if differ else ""
    if same:
        caption = "The same for all processes" if len(columns) > 1 else "Code, machine and packages"
        table = html_table(caption, ["", "value"], same)
        tables += f"<details{'' if differ else ' open'}><summary>{caption}</summary>{table}</details>"
    return Section(title="Environment", anchor="environment", html=tables + "".join(diffs))


def _show(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _diff(name: str, run: RunRecord, process: Mapping[str, Any]) -> str:
    """Return the changes of the code since its commit as HTML; an empty text without changes."""
    code = process.get("git")
    file = code.get("diff") if isinstance(code, dict) else None
    if not isinstance(file, str):
        return ""
    path = run.path / file
    try:
        if not path.resolve().is_relative_to(run.path.resolve()):
            return ""
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"<p>{escape_text(name)}: the file of the changes to the code, {escape_text(file)}, is missing.</p>"
    cut = (
        f"\n... {len(text) - _DIFF_CHARACTERS:,} more characters are in {file}" if len(text) > _DIFF_CHARACTERS else ""
    )
    return (
        f"<details><summary>Changes to the code since its commit, in {escape_text(name)}</summary>"
        f'<pre tabindex="0">{escape_text(text[:_DIFF_CHARACTERS] + cut)}</pre></details>'
    )
