"""The section of settings: where the configurations of the runs differ, and each configuration as YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section
from noether.reports.html.tables import html_table
from noether.reports.setting_paths import comparable_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.reports.reading.run_record import RunRecord


def configuration_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section of the configurations; None if no run has one."""
    if not any(run.config for run in runs):
        return None
    labels = run_labels(runs)
    flat = [comparable_settings(run.config) for run in runs]
    parts = [_difference_table(labels, flat)] if len(runs) > 1 else []
    for label, run in zip(labels, runs, strict=True):
        text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        is_open = " open" if len(runs) == 1 else ""
        content = f'<pre tabindex="0">{escape_text(text)}</pre>'
        parts.append(f"<details{is_open}><summary>{escape_text(label)}</summary>{content}</details>")
    return Section(title="Configuration", anchor="configuration", html="".join(parts))


def _difference_table(labels: Sequence[str], flat: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for each in flat for name in each)
    missing = object()
    different = [name for name in names if len({repr(each.get(name, missing)) for each in flat}) > 1]
    if not different:
        return "<p>The configurations are equal.</p>"
    rows = [[name, *(_show(each, name) for each in flat)] for name in different]
    return html_table("Settings that differ", ["setting", *labels], rows)


def _show(settings: Mapping[str, Any], name: str) -> str:
    return yaml.safe_dump(settings[name]).removesuffix("\n...\n").strip() if name in settings else "not set"
