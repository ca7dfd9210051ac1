"""Whether a console is an interactive terminal, and the progress of a run as one line for any other console."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from noether.core.effect import format_count
from noether.core.text import format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from noether.core.effect import ShowProgress
    from noether.core.state import TrainState

_UNATTENDED: Final = ("CI", "SLURM_JOB_ID")  # environment variables of jobs whose terminal is a log


def is_interactive(console: Console) -> bool:
    """Return whether `console` is an interactive terminal, and not the log of a CI or batch job."""
    if any(os.environ.get(name) for name in _UNATTENDED):
        return False
    if console.legacy_windows or console.is_jupyter:
        return False
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def describe_progress(effect: ShowProgress, state: TrainState) -> str:
    """Return progress as one line.

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
    return "  ".join((updates, *_counts(effect, state), *_describe_rate(effect), *next_firing, *end))


def _counts(effect: ShowProgress, state: TrainState) -> list[str]:
    return [format_count("epoch", state.iteration, effect.end), format_count("sample", state.iteration, effect.end)]


def _describe_rate(effect: ShowProgress) -> list[str]:
    if not effect.update_s:
        return []
    return [f"{1000 * effect.update_s:.1f} ms/update", f"{1 / effect.update_s:.1f} updates/s"]
