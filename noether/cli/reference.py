"""The commands that describe the settings of a configuration: `callbacks`, `help` and `schema`."""

from __future__ import annotations

from pathlib import Path

import click

from noether.cli.messages import errors_as_messages
from noether.cli.options import ALLOW


@click.command()
@click.argument("kind", required=False)
@ALLOW
def callbacks(kind: str | None, allow: tuple[str, ...]) -> None:
    """List the shipped callbacks, or describe one callback.

    KIND is the name of a shipped callback, or the dotted path of one in your code. Shows its documentation, settings
    and YAML.
    """
    from noether.cli.commands import callbacks as command

    with errors_as_messages():
        if kind is None:
            command.list_kinds()
        else:
            command.show_kind(kind, allow)


@click.command("help")
@click.argument("name", metavar="[SETTING]", required=False)
@ALLOW
def help_(name: str | None, allow: tuple[str, ...]) -> None:
    """Describe the sections and settings of a configuration.

    SETTING is a section such as `trainer`, a setting such as `trainer.max_epochs` or `callbacks.LrCallback`, or the
    dotted path of an object such as `torch.optim.AdamW`. Without it, all sections are listed.
    """
    from noether.cli.commands import help as command

    with errors_as_messages():
        command.show_help(name, allow)


@click.command()
@click.option(
    "--to",
    "target",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file to write; by default it is printed.",
)
def schema(target: Path | None) -> None:
    """Write a JSON schema of the configuration, which editors use.

    With `# yaml-language-server: $schema=FILE` as the first line of a YAML file, an editor completes and checks it.
    """
    from noether.cli.commands import schema as command

    with errors_as_messages():
        command.write_schema(target)
