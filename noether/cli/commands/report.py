"""`noether report`: writes the report of runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from noether.cli.options import check_picture, find_path_problem
from noether.cli.output import echo
from noether.config.errors import error_at
from noether.core.errors import NoetherError
from noether.core.text import count_of
from noether.effects.disk.files import os_error_text, replace_text
from noether.reports.html.page import GENERATOR
from noether.reports.html.picture import draw_picture
from noether.reports.html.report import render_report
from noether.reports.reading.run_record import read_run

if TYPE_CHECKING:
    from collections.abc import Sequence

_NAME = "report.html"
_HEAD_BYTES = 2000  # `GENERATOR` is among the first bytes of a report


def report(run_dirs: Sequence[Path], target: Path | None, png: Path | None) -> None:
    """Write the report of some runs, and print its path.

    Args:
        run_dirs: The run directories, at least one.
        target: The file; None for `report.html`, in the directory of a single run, else in the working directory.
        png: A picture of the curves to write as well, which is replaced if it exists; None for no picture.

    Raises:
        ConfigError: If a path is not the directory of a run, or `target` exists and is not a report.
        UsageError: If `png` cannot be the path of a picture, or matplotlib is not installed.
        NoetherError: If bokeh is not installed.
        OSError: If a file of a run cannot be read, or a file cannot be written.
    """
    runs = [read_run(path) for path in dict.fromkeys(run_dirs)]
    if find_spec("bokeh") is None:
        raise NoetherError("bokeh, which draws the charts, is not installed; run: pip install 'noether[report]'")
    if target is None:
        target = runs[0].path / _NAME if len(runs) == 1 else Path(_NAME)
    _check_target(target)
    check_picture(png)
    page, drawn = render_report(runs), None if png is None else draw_picture(runs)
    lines = []
    place = target
    try:
        replace_text(target, page)
        lines.append(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
        if png is not None and drawn is not None:
            place = png
            picture, left_out = drawn
            png.write_bytes(picture)
            rest = f": leaves out {count_of(left_out, 'metric')}, for which it has no space" if left_out else ""
            lines.append(f"{png}{rest}")
    except OSError as error:
        raise OSError(f"{place} could not be written: {os_error_text(error)}; give another file") from error
    for line in lines:
        echo(line)


def _check_target(target: Path) -> None:
    problem = find_path_problem(target, ".html", ".htm")
    if problem is None and target.exists() and not (target.is_file() and _is_report(target)):
        problem = "the file exists and is not a report; remove it, or give another name"
    if problem is not None:
        raise error_at(f"--to {target}", problem)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(_HEAD_BYTES)
