"""The live display of a terminal: two bars, to the end of the run and to the next firing."""

from __future__ import annotations

import os
import sys
import time
import weakref
from typing import TYPE_CHECKING, Final

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from noether.core.duration import clock

if TYPE_CHECKING:
    from rich.console import Console

    from noether.core.effect import ShowProgress
    from noether.core.state import TrainState

_REFRESH_S: Final = 0.1
_LOGGED: Final = ("CI", "SLURM_JOB_ID")


def is_live(console: Console) -> bool:
    """Return whether somebody watches `console`: a terminal, and not the log of a CI or of a batch job."""
    if any(os.environ.get(name) for name in _LOGGED):
        return False
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


class LiveProgress:
    """Redraws two lines at the bottom of a terminal, ten times a second at most.

    Args:
        console: Where other lines are printed, too: they appear above.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[said]}"),
            console=console,
            transient=True,
            # What goes to a file or a pipe stays on its way there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._tasks: tuple[TaskID, TaskID] | None = None
        self._shown_s = 0.0
        # A loop that dies without closing its run would otherwise leave the terminal without a cursor.
        weakref.finalize(self, self._progress.stop)

    def show(self, effect: ShowProgress, state: TrainState) -> None:
        """Redraw, unless that was just done."""
        now_s = time.monotonic()
        if self._tasks is not None and now_s - self._shown_s < _REFRESH_S:
            return
        self._shown_s = now_s
        if self._tasks is None:
            self._tasks = (self._progress.add_task("run ", said=""), self._progress.add_task("next", said=""))
            self._progress.start()
        run, following = self._tasks
        update = state.iteration.update
        self._progress.update(run, completed=update, total=effect.end.update, said=_to_the_end(effect, state))
        total = 0 if effect.fires is None else effect.fires - effect.fired
        since = update - effect.fired
        said = "" if effect.next_s is None else f"in {clock(effect.next_s)}"
        self._progress.update(following, completed=since, total=total, said=said, visible=bool(total))

    def stop(self) -> None:
        """Take the display away; it comes back when it is shown again."""
        if self._tasks is not None:
            self._progress.stop()
            for task in self._tasks:
                self._progress.remove_task(task)
            self._tasks = None


def described(effect: ShowProgress, state: TrainState) -> str:
    """Return what the display shows as one line.

    Example:
        >>> from noether import ShowProgress, TrainingIteration, TrainState
        >>> effect = ShowProgress(end=TrainingIteration(epoch=2, update=8, sample=64), fired=0, fires=4, update_s=0.5,
        ...                       next_s=1.0, left_s=3.0, due=True)
        >>> described(effect, TrainState().advance(samples=8).advance(samples=8))
        'update 2/8  epoch 0/2  sample 16/64  500.0 ms/update  2.0 updates/s  next in 0:00:01  end in 0:00:03'
    """
    following = [] if effect.next_s is None else [f"next in {clock(effect.next_s)}"]
    end = [] if effect.left_s is None else [f"end in {clock(effect.left_s)}"]
    counts = f"update {state.iteration.update}/{effect.end.update}  {_counts(effect, state)}"
    return "  ".join((counts, *_pace(effect), *following, *end))


def _to_the_end(effect: ShowProgress, state: TrainState) -> str:
    end = [] if effect.left_s is None else [f"{clock(effect.left_s)} left"]
    return "  ".join((_counts(effect, state), *_pace(effect), *end))


def _counts(effect: ShowProgress, state: TrainState) -> str:
    names = ("epoch", "sample")
    return "  ".join(f"{name} {getattr(state.iteration, name)}/{getattr(effect.end, name)}" for name in names)


def _pace(effect: ShowProgress) -> list[str]:
    if not effect.update_s:
        return []
    return [f"{1000 * effect.update_s:.1f} ms/update", f"{1 / effect.update_s:.1f} updates/s"]
