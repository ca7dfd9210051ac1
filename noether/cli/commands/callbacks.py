"""`noether callbacks`: lists the shipped callbacks, or describes one callback."""

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING

from noether.cli.output import echo
from noether.cli.setting_table import print_settings
from noether.config.descriptions import PREFIX, describe, known_kinds
from noether.config.errors import InvalidValueError, error_at

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        raise error_at("noether callbacks", str(error)) from error
    echo(description.kind + (f"  (also {', '.join(description.aliases)})" if description.aliases else ""))
    echo(f"\n{description.text}\n")
    if description.settings:
        print_settings(description.settings)
    for older, name in description.renamed.items():
        echo(f"\n{older} is an older name of {name}")
    echo(f"\ncallbacks:\n{indent(description.yaml, '  ')}")
