"""`noether callbacks`: lists the shipped callbacks, or describes one callback."""

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from noether.cli.output import echo
from noether.config import ConfigError
from noether.config.descriptions import PREFIX, describe, known_kinds
from noether.config.errors import InvalidValueError, LocatedProblem, Place
from noether.distributed.launch import launched_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.config.descriptions import Description

_WIDTH = 100


def list_kinds() -> None:
    """Print one line for each callback of noether."""
    kinds = known_kinds()
    width = max(map(len, kinds))
    echo(f"kind: {PREFIX}.NAME, with NAME one of\n")
    for name in kinds:
        echo(f"{name:<{width}}  {describe(name).summary}")
    echo("\n`noether callbacks NAME` shows the settings of one; a dotted path shows your own.")


def show_kind(kind: str, allow: Sequence[str]) -> None:
    """Print documentation, settings and YAML of one callback.

    Raises:
        ConfigError: If there is no such callback.
    """
    try:
        description = describe(kind, allow)
    except InvalidValueError as error:
        raise ConfigError([LocatedProblem(Place("noether callbacks"), (), str(error))]) from error
    echo(description.kind + (f"  (also {', '.join(description.aliases)})" if description.aliases else ""))
    echo(f"\n{description.text}\n")
    if description.settings:
        Console(width=_WIDTH, highlight=False, quiet=launched_rank() > 0).print(_table(description))
    for older, name in description.renamed.items():
        echo(f"\n{older} is an older name of {name}")
    echo(f"\ncallbacks:\n{indent(description.yaml, '  ')}")


def _table(description: Description) -> Table:
    table = Table("setting", "type", "default", "description", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for each in description.settings:
        table.add_row(each.name, each.type, "required" if each.default is None else each.default, each.text)
    return table
