"""Live display on a pseudo terminal: its content, the lines above it, and that the cursor is restored."""

import errno
import gc
import io
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
from noether.effects import Console, open_run

TIMEOUT_S = 60
ROWS, COLUMNS = 40, 150
UNSET = ("CI", "SLURM_JOB_ID", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
TOKEN = re.compile(r"\x1b\[(\?25[hl]|\d+A|2K|[\d;]*m)|(\r)|(\n)|([^\x1b\r\n]+)")
UPDATE = AfterUpdate(samples=4)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Remove environment variables about terminals."""
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


class Terminal:
    """A pseudo terminal; a thread reads what is written to `file`, its other end."""

    def __init__(self):
        self._read_end, write_end = pty.openpty()
        termios.tcsetwinsize(write_end, (ROWS, COLUMNS))
        self.file = os.fdopen(write_end, "w", encoding="utf-8")
        self._parts = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self._read_end, 65536)
            except OSError:  # on Linux: the other end is closed
                part = b""
            if not part:
                return
            self._parts.append(part)

    @property
    def written(self):
        """The text written until now, without an incomplete character or control sequence at its end."""
        return re.sub(r"\x1b(\[[\d;?]*)?$", "", b"".join(self._parts).decode(errors="ignore"))

    def visible(self):
        return screen(self.written)

    def finish(self):
        """Close the terminal and return all text written to it."""
        self.file.close()
        self._reader.join(TIMEOUT_S)
        assert not self._reader.is_alive()
        return self.written


def screen(written):
    """Return the lines that a person sees, with bars as `BAR`, and whether the cursor is visible."""
    lines, row, column, cursor, at = [""], 0, 0, True, 0
    while at < len(written):
        token = TOKEN.match(written, at)
        assert token, written[at : at + 20]
        control, back, down, text = token.groups()
        at = token.end()
        if text:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
            assert column <= COLUMNS, text  # it would wrap into the next line
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
    pseudo_terminal = Terminal()
    yield pseudo_terminal
    pseudo_terminal.finish()
    os.close(pseudo_terminal._read_end)  # noqa: SLF001  # the fixture owns it


def open_console(terminal):
    """Return a console on the terminal; close it before the terminal."""
    return Console(RichConsole(file=terminal.file, width=COLUMNS, highlight=False, soft_wrap=True))


def at(update, epoch=0):
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update))


def progress(update, fires=4, fired=0):
    return ShowProgress(
        end=TrainingIteration(epoch=2, update=8, sample=32), fired=fired, fires=fires, update_s=0.5,
        next_s=None if fires is None else 0.5 * (fires - update), left_s=0.5 * (8 - update), due=False,
    )  # fmt: skip


def wait_for_lines(terminal, lines, *, cursor=False):
    """Wait until a person sees `lines`, because another thread reads the terminal."""
    end = time.monotonic() + TIMEOUT_S
    while terminal.visible() != (lines, cursor) and time.monotonic() < end:
        time.sleep(0.005)
    assert terminal.visible() == (lines, cursor)


def show_update(console, terminal, update, **effect):
    """Show the progress of an update, and wait until the display is redrawn with it."""
    end = time.monotonic() + TIMEOUT_S
    while not any(f"BAR {update}/8 " in line for line in terminal.visible()[0]):
        console.show_progress(progress(update, **effect), at(update), UPDATE)
        assert time.monotonic() < end
        time.sleep(0.005)


def display_lines(update):
    """Return the lines of the display at an update."""
    left_s, next_s = (8 - update) // 2, (4 - update) // 2
    pace = "500.0 ms/update  2.0 updates/s"
    return [
        f"run  BAR {update}/8  epoch 0/2  sample {4 * update}/32  {pace}  0:00:0{left_s} left",
        f"next BAR {update}/4  in 0:00:0{next_s}",
    ]


def test_the_display_shows_counters_speed_and_times(terminal):
    with closing(open_console(terminal)) as console:
        show_update(console, terminal, 2)
        wait_for_lines(terminal, display_lines(2))
        show_update(console, terminal, 3)
        wait_for_lines(terminal, display_lines(3))


def test_the_length_of_bars_is_the_completed_share(terminal):
    with closing(open_console(terminal)) as console:
        show_update(console, terminal, 2)
        plain = re.sub(r"\x1b\[[\d;]*m", "|", terminal.written)
    # of 30: a quarter of the run, and half of the updates until the next firing
    (last_run,) = re.findall(r"run  \|(.*?)\| 2/8", plain)[-1:]
    (last_next,) = re.findall(r"next \|(.*?)\| 2/4", plain)[-1:]
    assert [part.count("━") for part in re.split(r"\|+", last_run)[:1]] == [7]
    assert [part.count("━") for part in re.split(r"\|+", last_next)[:1]] == [15]


def test_the_second_bar_starts_at_the_last_firing(terminal):
    with closing(open_console(terminal)) as console:
        show_update(console, terminal, 5, fired=4, fires=8)
        run = "run  BAR 5/8  epoch 0/2  sample 20/32  500.0 ms/update  2.0 updates/s  0:00:01 left"
        wait_for_lines(terminal, [run, "next BAR 1/4  in 0:00:01"])


def test_the_second_bar_disappears_after_the_last_firing(terminal):
    with closing(open_console(terminal)) as console:
        show_update(console, terminal, 2)
        show_update(console, terminal, 6, fires=None, fired=4)
        run = "run  BAR 6/8  epoch 0/2  sample 24/32  500.0 ms/update  2.0 updates/s  0:00:01 left"
        wait_for_lines(terminal, [run])


def test_the_display_of_a_run_without_a_known_end_shows_the_counters(terminal):
    with closing(open_console(terminal)) as console:
        unknown = ShowProgress(end=None, fired=0, fires=4, update_s=0.5, next_s=1.0, left_s=None, due=False)
        console.show_progress(unknown, at(2), UPDATE)
        wait_for_lines(
            terminal,
            ["run  BAR 2  epoch 0  sample 8  500.0 ms/update  2.0 updates/s", "next BAR 2/4  in 0:00:01"],
        )


def test_the_display_without_a_known_speed_shows_the_counters(terminal):
    with closing(open_console(terminal)) as console:
        unknown = ShowProgress(
            end=TrainingIteration(update=8), fired=0, fires=4, update_s=None, next_s=None, left_s=None, due=False
        )
        console.show_progress(unknown, at(2), UPDATE)
        wait_for_lines(terminal, ["run  BAR 2/8  epoch 0/0  sample 8/0", "next BAR 2/4"])


def test_other_lines_appear_above_the_display_and_stay(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal.file)
    with closing(open_console(terminal)) as console:
        console.write_text(LogText("begin"), at(0), UPDATE)
        show_update(console, terminal, 1)
        console.write_text(LogText("two\nlines"), at(1), UPDATE)
        show_update(console, terminal, 2)
        console.write_scalars(LogScalars({"loss": 0.5}), at(2), UPDATE)
        print("from the loop")  # noqa: T201  # as in a user's loop
        show_update(console, terminal, 3)
        lines = [
            "E0_U0_S0           begin",
            "E0_U1_S4           two",
            "                   lines",
            "E0_U2_S8           loss  0.5",
            "from the loop",
        ]
        wait_for_lines(terminal, [*lines, *display_lines(3)])
    assert screen(terminal.finish()) == (lines, True)


class HangUp(io.StringIO):
    """A terminal that is closed once `is_closed` is set; sets `has_failed` at each write after that."""

    def __init__(self):
        super().__init__()
        self.is_closed, self.has_failed = threading.Event(), threading.Event()

    def isatty(self):
        return True

    def write(self, text):
        if self.is_closed.is_set():
            self.has_failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(text)


@pytest.mark.parametrize("end", ["close", "collect"])
def test_a_closed_terminal_is_reported_once(tmp_path, monkeypatch, caplog, end):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    file = HangUp()
    directory = open_run(tmp_path / "run", Console(RichConsole(file=file, width=COLUMNS)))
    directory.interpreter([progress(1)], at(1), UPDATE)
    file.is_closed.set()
    directory.interpreter([progress(2)], at(2), UPDATE)
    assert file.has_failed.wait(TIMEOUT_S)  # the thread redraws
    for update in (3, 4):
        directory.interpreter([progress(update), LogText("x")], at(update), UPDATE)
    if end == "close":
        directory.close()
    else:
        del directory
        gc.collect()
    assert caplog.text.count("console failed and may have lost log entries") == 1
    assert "Input/output error" in caplog.text
    assert failed == []


def end_training(console):
    console.show_progress(progress(3), at(3), AfterTraining())


@pytest.mark.parametrize("end", [end_training, Console.close])
def test_the_display_is_removed_at_the_end(terminal, end):
    out, err = sys.stdout, sys.stderr
    with closing(open_console(terminal)) as console:
        console.write_text(LogText("begin"), at(0), UPDATE)
        show_update(console, terminal, 3)
        end(console)
        wait_for_lines(terminal, ["E0_U0_S0           begin"], cursor=True)
        assert (sys.stdout, sys.stderr) == (out, err)
        end(console)  # a second time is a no-op
        console.write_text(LogText("end"), at(3), AfterTraining())
    assert screen(terminal.finish()) == (["E0_U0_S0           begin", "E0_U3_S12          end"], True)


def test_without_progress_the_terminal_gets_no_control_sequences(terminal):
    with closing(open_console(terminal)) as console:
        console.write_text(LogText("hello"), at(0), UPDATE)
        end_training(console)
    assert terminal.finish() == "E0_U0_S0           hello\r\n"


def test_a_released_console_restores_the_cursor(terminal):
    out, console = sys.stdout, open_console(terminal)
    console.write_text(LogText("begin"), at(0), UPDATE)
    show_update(console, terminal, 2)
    wait_for_lines(terminal, ["E0_U0_S0           begin", *display_lines(2)])
    del console
    gc.collect()
    assert sys.stdout is out
    assert screen(terminal.finish()) == (["E0_U0_S0           begin"], True)


# ------------------------------------------------------------------------------------------------ in a separate process

LOOP = '''\
"""A training loop that may fail in the middle."""

import sys

from noether import AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState, compose, dispatch
from noether.core.callbacks import EtaCallback, OnlineLossCallback
from noether.effects import open_run

RUN = Run(end=TrainingIteration(update=20), updates_per_epoch=20, samples_per_epoch=80, effective_batch_size=4)


def train(path, failure):
    directory = open_run(path)
    reducer = compose(EtaCallback(every_n_updates=5), OnlineLossCallback(every_n_updates=5))
    state = dispatch(TrainState(), BeforeTraining(run=RUN), reducer, directory.interpreter)
    while state.iteration.update < 20:
        if state.iteration.update == 12:
            exec(failure)
        event = AfterUpdate(run=RUN, samples=4, losses={"total": 0.5}, duration_s=0.25)
        state = dispatch(state.advance(samples=4), event, reducer, directory.interpreter)
    dispatch(state.replace(ended=True), AfterTraining(run=RUN), reducer, directory.interpreter)


train(*sys.argv[1:])
'''
FIVE_AND_TEN = ["E0_U5_S20          loss/online/total/U5  0.5", "E0_U10_S40         loss/online/total/U5  0.5"]
WHOLE = [*FIVE_AND_TEN, "E0_U15_S60         loss/online/total/U5  0.5", "E0_U20_S80         loss/online/total/U5  0.5"]


def run_loop(folder, terminal, failure, errors=None):
    """Run the loop with its output and errors on the terminal; return its exit code and the text written there."""
    (folder / "loop.py").write_text(LOOP)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "loop.py", "run", failure],
        cwd=folder, env=environment, stdin=terminal.file, stdout=terminal.file, stderr=errors or terminal.file,
    )  # fmt: skip
    terminal.file.close()
    code = process.wait(TIMEOUT_S)
    return code, terminal.finish()


def last_cursor(written):
    return re.findall(r"\x1b\[\?25[hl]", written)[-1]


def test_after_a_loop_its_lines_stay(tmp_path, terminal):
    code, written = run_loop(tmp_path, terminal, "pass")
    assert code == 0
    assert written.count(HIDE) == written.count(SHOW) == 1
    assert re.search(r" \d+/20  epoch 0/1  sample \d+/80  250\.0 ms/update  4\.0 updates/s  0:00:0\d left", written)
    assert screen(written) == (WHOLE, True)


def test_a_loop_that_raises_leaves_the_cursor_visible(tmp_path, terminal):
    code, written = run_loop(tmp_path, terminal, "raise ValueError('in the middle')")
    assert code == 1
    assert HIDE in written
    assert last_cursor(written) == SHOW
    lines, _ = screen(written)
    assert lines[:2] == FIVE_AND_TEN
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == "ValueError: in the middle"


def test_redirected_errors_do_not_appear_on_the_terminal(tmp_path, terminal):
    """As in `python loop.py 2> errors.txt`."""
    with (tmp_path / "errors.txt").open("w") as errors:
        _, written = run_loop(tmp_path, terminal, "raise ValueError('in the middle')", errors)
    assert screen(written) == (FIVE_AND_TEN, True)
    assert (tmp_path / "errors.txt").read_text().splitlines()[-1] == "ValueError: in the middle"


def test_a_loop_that_exits_leaves_the_cursor_visible(tmp_path, terminal):
    code, written = run_loop(tmp_path, terminal, "raise SystemExit(3)")
    assert code == 3
    assert HIDE in written
    assert last_cursor(written) == SHOW
    assert screen(written) == (FIVE_AND_TEN, True)


def test_a_restarted_display_appears_below_the_existing_lines(terminal):
    with closing(open_console(terminal)) as console:
        show_update(console, terminal, 1)
        console.show_progress(progress(8), at(8), AfterTraining())
        console.write_text(LogText("one"), at(8), UPDATE)
        console.write_text(LogText("two"), at(8), UPDATE)
        show_update(console, terminal, 2)
        wait_for_lines(terminal, ["E0_U8_S32          one", "E0_U8_S32          two", *display_lines(2)])


def test_the_last_of_several_fast_updates_is_shown(terminal):
    with closing(open_console(terminal)) as console:
        for update in (1, 2, 3):
            console.show_progress(progress(update), at(update), UPDATE)
        wait_for_lines(terminal, display_lines(3))  # without a later event


def test_a_narrow_terminal_gets_shorter_lines(terminal):
    termios.tcsetwinsize(terminal.file.fileno(), (ROWS, 80))
    with closing(Console(RichConsole(file=terminal.file, width=80, highlight=False, soft_wrap=True))) as console:
        console.show_progress(progress(3), at(3), UPDATE)
        wait_for_lines(terminal, ["run  BAR 3/8  500.0 ms/update  0:00:02 left", "next BAR 3/4  in 0:00:00"])
