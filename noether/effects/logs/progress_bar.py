"""The live display of a terminal: two bars, to the end of the run and to the next firing."""

from __future__ import annotations

import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, Final

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from noether.core.duration import format_duration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from noether.core.effect import ShowProgress
    from noether.core.state import TrainState

_NARROW: Final = 110  # columns that all of it needs
_LOGGED: Final = ("CI", "SLURM_JOB_ID")


def is_live(console: Console) -> bool:
    """Return whether somebody watches `console`: a terminal, and not the log of a CI or of a batch job."""
    if any(os.environ.get(name) for name in _LOGGED):
        return False
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


class LiveProgress:
    """Two lines at the bottom of a terminal, redrawn a few times a second.

    Args:
        console: Where other lines are printed, too: they appear above.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    def show(self, effect: ShowProgress, state: TrainState) -> None:
        """Show what is to be seen from now on."""
        update, narrow = state.iteration.update, self._console.width < _NARROW
        total = 0 if effect.fires is None else effect.fires - effect.fired
        following = "" if effect.next_s is None else f"in {format_duration(effect.next_s)}"
        bars = (
            {"completed": update, "total": effect.end.update, "said": _to_the_end(effect, state, short=narrow)},
            {"completed": update - effect.fired, "total": total, "said": following, "visible": bool(total)},
        )
        if self._progress is None:
            self._begin(*bars)
        for task, bar in enumerate(bars):
            self._progress.update(TaskID(task), **bar)  # type: ignore[union-attr, arg-type]  # begun; fields by name

    def stop(self) -> None:
        """Take the display away; it comes back when it is shown again."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _begin(self, *bars: Mapping[str, Any]) -> None:
        # A new one each time: one that was stopped still believes that its lines are there, and draws over others.
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10 if self._console.width < _NARROW else 30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[said]}", table_column=Column(no_wrap=True)),
            console=self._console,
            transient=True,
            # What goes to a file or a pipe stays on its way there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        for name, bar in zip(("run ", "next"), bars, strict=True):
            self._progress.add_task(name, **bar)
        self._progress.start()
        # A loop that dies without closing its run would otherwise leave the terminal without a cursor.
        weakref.finalize(self, self._progress.stop)


def describe_progress(effect: ShowProgress, state: TrainState) -> str:
    """Return what the display shows as one line.

    Example:
        >>> from noether import ShowProgress, TrainingIteration, TrainState
        >>> effect = ShowProgress(end=TrainingIteration(epoch=2, update=8, sample=64), fired=0, fires=4, update_s=0.5,
        ...                       next_s=1.0, left_s=3.0, due=True)
        >>> describe_progress(effect, TrainState().advance(samples=8).advance(samples=8))
        'update 2/8  epoch 0/2  sample 16/64  500.0 ms/update  2.0 updates/s  next in 0:00:01  end in 0:00:03'
    """
    following = [] if effect.next_s is None else [f"next in {format_duration(effect.next_s)}"]
    end = [] if effect.left_s is None else [f"end in {format_duration(effect.left_s)}"]
    counts = f"update {state.iteration.update}/{effect.end.update}  {_counts(effect, state)}"
    return "  ".join((counts, *_pace(effect), *following, *end))


def _to_the_end(effect: ShowProgress, state: TrainState, *, short: bool) -> str:
    end = [] if effect.left_s is None else [f"{format_duration(effect.left_s)} left"]
    counts = [] if short else [_counts(effect, state)]
    return "  ".join((*counts, *(_pace(effect)[:1] if short else _pace(effect)), *end))


def _counts(effect: ShowProgress, state: TrainState) -> str:
    names = ("epoch", "sample")
    return "  ".join(f"{name} {getattr(state.iteration, name)}/{getattr(effect.end, name)}" for name in names)


def _pace(effect: ShowProgress) -> list[str]:
    if not effect.update_s:
        return []
    return [f"{1000 * effect.update_s:.1f} ms/update", f"{1 / effect.update_s:.1f} updates/s"]
