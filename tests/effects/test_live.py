"""The live display on a real pseudo terminal: what it shows, what stays, and that the cursor comes back."""

import gc
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing

import pytest
from rich.console import Console as RichConsole

from noether import AfterTraining, AfterUpdate, LogScalars, LogText, ShowProgress, TrainingIteration, TrainState
from noether.effects import Console

PATIENCE_S = 60
ROWS, COLUMNS = 40, 150
UNSET = ("CI", "SLURM_JOB_ID", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
TOKEN = re.compile(r"\x1b\[(\?25[hl]|\d+A|2K|[\d;]*m)|(\r)|(\n)|([^\x1b\r\n]+)")
UPDATE = AfterUpdate(samples=4)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Nothing that a test machine's environment says about terminals."""
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


class Terminal:
    """A pseudo terminal that is read while `file`, its other end, is written to."""

    def __init__(self):
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
        self.file = os.fdopen(theirs, "w", encoding="utf-8")
        self._parts = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # on Linux, the other end is closed
                part = b""
            if not part:
                return
            self._parts.append(part)

    @property
    def written(self):
        """All that was written until now, without a character or a control sequence at its end that is not whole."""
        return re.sub(r"\x1b(\[[\d;?]*)?$", "", b"".join(self._parts).decode(errors="ignore"))

    def shows(self):
        return screen(self.written)

    def finish(self):
        """Return all that was written, once nobody can write any more."""
        self.file.close()
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive()
        return self.written


def screen(written):
    """Return the lines that a person sees, bars as `BAR`, and whether there is a cursor."""
    lines, row, column, cursor, at = [""], 0, 0, True, 0
    while at < len(written):
        token = TOKEN.match(written, at)
        assert token, written[at : at + 20]
        control, back, down, text = token.groups()
        at = token.end()
        if text:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
            assert column <= COLUMNS, text  # it would go on in the line below
        elif back:
            column = 0
        elif down:
            row += 1
            lines += [""] * (row == len(lines))
        elif control == "2K":
            lines[row] = ""
        elif control.endswith("A"):
            row -= int(control[:-1])
            assert row >= 0
        elif control.startswith("?25"):
            cursor = control == "?25h"
    seen = [re.sub(r"[━╸╺]+", "BAR", line.rstrip()) for line in lines]
    while seen and not seen[-1]:
        seen.pop()
    return seen, cursor


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.finish()
    os.close(made._ours)  # noqa: SLF001  # it is the test's own


def watch(terminal):
    """Return a console on that terminal; close it before the terminal."""
    return Console(RichConsole(file=terminal.file, width=COLUMNS, highlight=False, soft_wrap=True))


def at(update, epoch=0):
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update))


def progress(update, fires=4, fired=0):
    return ShowProgress(
        end=TrainingIteration(epoch=2, update=8, sample=32), fired=fired, fires=fires, update_s=0.5,
        next_s=None if fires is None else 0.5 * (fires - update), left_s=0.5 * (8 - update), due=False,
    )  # fmt: skip


def comes_to_show(terminal, lines, *, cursor=False):
    """Wait until a person sees `lines`; what was written may not be read yet."""
    end = time.monotonic() + PATIENCE_S
    while terminal.shows() != (lines, cursor) and time.monotonic() < end:
        time.sleep(0.005)
    assert terminal.shows() == (lines, cursor)


def show(console, terminal, update, **effect):
    """Have an update shown, and wait until a person sees it: the display is redrawn now and then, not at once."""
    end = time.monotonic() + PATIENCE_S
    while not any(f"BAR {update}/8 " in line for line in terminal.shows()[0]):
        console.show_progress(progress(update, **effect), at(update), UPDATE)
        assert time.monotonic() < end
        time.sleep(0.005)


def display(update):
    """Return what the display shows then."""
    left_s, next_s = (8 - update) // 2, (4 - update) // 2
    pace = "500.0 ms/update  2.0 updates/s"
    return [
        f"run  BAR {update}/8  epoch 0/2  sample {4 * update}/32  {pace}  0:00:0{left_s} left",
        f"next BAR {update}/4  in 0:00:0{next_s}",
    ]


def test_the_display_tells_counters_pace_and_times_and_is_renewed(terminal):
    with closing(watch(terminal)) as console:
        show(console, terminal, 2)
        comes_to_show(terminal, display(2))
        show(console, terminal, 3)
        comes_to_show(terminal, display(3))


