"""The console: aligned lines, omitted metrics, heartbeat, and no live display without an interactive terminal."""

import io
import math
import os
from contextlib import redirect_stdout

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole
from rich.text import Text

from noether import (
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    BeforeTraining,
    LogScalars,
    LogText,
    Run,
    ShowProgress,
    TrainingIteration,
    TrainState,
)
from noether.effects import Console, open_run

NAN = math.nan
LABEL_WIDTH = 19  # the iteration and a space


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Remove environment variables about terminals."""
    for name in ("CI", "SLURM_JOB_ID", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def console():
    """A console that writes to a file, and a function that returns its lines."""
    written = io.StringIO()
    target = Console(RichConsole(width=200, file=written, soft_wrap=True))
    yield target, lambda: written.getvalue().splitlines()
    target.close()


class Tty(io.StringIO):
    """A file that claims to be a terminal."""

    def isatty(self):
        return True


def at(update, epoch=0, **fields):
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update), **fields)


def without_labels(lines):
    return [line[LABEL_WIDTH:].rstrip() for line in lines]


def keys(lines):
    """Return the metric keys in lines of columns."""
    return [key for line in without_labels(lines) for key in line.split()[::2]]


# ------------------------------------------------------------------------------------------------ lines


def test_values_are_shortened_and_aligned(console):
    target, printed = console
    target.write_text(LogText("hello [bold]you[/bold]"), at(3, epoch=1), AfterEpoch())
    target.write_scalars(LogScalars({"a": torch.tensor(1 / 3), "b": 12345678, "c": "x"}), at(3, epoch=1), AfterEpoch())
    assert [line.rstrip() for line in printed()] == [
        "E1_U3_S12          hello [bold]you[/bold]",
        "E1_U3_S12          a  0.33333         b  12345678        c  x",
    ]


def test_further_lines_of_a_text_are_indented(console):
    target, printed = console
    target.write_text(LogText("first\n  second\n\nfourth\n"), at(3, epoch=1), AfterEpoch())
    target.write_text(LogText(""), at(4, epoch=1), AfterEpoch())
    assert [line.rstrip() for line in printed()] == [
        "E1_U3_S12          first",
        "                     second",
        "",
        "                   fourth",
        "E1_U4_S16",
    ]


def test_updates_are_written_at_most_once_a_second(console):
    target, printed = console
    for update, time_s in enumerate([100.0, 100.5, 100.99, 101.0, 101.5, 102.5], 1):
        target.write_scalars(LogScalars({"x": update}), at(update), AfterUpdate(samples=4, time_s=time_s))
    assert [line.split()[0] for line in printed()] == ["E0_U1_S4", "E0_U4_S16", "E0_U6_S24"]


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_updates_are_written_after_the_clock_was_set(console, jump_s):
    target, printed = console
    times = [1e4, 1e4 + 0.5, 1e4 + jump_s, 1e4 + jump_s + 0.5, 1e4 + jump_s + 1.0]
    for update, time_s in enumerate(times, 1):
        target.write_scalars(LogScalars({"x": update}), at(update), AfterUpdate(samples=4, time_s=time_s))
    assert [line.split()[0] for line in printed()] == ["E0_U1_S4", "E0_U3_S12", "E0_U5_S20"]


def test_epochs_and_updates_without_a_time_are_always_written(console):
    target, printed = console
    target.write_scalars(LogScalars({"x": 1}), at(1), AfterUpdate(samples=4, time_s=100.0))
    target.write_scalars(LogScalars({"x": 2}), at(1, epoch=1), AfterEpoch(time_s=100.1))
    target.write_scalars(LogScalars({"x": 3}), at(2), AfterUpdate(samples=4))
    assert [line.split()[-1] for line in printed()] == ["1", "2", "3"]


def test_texts_are_always_written(console):
    target, printed = console
    for update in (1, 2, 3):
        target.write_text(LogText(f"text {update}"), at(update), AfterUpdate(samples=4, time_s=100.0))
    assert without_labels(printed()) == ["text 1", "text 2", "text 3"]


class Timer:
    """A timer that the test fires."""

    created = None

    def __init__(self, seconds, function, arguments):
        self.seconds, self.fire, self.cancelled = seconds, lambda: function(*arguments), False
        Timer.created.append(self)

    def start(self):
        assert self.daemon

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def clock(monkeypatch):
    """The time that the console reads: a list with one number of seconds."""
    now = [1000.0]
    monkeypatch.setattr("noether.effects.console.console.monotonic", lambda: now[0])
    return now


@pytest.fixture
def timers(monkeypatch):
    monkeypatch.setattr(Timer, "created", [])
    monkeypatch.setattr("threading.Timer", Timer)
    return Timer.created


def test_the_last_line_is_repeated_as_a_heartbeat(console, timers, clock):
    target, printed = console
    target.write_text(LogText("first"), at(1), AfterEpoch())
    clock[0] += 100
    target.write_text(LogText("second"), at(2), AfterEpoch())
    clock[0] += 200
    timers[0].fire()  # 300 s after the first line, and 200 s after the second
    assert without_labels(printed()) == ["first", "second"]
    clock[0] += 100
    timers[1].fire()
    assert without_labels(printed()) == ["first", "second", "second"]
    assert [timer.seconds for timer in timers] == [300.0, 100.0, 300.0]
    target.close()
    assert timers[-1].cancelled
    timers[-1].fire()
    assert len(printed()) == 3


def test_one_timer_serves_any_number_of_lines(console, timers):
    target, _ = console
    for update in range(10):
        target.write_text(LogText("text"), at(update), AfterEpoch())
    assert len(timers) == 1


def test_the_heartbeat_stops_when_training_ends(console, timers):
    target, printed = console
    target.write_text(LogText("first"), at(1), AfterEpoch())
    target.write_text(LogText("last"), at(1), AfterTraining())
    assert [timer.cancelled for timer in timers] == [True]
    assert without_labels(printed()) == ["first", "last"]


def test_a_released_console_has_no_heartbeat(timers):
    written = io.StringIO()
    target = Console(RichConsole(file=written))
    target.write_text(LogText("first"), at(1), AfterEpoch())
    del target  # as in a loop that raised without closing its run
    timers[0].fire()
    assert len(written.getvalue().splitlines()) == 1


def test_print_above_writes_texts_and_renderables(console):
    target, printed = console
    target.print_above("[bold]text[/bold]")
    target.print_above(Text("styled", "bold"))
    assert printed() == ["[bold]text[/bold]", "styled"]


# ------------------------------------------------------------------------------------------------ columns

NAMES = st.text("abc/_", min_size=1, max_size=12)
VALUES = st.one_of(st.integers(-99999, 99999), st.floats(-1e6, 1e6))


@given(st.dictionaries(NAMES, st.tuples(VALUES, VALUES), min_size=1, max_size=20))
def test_lines_of_the_same_metrics_are_aligned(metrics):
    written = io.StringIO()
    target = Console(RichConsole(file=written, soft_wrap=True))
    for number in (0, 1):
        target.write_scalars(LogScalars({key: pair[number] for key, pair in metrics.items()}), at(1), AfterTraining())
    target.close()
    names = [key for key in sorted(metrics) if "total" not in key]
    for number, line in enumerate(written.getvalue().splitlines()):
        start = LABEL_WIDTH
        for name in names:
            value = metrics[name][number]
            text = line[start:]
            assert text.startswith(f"{name}  {f'{value:.5g}' if isinstance(value, float) else value}")
            start += len(name) + 2 + 12 + 4
    assert written.getvalue().count("\n") == 2


def test_the_metrics_of_an_event_are_one_line(console):
    target, printed = console
    values = {f"loss/val/part_{number}": number / 8 for number in range(60)}
    target.write_scalars(LogScalars(values), at(40, epoch=1), AfterEpoch())
    (line,) = printed()
    assert keys([line]) == sorted(values)


def test_metrics_are_sorted_by_key(console):
    target, printed = console
    target.write_scalars(LogScalars({"c": 1, "a": 2, "b": 3}), at(1), AfterEpoch())
    assert without_labels(printed()) == ["a  2               b  3               c  1"]


# ------------------------------------------------------------------------------------------------ omitted metrics


def test_quiet_keys_are_omitted(console):
    target, printed = console
    target.write_scalars(LogScalars({"a": 1, "b": 2, "c": 3}, frozenset({"b"})), at(1), AfterEpoch())
    target.write_scalars(LogScalars({"a": 1}, frozenset({"a"})), at(2), AfterEpoch())
    target.write_scalars(LogScalars({}), at(3), AfterEpoch())
    assert [line.rstrip() for line in printed()] == ["E0_U1_S4           a  1               c  3"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"loss/val/total": 0.5, "loss/val/mse": 0.5}, ["loss/val/mse"]),
        ({"loss/val/total": torch.tensor(0.5), "loss/val/mse": 0.5}, ["loss/val/mse"]),
        ({"loss/online/total/U10": 0.5, "loss/online/mse/U10": 0.5}, ["loss/online/mse/U10"]),
        ({"loss/val/total/ema=0.9": 0.5, "loss/val/mse/ema=0.9": 0.5}, ["loss/val/mse/ema=0.9"]),
        # there is no loss that the total could repeat
        ({"loss/val/total": 0.5}, ["loss/val/total"]),
        ({"total": 0.5, "mse": 0.5, "ce": 0.5}, ["ce", "mse", "total"]),
        # two losses, although one of them is zero
        ({"l/total": 0.5, "l/mse": 0.5, "l/ce": 0.0}, ["l/ce", "l/mse", "l/total"]),
        # a total with another value
        ({"loss/val/total": 0.5, "loss/val/mse": 0.25}, ["loss/val/mse", "loss/val/total"]),
        ({"loss/val/total": NAN, "loss/val/mse": 0.25}, ["loss/val/mse", "loss/val/total"]),
        ({"loss/val/total": 0.25, "loss/val/mse": NAN}, ["loss/val/mse", "loss/val/total"]),
        # the only loss is that of another dataset, interval or average
        ({"loss/val/total": 0.5, "loss/test/mse": 0.5}, ["loss/test/mse", "loss/val/total"]),
        ({"loss/online/total/U1": 0.5, "loss/online/mse/U2": 0.5}, ["loss/online/mse/U2", "loss/online/total/U1"]),
        ({"loss/val/total/ema=0.9": 0.5, "loss/val/mse": 0.5}, ["loss/val/mse", "loss/val/total/ema=0.9"]),
    ],
)
def test_the_total_of_a_single_loss_is_omitted(console, values, expected):
    target, printed = console
    target.write_scalars(LogScalars(values), at(1), AfterEpoch())
    assert sorted(keys(printed())) == expected


def test_quiet_metrics_do_not_delay_the_next_line(console):
    target, printed = console
    for update in range(1, 7):
        values, time_s = {"quiet": 1, **({"loud": 2} if update % 2 == 0 else {})}, 100 + 0.5 * update
        target.write_scalars(
            LogScalars(values, frozenset({"quiet"})), at(update), AfterUpdate(samples=4, time_s=time_s)
        )
    assert [line.split() for line in printed()] == [[f"E0_U{u}_S{4 * u}", "loud", "2"] for u in (2, 4, 6)]


def test_the_total_of_a_quiet_loss_is_written(console):
    target, printed = console
    target.write_scalars(LogScalars({"l/total": 0.5, "l/mse": 0.5}, frozenset({"l/mse"})), at(1), AfterEpoch())
    assert keys(printed()) == ["l/total"]


# ------------------------------------------------------------------------------------------------ progress


def progress(update, *, due):
    return ShowProgress(
        end=TrainingIteration(epoch=2, update=8, sample=32), fired=0, fires=4, update_s=0.5,
        next_s=0.5 * (4 - update), left_s=0.5 * (8 - update), due=due,
    )  # fmt: skip


def show_short_run(target):
    """Let a console write the output of a short run."""
    target.write_text(LogText("begin"), at(0), BeforeTraining())
    for update in (1, 2, 3):
        target.show_progress(progress(update, due=False), at(update), AfterUpdate(samples=4))
        if update == 2:
            target.show_progress(progress(update, due=True), at(update), AfterUpdate(samples=4))
            target.write_scalars(LogScalars({"loss": 0.5}), at(update), AfterUpdate(samples=4))
    target.show_progress(progress(3, due=False), at(3), AfterTraining())
    target.write_text(LogText("end"), at(3), AfterTraining())
    target.close()


SHORT_RUN = [
    "E0_U0_S0           begin",
    (
        "E0_U2_S8           update 2/8  epoch 0/2  sample 8/32  500.0 ms/update  2.0 updates/s  "
        "next in 0:00:01  end in 0:00:03"
    ),
    "E0_U2_S8           loss  0.5",
    "E0_U3_S12          end",
]


def test_progress_in_a_file_is_a_line_where_it_is_due(console):
    target, printed = console
    show_short_run(target)
    assert [line.rstrip() for line in printed()] == SHORT_RUN


def test_a_pipe_gets_no_live_display():
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w") as file:
        show_short_run(Console(RichConsole(file=file, highlight=False, soft_wrap=True)))
    with os.fdopen(read_end) as file:
        assert [line.rstrip() for line in file.read().split("\n")] == [*SHORT_RUN, ""]


def test_standard_output_to_a_pipe_gets_no_live_display(tmp_path, capsys):
    directory = open_run(tmp_path)
    directory.interpreter([progress(1, due=False)], at(1), AfterUpdate(samples=4))
    directory.interpreter([progress(2, due=False), progress(2, due=True)], at(2), AfterUpdate(samples=4))
    directory.close()
    assert capsys.readouterr().out == SHORT_RUN[1] + "\n"


@pytest.mark.parametrize("variable", ["CI", "SLURM_JOB_ID"])
def test_the_terminal_of_a_batch_job_gets_no_live_display(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    written = Tty()
    show_short_run(Console(RichConsole(width=200, file=written, highlight=False, soft_wrap=True)))
    assert [line.rstrip() for line in written.getvalue().split("\n")] == [*SHORT_RUN, ""]


def test_a_dumb_terminal_gets_no_live_display(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    written = Tty()
    show_short_run(Console(RichConsole(width=200, file=written, highlight=False, soft_wrap=True)))
    assert [line.rstrip() for line in written.getvalue().split("\n")] == [*SHORT_RUN, ""]


def test_labels_are_as_wide_as_the_last_iteration_of_the_run(console):
    target, printed = console
    end = TrainingIteration(epoch=1000)
    run = Run(end=end, updates_per_epoch=1000, samples_per_epoch=4000, effective_batch_size=4)
    last = TrainState(iteration=run.iteration_after(10**6))
    for state in (at(1), last):
        target.write_scalars(LogScalars({"loss": NAN}), state, AfterEpoch(run=run))
    first, second = printed()
    assert second.startswith("E1000_U1000000_S4000000 ")
    assert first.index("loss") == second.index("loss")


def test_a_terminal_without_unicode_gets_escapes_instead_of_an_error():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(RichConsole(width=200, file=file, force_terminal=True, color_system=None, soft_wrap=True))
    console.write_text(LogText("a \N{BLACK STAR}"), at(1), AfterEpoch())
    console.close()
    assert file.buffer.getvalue().decode("ascii").rstrip().endswith(r"a \u2605")


def test_progress_without_a_known_speed_shows_the_counters(console):
    target, printed = console
    end = TrainingIteration(epoch=2, update=8, sample=32)
    target.show_progress(
        ShowProgress(end=end, fired=0, fires=None, update_s=None, next_s=None, left_s=None, due=True),
        at(4, epoch=1), AfterEpoch(),
    )  # fmt: skip
    assert without_labels(printed()) == ["update 4/8  epoch 1/2  sample 16/32"]


# ------------------------------------------------------------------------------------------------ without rich

PARTS = st.sampled_from([
    "[bold]", "[/]", "[red]x[/red]", "\\[", ":smile:", ":100:", "\t", "  ", "\n", "ä", "漢字", "e\u0301", "\u200b",
    "\U0001f469\u200d\U0001f680", "\x07", "\x08", "\x1b[1m", "\r", "\x0b", "'a' 1.5 True http://x.y/z", "x" * 130,
    "a b " * 50,
])  # fmt: skip
TEXTS = st.lists(st.one_of(PARTS, st.text(max_size=5)), max_size=12).map("".join)


def write_all(target, text):
    target.write_text(LogText(text), at(3, epoch=1), AfterTraining())
    target.write_scalars(LogScalars({text or "x": text, "y": 0.5}), at(3, epoch=1), AfterTraining())
    target.close()


@given(TEXTS)
def test_plain_output_equals_the_output_of_rich(text):
    plain, rendered = io.StringIO(), io.StringIO()
    with redirect_stdout(plain):
        write_all(Console(), text)
    write_all(Console(RichConsole(file=rendered, highlight=False, soft_wrap=True)), text)
    assert plain.getvalue() == rendered.getvalue()


CONTROLS = ["\x1b", "\x07", "\r", "\x08", "\x7f", "\x9b", "\u202e", "\u2028", "\x85", "\x0c", chr(0xDCFF)]


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("control", CONTROLS)
def test_control_characters_are_written_as_escapes(control, is_plain):
    written = io.StringIO()
    with redirect_stdout(written):
        target = Console() if is_plain else Console(RichConsole(width=200, highlight=False, soft_wrap=True))
        target.write_text(LogText(f"a{control}b\r\nnext"), at(3), AfterTraining())
        target.write_scalars(LogScalars({f"k{control}\n": f"v{control}", "other": 1}), at(3), AfterTraining())
        target.close()
    text = written.getvalue()
    visible = control.encode("unicode_escape").decode()
    assert control not in text
    assert [line[LABEL_WIDTH:] for line in text.split("\n")[:2]] == [f"a{visible}b", "next"]
    assert text.split("\n")[2].split()[1:4] == [f"k{visible}\\n", f"v{visible}", "other"]


@pytest.mark.parametrize("is_plain", [True, False])
def test_markup_in_texts_is_not_interpreted(is_plain):
    written = io.StringIO()
    with redirect_stdout(written):
        write_all(Console() if is_plain else Console(RichConsole(highlight=False, soft_wrap=True)), "[bold]a:smile:[/]")
    assert written.getvalue().splitlines()[0] == "E1_U3_S12          [bold]a:smile:[/]"


def test_rich_is_not_used_without_a_terminal(monkeypatch):
    monkeypatch.setattr(RichConsole, "print", lambda *_, **__: pytest.fail("rich was called"))
    written = io.StringIO()
    with redirect_stdout(written):
        show_short_run(Console())
    assert written.getvalue().splitlines() == SHORT_RUN


def test_each_line_is_flushed_at_once(tmp_path):
    with (tmp_path / "out").open("w") as file, redirect_stdout(file):
        target = Console()
        target.write_text(LogText("hello"), at(1), AfterTraining())
        assert (tmp_path / "out").read_text().endswith("hello\n")


def test_a_rich_console_of_the_user_keeps_its_features():
    written = io.StringIO()
    rich_console = RichConsole(file=written, record=True, width=40)
    write_all(Console(rich_console), "word " * 20)
    assert max(map(len, written.getvalue().splitlines())) <= 40
    assert rich_console.export_text() == written.getvalue()
    with rich_console.capture() as captured:
        write_all(Console(rich_console), "hello")
    assert "hello" in captured.get()
    assert "hello" not in written.getvalue()
    rich_console.quiet = True
    write_all(Console(rich_console), "hello")
    assert "hello" not in written.getvalue()


def test_a_closed_pipe_does_not_stop_the_run(tmp_path, caplog):
    """As in `noether train | head`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe, redirect_stdout(pipe), open_run(tmp_path / "run") as directory:
        for update in (1, 2):
            directory.interpreter([LogText("hello")], at(update), AfterEpoch())
        with open(os.devnull, "w") as nothing:  # noqa: PTH123  # receives the buffered lines when the file is closed
            os.dup2(nothing.fileno(), write_end)
    assert caplog.text.count("console failed and may have lost log entries") == 1


def test_a_heartbeat_to_a_closed_pipe_is_not_an_error(timers, clock):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    with redirect_stdout(io.StringIO()):
        target = Console()
        target.write_text(LogText("first"), at(1), AfterEpoch())
    clock[0] += 400
    with redirect_stdout(Closed()):
        timers[0].fire()
    assert len(timers) == 2
    target.close()
