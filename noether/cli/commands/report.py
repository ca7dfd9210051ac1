"""`noether report`: writes the report of runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from noether.cli.options import check_picture
from noether.cli.output import echo
from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.core.errors import NoetherError
from noether.core.text import count_of
from noether.effects.disk.files import os_error_text
from noether.reports.html.page import GENERATOR
from noether.reports.html.picture import draw_picture
from noether.reports.html.report import write_report
from noether.reports.reading.run_record import read_run

if TYPE_CHECKING:
    from collections.abc import Sequence

_NAME = "report.html"
_HEAD_BYTES = 2000  # where the mark of a report is


def report(run_dirs: Sequence[Path], target: Path | None, png: Path | None) -> None:
    """Write the report of some runs, and print its path.

    Args:
        run_dirs: The run directories, at least one.
        target: The file; None for `report.html`, in the directory of a single run, else in the working directory.
        png: A picture of the curves to write as well, which is replaced if it exists; None for none.

    Raises:
        ConfigError: If one is not the directory of a run, or the file exists and is no report.
        NoetherError: If bokeh is not installed.
        OSError: If the file cannot be written.
    """
    runs = [read_run(path) for path in dict.fromkeys(run_dirs)]
    if find_spec("bokeh") is None:
        raise NoetherError("bokeh, which draws the charts, is not installed; run: pip install 'noether[report]'")
    if target is None:
        target = runs[0].path / _NAME if len(runs) == 1 else Path(_NAME)
    _check_target(target)
    check_picture(png)
    lines = []
    try:
        place = target
        write_report(runs, target)
        lines.append(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
        if png is not None:
            place = png
            picture, left_out = draw_picture(runs)
            png.write_bytes(picture)
            rest = f": without {count_of(left_out, 'metric')}, of which it has no room" if left_out else ""
            lines.append(f"{png}{rest}")
    except OSError as error:
        raise OSError(f"{place} could not be written: {os_error_text(error)}; give another file") from error
    for line in lines:
        echo(line)


def _check_target(target: Path) -> None:
    problem = None
    if target.is_dir():
        problem = f"is a folder; write {target / _NAME}"
    elif target.suffix.lower() not in {".html", ".htm"}:
        problem = f"is the name of another kind of file; write {target.with_suffix('.html').name}"
    elif not target.parent.is_dir():
        problem = f"the folder {str(target.parent)!r} does not exist; create it first"
    elif target.exists() and not (target.is_file() and _is_report(target)):
        problem = "exists already and is no report; remove it, or give another name"
    if problem is not None:
        raise ConfigError([LocatedProblem(Place(f"--to {target}"), (), problem)])


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(_HEAD_BYTES)
