"""Options that several commands have."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

SET = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a setting, e.g. trainer.max_epochs=20; repeatable.",
)
ALLOW = click.option(
    "--allow",
    metavar="PREFIX",
    multiple=True,
    help="Let `kind` in YAML name modules that begin with PREFIX; repeatable.",
)
CHECKPOINT_NAMES = (
    "Tag of a checkpoint, e.g. E10_U200_S800, or a part of it, e.g. E10; a pointer, e.g. latest; newest, or best"
)


def check_picture(png: Path | None) -> None:
    """Check that the picture can be written, before other work takes time.

    Raises:
        UsageError: If it has the name of another kind of file, or the folder or matplotlib is missing.
    """
    if png is None:
        return
    if not png.parent.is_dir():
        raise click.UsageError(f"--png {png}: the folder {str(png.parent)!r} does not exist; create it first")
    if png.is_dir():
        raise click.UsageError(f"--png {png}: is a folder; give the path of a file")
    is_device = png.exists() and not png.is_file()
    if png.suffix.lower() != ".png" and not is_device:
        fix = f"write {png.with_suffix('.png').name}"
        raise click.UsageError(f"--png {png}: is the name of another kind of file than a PNG image; {fix}")
    if find_spec("matplotlib") is None:
        raise click.UsageError("--png: matplotlib is not installed; run: pip install 'noether[plot]'")