def test_bars_are_as_long_as_what_is_done(terminal):
    with closing(watch(terminal)) as console:
        show(console, terminal, 2)
        plain = re.sub(r"\x1b\[[\d;]*m", "|", terminal.written)
    # of 30: a quarter of the run, and a half of the way to the next firing
    (last_run,) = re.findall(r"run  \|(.*?)\| 2/8", plain)[-1:]
    (last_next,) = re.findall(r"next \|(.*?)\| 2/4", plain)[-1:]
    assert [part.count("━") for part in re.split(r"\|+", last_run)[:1]] == [7]
    assert [part.count("━") for part in re.split(r"\|+", last_next)[:1]] == [15]


def test_the_way_to_the_next_firing_begins_at_the_last_one(terminal):
    with closing(watch(terminal)) as console:
        show(console, terminal, 5, fired=4, fires=8)
        run = "run  BAR 5/8  epoch 0/2  sample 20/32  500.0 ms/update  2.0 updates/s  0:00:01 left"
        comes_to_show(terminal, [run, "next BAR 1/4  in 0:00:01"])


def test_where_no_firing_comes_any_more_only_the_end_is_shown(terminal):
    with closing(watch(terminal)) as console:
        show(console, terminal, 2)
        show(console, terminal, 6, fires=None, fired=4)
        run = "run  BAR 6/8  epoch 0/2  sample 24/32  500.0 ms/update  2.0 updates/s  0:00:01 left"
        comes_to_show(terminal, [run])


def test_before_the_pace_is_known_there_are_counters(terminal):
    with closing(watch(terminal)) as console:
        unknown = ShowProgress(
            end=TrainingIteration(update=8), fired=0, fires=4, update_s=None, next_s=None, left_s=None, due=False
        )
        console.show_progress(unknown, at(2), UPDATE)
        comes_to_show(terminal, ["run  BAR 2/8  epoch 0/0  sample 8/0", "next BAR 2/4"])


def test_lines_that_are_written_meanwhile_appear_above_and_stay(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal.file)
    with closing(watch(terminal)) as console:
        console.write_text(LogText("begin"), at(0), UPDATE)
        show(console, terminal, 1)
        console.write_text(LogText("two\nlines"), at(1), UPDATE)
        show(console, terminal, 2)
        console.write_scalars(LogScalars({"loss": 0.5}), at(2), UPDATE)
        print("from the loop")  # noqa: T201  # as a person's own loop does
        show(console, terminal, 3)
        lines = [
            "E0_U0_S0           begin",
            "E0_U1_S4           two",
            "                   lines",
            "E0_U2_S8           loss  0.5",
            "from the loop",
        ]
        comes_to_show(terminal, [*lines, *display(3)])
    assert screen(terminal.finish()) == (lines, True)


def end_training(console):
    console.show_progress(progress(3), at(3), AfterTraining())


@pytest.mark.parametrize("end", [end_training, Console.close])
def test_at_the_end_the_display_is_gone_and_the_cursor_is_there(terminal, end):
    out, err = sys.stdout, sys.stderr
    with closing(watch(terminal)) as console:
        console.write_text(LogText("begin"), at(0), UPDATE)
        show(console, terminal, 3)
        end(console)
        comes_to_show(terminal, ["E0_U0_S0           begin"], cursor=True)
        assert (sys.stdout, sys.stderr) == (out, err)
        end(console)  # twice is as once
        console.write_text(LogText("end"), at(3), AfterTraining())
    assert screen(terminal.finish()) == (["E0_U0_S0           begin", "E0_U3_S12          end"], True)


def test_where_nothing_was_shown_the_terminal_is_left_alone(terminal):
    with closing(watch(terminal)) as console:
        console.write_text(LogText("hello"), at(0), UPDATE)
        end_training(console)
    assert terminal.finish() == "E0_U0_S0           hello\r\n"


def test_a_console_that_is_let_go_gives_the_cursor_back(terminal):
    out, console = sys.stdout, watch(terminal)
    console.write_text(LogText("begin"), at(0), UPDATE)
    show(console, terminal, 2)
    comes_to_show(terminal, ["E0_U0_S0           begin", *display(2)])
    del console
    gc.collect()
    assert sys.stdout is out
    assert screen(terminal.finish()) == (["E0_U0_S0           begin"], True)


# ------------------------------------------------------------------------------------------------ a process of its own

