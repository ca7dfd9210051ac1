"""Lines beside a bar that a framework redraws from the start of its line, as Keras does."""

import io
import sys

import pyte

from noether import AfterTraining, LogText, TrainState
from noether.effects.console.console import Console
from noether.effects.console.live.other_bars import announce_bar, has_other_bar, hide_other_bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_replaces_the_bar_which_is_redrawn_below():
    owner, terminal = object(), Terminal()
    announce_bar(owner, is_shown=True)
    try:
        assert has_other_bar()
        terminal.write("9/20 =====")
        with hide_other_bars(terminal):
            terminal.write("a line\n")
        terminal.write("\b" * 10 + "\r10/20 =====")
    finally:
        announce_bar(owner, is_shown=False)
    screen = pyte.Screen(40, 4)
    screen.set_mode(pyte.modes.LNM)  # a line feed also returns, as on a terminal
    pyte.Stream(screen).feed(terminal.getvalue())
    assert [line.rstrip() for line in screen.display][:3] == ["a line", "10/20 =====", ""]
    assert not has_other_bar()


def test_without_a_terminal_a_line_begins_below_the_bar_and_nothing_is_cleared(capsys):
    owner = object()
    announce_bar(owner, is_shown=True)
    try:
        sys.stdout.write("9/20 =====")
        Console().write_text(LogText("plain"), TrainState(), AfterTraining())
    finally:
        announce_bar(owner, is_shown=False)
    bar, line = capsys.readouterr().out.splitlines()
    assert (bar, line.split()[-1]) == ("9/20 =====", "plain")
