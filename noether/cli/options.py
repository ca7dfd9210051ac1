"""Options that several commands have."""

from __future__ import annotations

import click

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
