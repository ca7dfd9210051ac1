"""Live display on a terminal: two progress bars, to the end of the run and to the next firing."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from noether.core.effect import format_count, format_duration
from noether.effects.disk.finalizers import finalize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.live import Live

    from noether.core.effect import ShowProgress
    from noether.core.state import TrainState

_FULL_WIDTH: Final = 110  # characters; a narrower terminal gets shorter lines
_UNATTENDED: Final = ("CI", "SLURM_JOB_ID")  # environment variables set where output goes to a log


def is_live(console: Console) -> bool:
    """Return whether a person watches `console`: a terminal, and not the log of a CI or batch job."""
    if any(os.environ.get(name) for name in _UNATTENDED):
        return False
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


class LiveProgress:
    """Two progress bars at the bottom of a terminal, redrawn a few times a second.

    Args:
        console: The terminal; other lines printed to it appear above the bars.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._errors: list[Exception] = []  # at most one, of the thread that redraws

    def show(self, effect: ShowProgress, state: TrainState) -> None:
        """Show or update the display.

        Raises:
            OSError: If it could not be redrawn, for example because the terminal is closed.
            ValueError: Likewise.
        """
        if self._errors:
            raise self._errors.pop()
        update, is_narrow = state.iteration.update, self._console.width < _FULL_WIDTH
        total = 0 if effect.fires is None else effect.fires - effect.fired
        count = format_count("update", state.iteration, effect.end).removeprefix("update ")
        time_to_next = "" if effect.next_s is None else f"in {format_duration(effect.next_s)}"
        bars = (
            {
                "completed": update,
                "total": None
                if effect.end is None
                else effect.end.update,  # without a total the bar shows only that the run is alive
                "details": f"{count}  {_run_details(effect, state, short=is_narrow)}",
            },
            {
                "completed": update - effect.fired,
                "total": total,
                "details": f"{update - effect.fired}/{total}  {time_to_next}",
                "visible": bool(total),
            },
        )
        if self._progress is None:
            self._start(*bars)
        for task, bar in enumerate(bars):
            self._progress.update(TaskID(task), **bar)  # type: ignore[union-attr, arg-type]  # started; fields by name

    @property
    def is_shown(self) -> bool:
        """Whether the display is on the terminal."""
        return self._progress is not None

    def stop(self) -> None:
        """Remove the display; `show` starts it again."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self, *bars: Mapping[str, Any]) -> None:
        # A new object each time: a stopped one assumes that its lines are still there, and draws over others.
        details = TextColumn("{task.fields[details]}", table_column=Column(no_wrap=True))
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10 if self._console.width < _FULL_WIDTH else 30),
            details,
            console=self._console,
            transient=True,
            # Output to a file or a pipe is not redirected to the terminal.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        for name, bar in zip(("run ", "next"), bars, strict=True):
            self._progress.add_task(name, **bar)
        _collect_errors(self._progress.live, self._errors)
        self._progress.start()
        # Without this, a loop that raises without closing its run would leave the terminal without a cursor.
        finalize(self, _stop, self._progress)


def _collect_errors(live: Live, errors: list[Exception]) -> None:
    """Let the thread that redraws a display collect its first error, and not end with a traceback on the terminal."""
    refresh = live.refresh

    def refresh_or_collect() -> None:
        try:
            refresh()
        except (OSError, ValueError) as error:
            errors[:] = errors or [error]

    live.refresh = refresh_or_collect  # type: ignore[method-assign]  # rich has no hook for errors


def _stop(progress: Progress) -> None:
    with suppress(OSError, ValueError):  # the terminal is closed
        progress.stop()


def describe_progress(effect: ShowProgress, state: TrainState) -> str:
    """Return the content of the display as one line.

    Example:
        >>> from noether import ShowProgress, TrainingIteration, TrainState
        >>> effect = ShowProgress(end=TrainingIteration(epoch=2, update=8, sample=64), fired=0, fires=4, update_s=0.5,
        ...                       next_s=1.0, left_s=3.0, due=True)
        >>> describe_progress(effect, TrainState().advance(samples=8).advance(samples=8))
        'update 2/8  epoch 0/2  sample 16/64  500.0 ms/update  2.0 updates/s  next in 0:00:01  end in 0:00:03'
    """
    updates = format_count("update", state.iteration, effect.end)
    next_firing = [] if effect.next_s is None else [f"next in {format_duration(effect.next_s)}"]
    end = [] if effect.left_s is None else [f"end in {format_duration(effect.left_s)}"]
    return "  ".join((updates, *_counts(effect, state), *_speed(effect), *next_firing, *end))


def _run_details(effect: ShowProgress, state: TrainState, *, short: bool) -> str:
    """Return the text beside the bar of the whole run."""
    end = [] if effect.left_s is None else [f"{format_duration(effect.left_s)} left"]
    return "  ".join((*_speed(effect)[:1], *end) if short else (*_counts(effect, state), *_speed(effect), *end))


def _counts(effect: ShowProgress, state: TrainState) -> list[str]:
    return [format_count("epoch", state.iteration, effect.end), format_count("sample", state.iteration, effect.end)]


def _speed(effect: ShowProgress) -> list[str]:
    if not effect.update_s:
        return []
    return [f"{1000 * effect.update_s:.1f} ms/update", f"{1 / effect.update_s:.1f} updates/s"]