LOOP = '''\
"""A loop of a person's own, which may die in the middle."""

import sys

from noether import AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState, compose, dispatch
from noether.core.callbacks import EtaCallback, OnlineLossCallback
from noether.effects import open_run

RUN = Run(end=TrainingIteration(update=20), updates_per_epoch=20, samples_per_epoch=80, effective_batch_size=4)


def train(directory, mishap):
    run = open_run(directory)
    reducer = compose(EtaCallback(every_n_updates=5), OnlineLossCallback(every_n_updates=5))
    state = dispatch(TrainState(), BeforeTraining(run=RUN), reducer, run.interpreter)
    while state.iteration.update < 20:
        if state.iteration.update == 12:
            exec(mishap)
        event = AfterUpdate(run=RUN, samples=4, losses={"total": 0.5}, duration_s=0.25)
        state = dispatch(state.advance(samples=4), event, reducer, run.interpreter)
    dispatch(state.replace(ended=True), AfterTraining(run=RUN), reducer, run.interpreter)


train(*sys.argv[1:])
'''
FIVE_AND_TEN = ["E0_U5_S20          loss/online/total/U5  0.5", "E0_U10_S40         loss/online/total/U5  0.5"]
WHOLE = [*FIVE_AND_TEN, "E0_U15_S60         loss/online/total/U5  0.5", "E0_U20_S80         loss/online/total/U5  0.5"]


def run_loop(folder, terminal, mishap, errors=None):
    """Run the loop with its output and errors on the terminal; return its exit code and what was written there."""
    (folder / "loop.py").write_text(LOOP)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "loop.py", "run", mishap],
        cwd=folder, env=environment, stdin=terminal.file, stdout=terminal.file, stderr=errors or terminal.file,
    )  # fmt: skip
    terminal.file.close()
    code = process.wait(PATIENCE_S)
    return code, terminal.finish()


def last_cursor(written):
    return re.findall(r"\x1b\[\?25[hl]", written)[-1]


def test_a_loop_that_ends_leaves_its_lines(tmp_path, terminal):
    code, written = run_loop(tmp_path, terminal, "pass")
    assert code == 0
    assert written.count(HIDE) == written.count(SHOW) == 1
    assert re.search(r" \d+/20  epoch 0/1  sample \d+/80  250\.0 ms/update  4\.0 updates/s  0:00:0\d left", written)
    assert screen(written) == (WHOLE, True)


def test_a_loop_that_raises_in_the_middle_leaves_the_cursor_visible(tmp_path, terminal):
    code, written = run_loop(tmp_path, terminal, "raise ValueError('in the middle')")
    assert code == 1
    assert HIDE in written
    assert last_cursor(written) == SHOW
    lines, _ = screen(written)
    assert lines[:2] == FIVE_AND_TEN
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == "ValueError: in the middle"


def test_errors_that_go_elsewhere_go_there(tmp_path, terminal):
    """As with `python loop.py 2> errors.txt` in a terminal."""
    with (tmp_path / "errors.txt").open("w") as errors:
        _, written = run_loop(tmp_path, terminal, "raise ValueError('in the middle')", errors)
    assert screen(written) == (FIVE_AND_TEN, True)
    assert (tmp_path / "errors.txt").read_text().splitlines()[-1] == "ValueError: in the middle"


def test_a_loop_that_is_left_leaves_the_cursor_visible(tmp_path, terminal):
    code, written = run_loop(tmp_path, terminal, "raise SystemExit(3)")
    assert code == 3
    assert HIDE in written
    assert last_cursor(written) == SHOW
    assert screen(written) == (FIVE_AND_TEN, True)


def test_it_comes_back_below_the_lines_that_are_there(terminal):
    with closing(watch(terminal)) as console:
        show(console, terminal, 1)
        console.show_progress(progress(8), at(8), AfterTraining())
        console.write_text(LogText("one"), at(8), UPDATE)
        console.write_text(LogText("two"), at(8), UPDATE)
        show(console, terminal, 2)
        comes_to_show(terminal, ["E0_U8_S32          one", "E0_U8_S32          two", *display(2)])


def test_the_last_of_many_fast_updates_is_what_is_seen(terminal):
    with closing(watch(terminal)) as console:
        for update in (1, 2, 3):
            console.show_progress(progress(update), at(update), UPDATE)
        comes_to_show(terminal, display(3))  # though nothing more is asked for


def test_on_a_narrow_terminal_there_is_less_and_all_of_it_is_seen(terminal):
    termios.tcsetwinsize(terminal.file.fileno(), (ROWS, 80))
    with closing(Console(RichConsole(file=terminal.file, width=80, highlight=False, soft_wrap=True))) as console:
        console.show_progress(progress(3), at(3), UPDATE)
        comes_to_show(terminal, ["run  BAR 3/8  500.0 ms/update  0:00:02 left", "next BAR 3/4  in 0:00:00"])
