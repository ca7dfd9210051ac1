"""The groups of commands in `noether --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.cli.ranks import Commands

if TYPE_CHECKING:
    from collections.abc import Mapping

    import click

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "Train and evaluate": ("train", "eval", "export"),
    "Look at runs": ("show", "report", "query", "replay"),
    "Check before training": ("validate", "plan"),
    "Look up": ("help", "callbacks", "schema"),
}


class GroupedCommands(Commands):
    """Commands that `--help` lists in groups, each with its whole summary."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  # of click
        """Write the commands of each group."""
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), self.commands[name].get_short_help_str(200)) for name in names])
