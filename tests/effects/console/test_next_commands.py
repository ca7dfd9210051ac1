"""Commands that a run suggests, and how they fit a terminal."""

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether import TrainingIteration
from noether.effects.console.next_commands import suggest_commands, wrap_command

CONFIG = {"data": {"train": {}, "val": {}}, "trainer": {"max_epochs": 4}}
WORDS = st.lists(st.text("ab-=/'\" $\\é*", max_size=30), min_size=1, max_size=8)


@given(WORDS, st.integers(1, 100))
def test_wrapped_lines_are_the_same_command(words, width):
    lines = wrap_command(shlex.join(words), width)
    *continued, last = lines
    assert all(line.endswith(" \\") for line in continued)
    assert shlex.split(" ".join([*(line.removesuffix("\\") for line in continued), last])) == words


@given(st.lists(st.text("abc", min_size=1, max_size=10), min_size=1, max_size=20), st.integers(14, 60))
def test_lines_of_short_words_fit(words, width):
    assert max(map(len, wrap_command(shlex.join(words), width))) <= width


def test_a_shell_runs_the_lines_as_one_command():
    words = ["printf", "%s|", "--resume", "runs/a b/20260102-030405", "--set", "run.name='x' y", "--continue"]
    lines = wrap_command(shlex.join(words), 30)
    assert len(lines) == 4
    done = subprocess.run(["sh", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)  # noqa: S607  # the shell of the system
    assert done.stdout == "".join(f"{word}|" for word in words[2:])


@pytest.mark.parametrize(
    ("status", "epoch", "expected"),
    [
        ("running", 1, {"follow": "noether show a --follow"}),
        ("killed", 1, {"resume": "noether train --resume a"}),
        ("stopped", 1, {"continue": "noether train --resume a --continue"}),
        ("stopped", 4, {"continue": "noether train --resume a --set trainer.max_epochs=8"}),
        ("finished", 4, {"continue": "noether train --resume a --set trainer.max_epochs=8"}),
    ],
)
def test_each_status_has_its_commands(status, epoch, expected):
    commands = suggest_commands(
        Path("a"), status, config=CONFIG, pointers=["latest"], at=TrainingIteration(epoch=epoch)
    )
    always = {
        "evaluate": "noether eval a --data val",
        "show": "noether show a",
        "report": "noether report a",
    }
    assert commands == always | expected


def test_no_command_continues_a_run_of_a_loop_of_the_users_own():
    assert list(suggest_commands(Path("a"), "failed", pointers=["latest"])) == ["show", "report"]


def test_commands_allow_the_modules_that_the_run_allowed():
    commands = suggest_commands(Path("a"), "interrupted", config=CONFIG, pointers=["latest"], allow=["lab"])
    assert commands["resume"] == "noether train --resume a --allow lab"
    assert commands["evaluate"] == "noether eval a --data val --allow lab"
