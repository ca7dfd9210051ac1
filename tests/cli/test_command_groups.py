"""`noether --help` lists each command once, below what it does, with its whole summary."""

import inspect

from click.testing import CliRunner

from noether.cli.command_groups import GROUPS
from noether.cli.main import main


def test_each_command_is_in_one_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(main.commands)


def test_help_shows_groups_and_whole_summaries():
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    assert all(f"{title}:\n" in text for title in GROUPS)
    words = " ".join(text.split())
    for command in main.commands.values():
        summary = inspect.cleandoc(command.help).partition("\n\n")[0]
        assert " ".join(summary.split()).removesuffix(".") in words
    assert max(map(len, text.splitlines())) <= 80


def test_the_shell_completes_commands():
    environment = {"_NOETHER_COMPLETE": "bash_complete", "COMP_WORDS": "noether sh", "COMP_CWORD": "1"}
    result = CliRunner().invoke(main, [], prog_name="noether", env=environment)
    assert result.output == "plain,show\n"
