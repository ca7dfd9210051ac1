"""The live display of a run: its lines, and the thread that redraws them four times a second."""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len, set_cell_size

from noether.core.estimates import estimate_end, known_end
from noether.core.state import TrainState
from noether.core.text import escape_controls, format_duration
from noether.effects.console.columns import format_value
from noether.effects.console.live.other_bars import has_other_bar, hide_other_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from noether.effects.console.live.bottom_rows import Rows
    from noether.effects.console.live.live_view import MetricView, RunView, TaskView

_INTERVAL_S: Final = 0.25
_MAX_ROWS: Final = 8
_MIN_HEIGHT: Final = 6  # a lower terminal has no display
_MAX_NAME: Final = 40
_BAR: Final = (10, 40)  # minimum and maximum width
_TASK_AFTER_S: Final = 0.5
_AFTER_OTHERS_S: Final = 3.0
_GAP: Final = "   "


@dataclass(frozen=True)
class TerminalStyle:
    """The characters and colours that a terminal can show.

    Args:
        has_colors: Whether it shows colours.
        has_unicode: Whether its encoding has the characters of bars and marks; otherwise they are ASCII.
    """

    has_colors: bool
    has_unicode: bool

    @property
    def better(self) -> str:
        """The mark beside a value that is better than all earlier ones."""
        return "★" if self.has_unicode else "*"

    @property
    def ellipsis(self) -> str:
        """The mark for the part of a name that is left out."""
        return "…" if self.has_unicode else "~"

    def paint(self, text: str, color: str) -> str:
        """Return a text in a colour, which is an ANSI number such as `32` for green."""
        return f"\x1b[{color}m{text}\x1b[0m" if self.has_colors and text else text

    def bar(self, done: float | None, width: int) -> str:
        """Return a bar of `width` columns, of which the share `done` in [0, 1] is full; empty if it is None."""
        full, empty = ("━", "─") if self.has_unicode else ("#", "-")
        count = int(min(max(done or 0.0, 0.0), 1.0) * width)
        return self.paint(full * count, "32") + self.paint(empty * (width - count), "2")

    def metric(self, name: str, metric: MetricView, width: int) -> str:
        """Return a metric and its best value in `width` columns.

        If they do not fit, the best value is left out, and the name is shortened; the last value stays whole.
        """
        value = format_value(metric.value)
        note = ""
        if metric.is_best:
            note = f" {self.better} best"
        elif metric.best is not None and format_value(metric.best) != value:
            note = f"  best {format_value(metric.best)} at {metric.best_at}"
        room = width - len(value) - 2
        if cell_len(name) + len(note) > room:
            note = f" {self.better}" if metric.is_best else note.partition(" at ")[0]
        if len(note) + 8 > room:
            note = ""
        name = shorten_name(name, max(room - len(note), 4), self.ellipsis)
        color = "32" if metric.is_best else "31" if value in {"nan", "inf", "-inf"} else "1"
        padding = " " * max(width - cell_len(name) - 2 - len(value) - len(note), 0)
        return f"{name}  {self.paint(value, color)}{self.paint(note, '32' if metric.is_best else '2')}{padding}"


def shorten_name(name: str, width: int, ellipsis: str = "…") -> str:
    """Return a name in at most `width` columns; of a longer name, the middle is left out.

    Args:
        name: The name.
        width: Maximum width in columns.
        ellipsis: The character that stands for the middle.

    Example:
        >>> shorten_name("loss/val/cross_entropy", 12)
        'loss/…ntropy'
    """
    if cell_len(name) <= width:
        return name
    head = (width - 1) // 2
    tail = name
    while cell_len(tail) > width - 1 - head:
        tail = tail[1:]
    return f"{set_cell_size(name, head)}{ellipsis}{tail}"


