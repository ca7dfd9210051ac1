"""Options that several commands have, and the check of the paths of files that commands write."""

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


def find_path_problem(path: Path, *suffixes: str) -> str | None:
    """Return why a command cannot write a file at a path, and what to write instead; None if it can.

    Args:
        path: The file; it may be a device such as `/dev/stdout`, which needs no suffix.
        suffixes: Ends of its name that the command accepts, the usual one first.

    Example:
        >>> from pathlib import Path
        >>> find_path_problem(Path("plan.jpg"), ".png")
        'the name must end in .png; write plan.png'
    """
    if path.is_dir():
        return "is a folder; give the path of a file"
    if not path.parent.is_dir():
        return f"the folder {str(path.parent)!r} does not exist; create it first"
    is_device = path.exists() and not path.is_file()
    if path.suffix.lower() not in suffixes and not is_device:
        return f"the name must end in {suffixes[0]}; write {path.with_suffix(suffixes[0]).name}"
    return None


def check_picture(png: Path | None) -> None:
    """Check the option `--png` before work that takes long.

    Args:
        png: The picture to write; None if the option is not given.

    Raises:
        UsageError: If its name does not end in `.png`, or its folder or matplotlib does not exist.
    """
    if png is None:
        return
    if (problem := find_path_problem(png, ".png")) is not None:
        raise click.UsageError(f"--png {png}: {problem}")
    if find_spec("matplotlib") is None:
        raise click.UsageError("--png: matplotlib is not installed; run: pip install 'noether[plot]'")
