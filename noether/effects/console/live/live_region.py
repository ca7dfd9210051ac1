"""The live display of a run: what its lines say, and the thread that draws them a few times a second."""

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
from noether.effects.console.live.other_bars import others_draw, removed_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from noether.effects.console.live.bottom_rows import Rows
    from noether.effects.console.live.live_view import MetricView, RunView, TaskView

_INTERVAL_S: Final = 0.25
_MAX_ROWS: Final = 8
_MIN_HEIGHT: Final = 6  # of a terminal that has a display
_MAX_NAME: Final = 40
_BAR: Final = (10, 40)  # least and most columns
_TASK_AFTER_S: Final = 0.5
_AFTER_OTHERS_S: Final = 3.0
_GAP: Final = "   "


@dataclass(frozen=True)
class Looks:
    """The signs and colours of a terminal.

    Args:
        has_colors: Whether it shows colours.
        has_signs: Whether its encoding has the signs of bars.
    """

    has_colors: bool
    has_signs: bool

    @property
    def better(self) -> str:
        """Stands beside a value that is better than all before."""
        return "★" if self.has_signs else "*"

    @property
    def ellipsis(self) -> str:
        """Stands for the part of a name that is left out."""
        return "…" if self.has_signs else "~"

    def paint(self, text: str, color: str) -> str:
        """Return a text in a colour, given as the number of ANSI."""
        return f"\x1b[{color}m{text}\x1b[0m" if self.has_colors and text else text

    def bar(self, done: float | None, width: int) -> str:
        """Return a bar of `width` columns; without a known share it is empty."""
        full, empty = ("━", "─") if self.has_signs else ("#", "-")
        count = int(min(max(done or 0.0, 0.0), 1.0) * width)
        return self.paint(full * count, "32") + self.paint(empty * (width - count), "2")

    def metric(self, name: str, metric: MetricView, width: int) -> str:
        """Return a metric with its best in `width` columns; the name is shortened where it has to be, no number is."""
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
    """Return a name in at most `width` columns; the middle of a longer one is left out.

    Args:
        name: The name.
        width: The columns.
        ellipsis: One character for what is left out.

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
    """Draws a run until it is stopped; its thread has no reference to the run.

    Attributes:
        looks: Signs and colours of the terminal.

    Args:
        view: What is drawn.
        rows: Where it is drawn.
        size: Returns width and height of the terminal.
        looks: Its signs and colours.
    """

    def __init__(self, view: RunView, rows: Rows, size: Callable[[], tuple[int, int]], looks: Looks) -> None:
        self._view, self._rows, self._size, self.looks = view, rows, size, looks
        self._lock = threading.RLock()
        self._stop: threading.Event | None = None
        self._count = 0  # rows drawn at most, so that they do not jump
        self._others_drew_s = -math.inf
        self._errors: list[Exception] = []

    @property
    def is_running(self) -> bool:
        """Whether the thread draws."""
        return self._stop is not None

    @property
    def is_shown(self) -> bool:
        """Whether its lines are on the terminal."""
        return self._rows.are_shown

    def start(self) -> None:
        """Start to draw; a no-op if it draws already."""
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=[self._stop], name="live display", daemon=True).start()

    def stop(self) -> None:
        """Remove the display; `start` shows it again.

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

    def tick(self) -> None:
        """Draw what is newest, or nothing while others show a bar and shortly after."""
        now_s = monotonic()
        self._view.add_pace(now_s)
        with self._lock:
            if others_draw():
                self._others_drew_s = now_s
                if self._rows.are_shown:
                    with removed_bars(sys.stdout):  # their line would stay where it is
                        self._rows.remove()
                return
            if now_s - self._others_drew_s < _AFTER_OTHERS_S:  # such as between the bars of two epochs
                return
            width, height = self._size()
            limit = min(_MAX_ROWS, height // 2)
            lines = list(describe(self._view, self.looks, width - 1, now_s))[:limit]
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
                        self.tick()
            except (OSError, ValueError) as error:
                self._errors[:] = [error]
                return


def describe(view: RunView, looks: Looks, width: int, now_s: float) -> Iterator[str]:
    """Yield the lines of the display, the most important first: progress, running tasks, metrics.

    Args:
        view: What is shown.
        looks: Signs and colours of the terminal.
        width: Columns that a line may have.
        now_s: The time of the clock `monotonic`.
    """
    if view.newest is not None:
        at, epoch_start = view.newest
        state = TrainState(iteration=at, epoch_start=epoch_start)
        yield _bar_line("run", *_run_progress(view, state), looks, width)
        yield _bar_line(f"epoch {at.epoch + 1}", *_epoch_progress(view, state), looks, width)
        if view.progress is not None and (next_firing := _next_firing(view, at.update)) is not None:
            yield _bar_line("next", *next_firing, looks, width)
    for task in list(view.tasks):
        if now_s - task.began_s >= _TASK_AFTER_S:
            yield _task_line(task, looks, width)
    yield from _metric_lines(view, looks, width)


def _run_progress(view: RunView, state: TrainState) -> tuple[float | None, list[str]]:
    """Return the completed share of a run, and texts about it, the most important first."""
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
    """Return the completed share of the epoch, and texts about the pace."""
    done = state.iteration.update - state.epoch_start.update
    length: int | None = vars(view.run).get("updates_per_epoch")
    rates = view.rates()
    pace = [] if rates is None else [f"{_format_rate(rates[0])} updates/s", f"{_format_rate(rates[1])} samples/s"]
    time = [] if rates is None or length is None else [f"{format_duration((length - done) / rates[0])} left in it"]
    return (None if length is None else done / length), [_count("", done, length), *pace, *time]


def _next_firing(view: RunView, update: int) -> tuple[float, list[str]] | None:
    shown = view.progress
    if shown is None or shown.fires is None or shown.fires <= shown.fired:
        return None
    done, total = update - shown.fired, shown.fires - shown.fired
    rates = view.rates()
    left_s = shown.next_s if rates is None else (total - done) / rates[0]
    return done / total, [f"{done}/{total}", *([] if left_s is None else [f"in {format_duration(left_s)}"])]


def _count(name: str, done: int, total: int | None) -> str:
    return f"{name} {done}".strip() + (f"/{total}" if total else "")


def _format_rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"  # noqa: PLR2004  # three digits


def _bar_line(name: str, share: float | None, details: Sequence[str], looks: Looks, width: int) -> str:
    """Return a line of a name, a bar, and as many details as fit into the width."""
    name = f"{escape_controls(name):<9} "
    bar = min(max(_BAR[0], width // 5), _BAR[1])
    text, room = "", width - len(name) - bar
    for each in details:
        if len(text) + len(_GAP) + len(each) > room:
            break
        text += f"{_GAP if text else '  '}{each}"
    return f"{looks.paint(name, '1')}{looks.bar(share, bar)}{text}"


def _task_line(task: TaskView, looks: Looks, width: int) -> str:
    name = shorten_name(escape_controls(task.description), max(width // 2, 10), looks.ellipsis)
    share = None if not task.total else task.done / task.total
    bar = min(max(_BAR[0], width // 5), _BAR[1])
    count = _count("", task.done, task.total) if task.total or task.done else "..."
    return f"{name} {looks.bar(share, bar) + '  ' if task.total else ''}{count}"


def _metric_lines(view: RunView, looks: Looks, width: int) -> Iterator[str]:
    """Yield lines of columns of metrics: those that callbacks watch first."""
    metrics = sorted(view.metrics.items(), key=lambda item: not item[1].is_watched)
    if not metrics:
        return
    longest = min(max(cell_len(escape_controls(key)) for key, _ in metrics), _MAX_NAME)
    cell = longest + 46  # the value and the best with its iteration
    columns = max(1, (width + len(_GAP)) // (cell + len(_GAP)))
    cell = (width - (columns - 1) * len(_GAP)) // columns
    cells = [looks.metric(escape_controls(key), metric, cell) for key, metric in metrics]
    for start in range(0, len(cells), columns):
        yield _GAP.join(cells[start : start + columns]).rstrip()