class LiveRegion:
    """A thread that draws the live display; it has no reference to the console or the run.

    Attributes:
        style: What the terminal can show.

    Args:
        view: The data to draw.
        rows: Where to draw it.
        size: Returns the width and the height of the terminal in characters.
        style: What the terminal can show.
    """

    def __init__(self, view: RunView, rows: Rows, size: Callable[[], tuple[int, int]], style: TerminalStyle) -> None:
        self._view, self._rows, self._size, self.style = view, rows, size, style
        self._lock = threading.RLock()
        self._stop: threading.Event | None = None
        self._count = 0  # the most rows drawn so far: the display keeps them, so that it does not jump
        self._other_bar_s = -math.inf
        self._errors: list[Exception] = []

    @property
    def is_running(self) -> bool:
        """Whether the thread is running."""
        return self._stop is not None

    @property
    def is_shown(self) -> bool:
        """Whether the lines are on the terminal."""
        return self._rows.are_shown

    def start(self) -> None:
        """Start the thread; a no-op if it is running."""
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=[self._stop], name="live display", daemon=True).start()

    def stop(self) -> None:
        """Stop the thread and remove the display; `start` shows it again.

        Raises:
            OSError: If the terminal is closed.
            ValueError: Likewise.
        """
        if self._stop is None:
            return
        self._stop.set()
        self._stop, self._count = None, 0
        with self._lock:
            self._rows.remove()

    def raise_error(self) -> None:
        """Raise the error that ended the thread, once.

        Raises:
            OSError: If the terminal is closed.
            ValueError: Likewise.
        """
        if self._errors:
            raise self._errors.pop()

    def redraw(self) -> None:
        """Draw the newest data; while another library shows a bar, and 3 s after it, draw nothing.

        Raises:
            OSError: If the terminal is closed.
            ValueError: Likewise.
        """
        now_s = monotonic()
        self._view.record_progress(now_s)
        with self._lock:
            if has_other_bar():
                self._other_bar_s = now_s
                if self._rows.are_shown:
                    with hide_other_bars(sys.stdout):  # their line would stay where it was
                        self._rows.remove()
                return
            if now_s - self._other_bar_s < _AFTER_OTHERS_S:  # such as between the bars of two epochs
                return
            width, height = self._size()
            limit = min(_MAX_ROWS, height // 2)
            lines = list(display_lines(self._view, self.style, width - 1, now_s))[:limit]
            if lines and height >= _MIN_HEIGHT:
                self._count = min(max(self._count, len(lines)), limit)
                self._rows.draw(lines + [""] * (self._count - len(lines)))
            else:
                self._rows.remove()

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(_INTERVAL_S):
            try:
                with self._lock:
                    if not stop.is_set():
                        self.redraw()
            except (OSError, ValueError) as error:
                self._errors[:] = [error]
                return


def display_lines(view: RunView, style: TerminalStyle, width: int, now_s: float) -> Iterator[str]:
    """Yield the lines of the display, the most important first: progress, running tasks, metrics.

    Args:
        view: The data to show.
        style: What the terminal can show.
        width: Maximum width of a line in columns.
        now_s: The time in seconds of the clock `monotonic`.
    """
    if view.newest is not None:
        at, epoch_start = view.newest
        state = TrainState(iteration=at, epoch_start=epoch_start)
        yield _bar_line("run", *_run_progress(view, state), style, width)
        yield _bar_line(f"epoch {at.epoch + 1}", *_epoch_progress(view, state), style, width)
        if view.progress is not None and (next_firing := _firing_progress(view, at.update)) is not None:
            yield _bar_line("next", *next_firing, style, width)
    for task in list(view.tasks):
        if now_s - task.began_s >= _TASK_AFTER_S:
            yield _task_line(task, style, width)
    yield from _metric_lines(view, style, width)


def _run_progress(view: RunView, state: TrainState) -> tuple[float | None, list[str]]:
    """Return the completed share of the run, and details, the most important first."""
    at, end = state.iteration, estimate_end(state, view.run)
    left_s = view.left_s(end)
    share = None if not end else at.update / end
    percent = [] if share is None else [f"{min(int(100 * share), 100)}%"]
    left = [] if left_s is None else [f"{format_duration(left_s)} left"]
    final = known_end(view.run)
    epochs = getattr(vars(view.run).get("end"), "epoch", 0) if final is None else final.epoch
    counts = [_count("update", at.update, end), _count("epoch", at.epoch, epochs)]
    return share, [*percent, *left, *counts, _count("sample", at.sample, final.sample if final else None)]


def _epoch_progress(view: RunView, state: TrainState) -> tuple[float | None, list[str]]:
    """Return the completed share of the epoch, and details such as the speed, the most important first."""
    done = state.iteration.update - state.epoch_start.update
    length: int | None = vars(view.run).get("updates_per_epoch")
    rates = view.rates()
    speed = [] if rates is None else [f"{_format_rate(rates[0])} updates/s", f"{_format_rate(rates[1])} samples/s"]
    time = [] if rates is None or length is None else [f"{format_duration((length - done) / rates[0])} left in epoch"]
    return (None if length is None else done / length), [_count("", done, length), *speed, *time]


def _firing_progress(view: RunView, update: int) -> tuple[float, list[str]] | None:
    """Return the completed share of the updates until callbacks act next, and details; None if that is not known."""
    progress = view.progress
    if progress is None or progress.fires is None or progress.fires <= progress.fired:
        return None
    done, total = update - progress.fired, progress.fires - progress.fired
    rates = view.rates()
    left_s = progress.next_s if rates is None else (total - done) / rates[0]
    return done / total, [f"{done}/{total}", *([] if left_s is None else [f"in {format_duration(left_s)}"])]


def _count(name: str, done: int, total: int | None) -> str:
    return f"{name} {done}".strip() + (f"/{total}" if total else "")


def _format_rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"  # noqa: PLR2004  # three digits


def _bar_line(name: str, share: float | None, details: Sequence[str], style: TerminalStyle, width: int) -> str:
    """Return a line with a name, a bar, and as many details as fit into `width` columns."""
    name = f"{escape_controls(name):<9} "
    bar = min(max(_BAR[0], width // 5), _BAR[1])
    text, room = "", width - len(name) - bar
    for each in details:
        if len(text) + len(_GAP) + len(each) > room:
            break
        text += f"{_GAP if text else '  '}{each}"
    return f"{style.paint(name, '1')}{style.bar(share, bar)}{text}"


def _task_line(task: TaskView, style: TerminalStyle, width: int) -> str:
    name = shorten_name(escape_controls(task.description), max(width // 2, 10), style.ellipsis)
    share = None if not task.total else task.done / task.total
    bar = min(max(_BAR[0], width // 5), _BAR[1])
    count = _count("", task.done, task.total) if task.total or task.done else "..."
    return f"{name} {style.bar(share, bar) + '  ' if task.total else ''}{count}"


def _metric_lines(view: RunView, style: TerminalStyle, width: int) -> Iterator[str]:
    """Yield lines of metrics in columns; those that callbacks watch come first."""
    metrics = sorted(view.metrics.items(), key=lambda item: not item[1].is_watched)
    if not metrics:
        return
    longest = min(max(cell_len(escape_controls(key)) for key, _ in metrics), _MAX_NAME)
    cell = longest + 46  # the value and the best with its iteration
    columns = max(1, (width + len(_GAP)) // (cell + len(_GAP)))
    cell = (width - (columns - 1) * len(_GAP)) // columns
    cells = [style.metric(escape_controls(key), metric, cell) for key, metric in metrics]
    for start in range(0, len(cells), columns):
        yield _GAP.join(cells[start : start + columns]).rstrip()
