"""The live display on a pseudo-terminal: what it shows, that other output scrolls above it, and that it is removed."""

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

import pyte
import pytest
from rich.console import Console as RichConsole
from tqdm import tqdm

from noether import AfterTraining, AfterUpdate, LogScalars, LogText, Run, ShowProgress, TrainingIteration, TrainState
from noether.core.callbacks import BestMetricCallback
from noether.effects import Console, open_run
from noether.effects.console.run_panels import RunPanel

TIMEOUT_S = 60
UNSET = ("CI", "SLURM_JOB_ID", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
RUN = Run(end=TrainingIteration(epoch=2), updates_per_epoch=4, samples_per_epoch=16, effective_batch_size=4)
UPDATE = AfterUpdate(run=RUN, samples=4)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Remove environment variables about terminals."""
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


class Terminal:
    """A pseudo-terminal; a thread reads what the test writes to `file`, its other end."""

    def __init__(self, columns, rows):
        self._read_end, write_end = pty.openpty()
        self.file = os.fdopen(write_end, "w", encoding="utf-8")
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        self.resize(columns, rows)
        threading.Thread(target=self._read, daemon=True).start()

    def resize(self, columns, rows):
        with self._lock:
            termios.tcsetwinsize(self.file.fileno(), (rows, columns))
            self.screen.resize(rows, columns)

    def _read(self):
        while True:
            try:
                part = os.read(self._read_end, 65536)
            except OSError:  # on Linux: the other end is closed
                return
            if not part:
                return
            with self._lock:
                self._stream.feed(part)

    def lines(self):
        """Return the lines on the screen, and those that scrolled out at its top, without empty ones."""
        with self._lock:
            top = ["".join(line[column].data for column in sorted(line)) for line in self.screen.history.top]
            seen = [line.rstrip() for line in (*top, *self.screen.display)]
        return [line for line in seen if line]

    def wait_for(self, condition):
        """Wait until the lines fulfil a condition, and return them; another thread reads the terminal."""
        end = time.monotonic() + TIMEOUT_S
        while not condition(self.lines()):
            assert time.monotonic() < end, self.lines()
            time.sleep(0.005)
        return self.lines()


@pytest.fixture
def open_terminal():
    terminals = []

    def make(columns=80, rows=24):
        terminals.append(Terminal(columns, rows))
        return terminals[-1]

    yield make
    for each in terminals:
        each.file.close()


def open_console(terminal):
    """Return a console on the terminal; close it before the terminal."""

    def size():
        return os.get_terminal_size(terminal.file.fileno())

    class Sized(RichConsole):
        size = property(lambda self: RichConsole(width=size().columns, height=size().lines).size)

    return Console(Sized(file=terminal.file, highlight=False, soft_wrap=True))


def at(update, epoch=0):
    start = TrainingIteration(epoch=epoch, update=4 * epoch, sample=16 * epoch)
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update), epoch_start=start)


def redraw(console):
    console._live.redraw()  # noqa: SLF001  # as its thread does four times a second


def has(text):
    return lambda lines: any(text in line for line in lines)


def is_bar(line):
    return any(sign in line for sign in "━─")


@pytest.mark.parametrize("columns", [80, 200])
def test_the_display_shows_progress_and_watched_metrics(open_terminal, columns):
    terminal = open_terminal(columns)
    with closing(open_console(terminal)) as console:
        console.watch([BestMetricCallback(every_n_epochs=1, metric_key="val/accuracy")], at(0))
        console.observe(at(1), UPDATE)
        console.view.record_progress(time.monotonic() - 4.0)  # four updates in four seconds
        console.observe(at(5, 1), UPDATE)
        for value in (0.5, 0.75):
            console.write_scalars(LogScalars({"val/accuracy": value, "loss/val/mse": 0.125}), at(5, 1), UPDATE)
        progress = ShowProgress(end=None, fired=4, fires=8, update_s=0.5, next_s=1.5, left_s=None, due=False)
        console.show_progress(progress, at(5, 1), UPDATE)
        redraw(console)
        lines = terminal.wait_for(has("next"))
        assert all(len(line) < columns for line in lines)
        (run,) = [line for line in lines if line.startswith("run ")]
        assert "62%" in run
        assert re.search(r" 0:00:\d\d left", run)
        assert "update 5/8" in run
        (epoch,) = [line for line in lines if line.startswith("epoch 2")]
        assert " 1/4" in epoch
        assert columns == 80 or re.search(r"[\d.]+ updates/s", epoch)
        assert any(re.search(r"^next .* 1/4 +in 0:00:\d\d", line) for line in lines)
        shown = "".join(lines[lines.index(run) :])
        assert "val/accuracy  0.75 ★ best" in shown
        assert "loss/val/mse  0.125" in shown
    terminal.wait_for(lambda lines: not any(map(is_bar, lines)))


def test_all_other_output_scrolls_above_the_display(open_terminal):
    terminal = open_terminal(80, 12)
    expected = []
    with closing(open_console(terminal)) as console:
        console.observe(at(1), UPDATE)
        for number in range(30):
            redraw(console)
            os.write(terminal.file.fileno(), f"native {number}\n".encode())  # as a library of C does
            print(f"printed {number}", file=terminal.file, flush=True)  # as a callback does
            console.write_text(LogText(f"logged {number}\nmore"), at(number), UPDATE)
            expected += [
                f"native {number}",
                f"printed {number}",
                f"E0_U{number}_S{4 * number}".ljust(19) + f"logged {number}",
            ]
            expected += [" " * 19 + "more"]
        os.write(terminal.file.fileno(), b"half a line")
        console.write_text(LogText("whole"), at(1), UPDATE)
        redraw(console)
    expected += ["half a line", "E0_U1_S4".ljust(19) + "whole"]
    assert terminal.wait_for(lambda lines: lines == expected) == expected


def test_progress_that_the_display_shows_is_not_written_as_a_line(open_terminal):
    terminal = open_terminal()
    with closing(open_console(terminal)) as console:
        console.write_text(LogText("50 %", is_progress=True), at(1), UPDATE)
        console.observe(at(1), UPDATE)
        redraw(console)
        console.write_text(LogText("75 %", is_progress=True), at(2), UPDATE)
        console.write_text(LogText("end"), at(2), UPDATE)
        lines = terminal.wait_for(has("end"))
    assert [line[19:] for line in lines if not is_bar(line)] == ["50 %", "end"]


def test_metrics_that_do_not_fit_are_not_replaced_by_less_important_ones(open_terminal):
    terminal = open_terminal(60)
    with closing(open_console(terminal)) as console:
        console.observe(at(1), UPDATE)
        redraw(console)
        metrics = {"loss/a": 0.5, f"loss/{'b' * 40}": 0.25, "optim/lr": 0.1}
        console.write_scalars(LogScalars(metrics), at(1), UPDATE)
        lines = terminal.wait_for(has("more"))
    (line,) = [line for line in lines if "more" in line]
    assert line[19:] == "loss/a 0.5   +2 more"


def test_texts_are_wrapped_between_words(open_terminal):
    terminal = open_terminal(60)
    with closing(open_console(terminal)) as console:
        console.write_text(LogText("elephants " * 9), at(1), UPDATE)
    lines = terminal.wait_for(has("E0_U1"))
    assert {word for line in lines for word in line.split()} == {"E0_U1_S4", "elephants"}
    assert all(line.startswith(" " * 19) for line in lines[1:])


def test_many_metrics_and_long_names_fit_into_a_small_terminal(open_terminal):
    terminal = open_terminal(80, 10)
    with closing(open_console(terminal)) as console:
        console.observe(at(1), UPDATE)
        metrics = {f"loss/{'very_long_name/' * 5}{number}": number / 7 for number in range(60)}
        console.write_scalars(LogScalars(metrics), at(1), UPDATE)
        redraw(console)
        lines = terminal.wait_for(has("run "))
        region = lines[next(row for row, line in enumerate(lines) if line.startswith("run ")) :]
        assert len(region) <= 5
        assert any(line.split()[-1] == "0.14286" for line in region)


def test_a_resize_of_the_terminal_leaves_one_display(open_terminal):
    terminal = open_terminal(80, 24)
    with closing(open_console(terminal)) as console:
        console.observe(at(1), UPDATE)
        for columns, rows in ((60, 20), (150, 30)):
            redraw(console)
            terminal.wait_for(has("run "))
            terminal.resize(columns, rows)
            redraw(console)
            console.write_text(LogText(f"size {columns}"), at(1), UPDATE)
            lines = terminal.wait_for(has(f"size {columns}"))
        assert sum(line.startswith("run ") for line in lines) == 1
    assert [line.split()[-1] for line in terminal.wait_for(lambda lines: not any(map(is_bar, lines)))] == ["60", "150"]


def test_a_running_evaluation_has_a_bar(open_terminal):
    terminal = open_terminal()
    with closing(open_console(terminal)) as console:
        for number in console.track(range(4), "evaluating val"):
            if number == 3:
                console.view.tasks[0].began_s -= 10
                redraw(console)
                lines = terminal.wait_for(has("evaluating val"))
                assert [line.split()[-1] for line in lines] == ["3/4"]
    assert terminal.wait_for(lambda lines: not lines) == []


def test_lines_appear_above_the_bars_of_tqdm_and_there_is_no_display(open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    with (
        closing(open_console(terminal)) as console,
        tqdm(total=8, desc="theirs", file=terminal.file, mininterval=0) as bar,
    ):
        console.observe(at(1), UPDATE)
        for update in (1, 2, 3):
            console.write_text(LogText(f"line {update}"), at(update), UPDATE)
            bar.update()
            redraw(console)
        lines = terminal.wait_for(has("3/8"))
    assert [line[19:] for line in lines[:3]] == ["line 1", "line 2", "line 3"]
    assert lines[3].startswith("theirs:")
    assert len(lines) == 4


def test_lines_appear_above_a_bar_of_rich(open_terminal, monkeypatch):
    from rich.progress import Progress

    terminal = open_terminal()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    theirs = RichConsole(file=terminal.file, width=80, height=24, force_terminal=True)
    console = Console(RichConsole(width=80, height=24, highlight=False, soft_wrap=True))
    with closing(console), Progress(console=theirs, auto_refresh=False) as bar:
        task = bar.add_task("theirs", total=8)
        console.observe(at(1), UPDATE)
        for update in (1, 2, 3):
            console.write_text(LogText(f"line {update}"), at(update), UPDATE)
            bar.update(task, advance=1, refresh=True)
            redraw(console)
        lines = terminal.wait_for(has("38%"))
    assert [line[19:] for line in lines[:3]] == ["line 1", "line 2", "line 3"]
    assert lines[3].startswith("theirs ")
    assert len(lines) == 4


@pytest.mark.parametrize("is_quiet", [False, True], ids=["shown", "quiet"])
def test_a_panel_appears_above_a_bar_of_rich(open_terminal, monkeypatch, is_quiet):
    from rich.progress import Progress

    terminal = open_terminal()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    theirs = RichConsole(file=terminal.file, width=80, height=24, force_terminal=True)
    console = Console(RichConsole(width=80, height=24, highlight=False, soft_wrap=True, quiet=is_quiet))
    panel = RunPanel(title="a run", facts=[("model", ["Net"])], commands=[("show", "noether show a")])
    with closing(console), Progress(console=theirs, auto_refresh=False) as bar:
        task = bar.add_task("theirs", total=8)
        bar.update(task, advance=3, refresh=True)
        console.write_panel(panel)
        lines = terminal.wait_for(has("38%" if is_quiet else "show"))
    assert lines[-1].startswith("theirs ")
    first = ["╭─ a run ────╮", "│ model  Net │", "╰────────────╯", "show  noether show a"]
    assert lines[:-1] == ([] if is_quiet else first)


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
    directory = open_run(tmp_path / "run", Console(RichConsole(file=file, width=150)))
    directory.interpreter([LogText("x")], at(1), UPDATE)
    file.is_closed.set()
    assert file.has_failed.wait(TIMEOUT_S)  # the thread redraws
    for update in (3, 4):
        directory.interpreter([LogText("x")], at(update), UPDATE)
    if end == "close":
        directory.close()
    else:
        del directory
        gc.collect()
    assert caplog.text.count("console failed and may have lost log entries") == 1
    assert "Input/output error" in caplog.text
    assert failed == []


def test_a_released_console_removes_the_display(open_terminal):
    terminal = open_terminal()
    console = open_console(terminal)
    console.observe(at(1), UPDATE)
    redraw(console)
    terminal.wait_for(has("run "))
    del console
    gc.collect()
    assert terminal.wait_for(lambda lines: not lines) == []


def test_the_display_ends_with_training(open_terminal):
    terminal = open_terminal()
    with closing(open_console(terminal)) as console:
        console.observe(at(1), UPDATE)
        redraw(console)
        terminal.wait_for(has("run "))
        console.observe(at(8, 2), AfterTraining(run=RUN))
        assert terminal.wait_for(lambda lines: not lines) == []


# ------------------------------------------------------------------------------------------------ in a separate process

LOOP = '''\
"""A training loop that may fail in the middle."""

import os, signal, sys, time

from noether import AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState, compose, dispatch
from noether.core.callbacks import OnlineLossCallback
from noether.effects import open_run

RUN = Run(end=TrainingIteration(update=20), updates_per_epoch=20, samples_per_epoch=80, effective_batch_size=4)
directory = open_run(sys.argv[1])
reducer = compose(OnlineLossCallback(every_n_updates=5))
state = dispatch(TrainState(), BeforeTraining(run=RUN), reducer, directory.interpreter)
while state.iteration.update < 20:
    if state.iteration.update == 12:
        directory.console._live.redraw()
        exec(sys.argv[2])
    event = AfterUpdate(run=RUN, samples=4, losses={"total": 0.5})
    state = dispatch(state.advance(samples=4), event, reducer, directory.interpreter)
dispatch(state.replace(ended=True), AfterTraining(run=RUN), reducer, directory.interpreter)
'''
ENDS = {
    "end": ("pass", 0), "exception": ("raise ValueError('in the middle')", 1), "exit": ("sys.exit(3)", 3),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", -9), "terminate": ("os.kill(os.getpid(), signal.SIGTERM)", -15),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_the_terminal_gets_its_rows_back_however_a_loop_ends(tmp_path, open_terminal, end):
    terminal, (failure, expected_code) = open_terminal(100), ENDS[end]
    (tmp_path / "loop.py").write_text(LOOP)
    file = terminal.file
    code = subprocess.run(
        [sys.executable, "loop.py", "run", failure],
        cwd=tmp_path, stdin=file, stdout=file, stderr=file, timeout=TIMEOUT_S, check=False,
    ).returncode  # fmt: skip
    assert code == expected_code
    lines = terminal.wait_for(lambda lines: terminal.screen.margins is None and not any(map(is_bar, lines)))
    lines = terminal.wait_for(has("E0_U10_S40"))
    assert [line.split()[0] for line in lines[:2]] == ["E0_U5_S20", "E0_U10_S40"]
    assert (lines[-1] == "ValueError: in the middle") == (end == "exception")
