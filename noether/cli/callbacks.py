"""The known callbacks, and what is to be said of each, from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from noether.config import ConfigError
from noether.config.descriptions import PREFIX, describe, known_kinds
from noether.config.errors import InvalidValueError, LocatedProblem, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.config.descriptions import Description

_WIDTH = 100


def list_kinds() -> None:
    """Print every callback of noether, each on one line."""
    kinds = known_kinds()
    width = max(map(len, kinds))
    click.echo(f"kind: {PREFIX}.NAME, with NAME one of\n")
    for name in kinds:
        click.echo(f"{name:<{width}}  {describe(name).summary}")
    click.echo("\n`noether callbacks NAME` shows the settings of one; a dotted path shows one of your own.")


def show_kind(kind: str, allow: Sequence[str]) -> None:
    """Print the settings, the documentation and the YAML of one callback.

    Raises:
        ConfigError: If there is no such callback.
    """
    try:
        said = describe(kind, allow)
    except InvalidValueError as error:
        raise ConfigError([LocatedProblem(Place("noether callbacks"), (), str(error))]) from error
    click.echo(said.kind + (f"  (also {', '.join(said.aliases)})" if said.aliases else ""))
    click.echo(f"\n{said.text}\n")
    if said.settings:
        Console(width=_WIDTH, highlight=False).print(_table(said))
    for older, name in said.renamed.items():
        click.echo(f"\n{older} is accepted as an older name of {name}")
    click.echo(f"\ncallbacks:\n{_indented(said.yaml)}")


def _table(said: Description) -> Table:
    table = Table("setting", "type", "default", "what it is", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for each in said.settings:
        table.add_row(each.name, each.type, "required" if each.default is None else each.default, each.text)
    return table


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
