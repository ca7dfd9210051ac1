"""What is asked of the outside: requests as data. Nothing here does anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from noether.core.iteration import TrainingIteration


@dataclass(frozen=True)
class Effect:
    """A request. Users add types of their own and register a handler for them with the interpreter."""


@dataclass(frozen=True)
class LogScalars(Effect):
    """Write `values` to every log.

    Args:
        values: Number or 0-dimensional tensor by metric key; a tensor is read only when it is written.
        quiet: Keys that are left out on the console.
    """

    values: Mapping[str, float | torch.Tensor]
    quiet: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True)
class LogText(Effect):
    """Write a line to the console."""

    text: str


@dataclass(frozen=True)
class SetSummary(Effect):
    """Set entries of the run's summary, the later value winning.

    Args:
        values: JSON value or 0-dimensional tensor by key.
    """

    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SaveCheckpoint(Effect):
    """Save the state under `tag` as a new checkpoint. Requests of one event for the same tag are merged.

    Args:
        tag: Name of the checkpoint; None stands for the iteration of the state.
        weights: Whether to save params and buffers.
        optimizer: Whether to save the optimizer's memory and the rest of the state, which together with the weights is
            what a resume needs.
        weights_of: Whose weights to save, such as `ema=0.999`; None stands for those in training.
        models: Names of sub-modules; only their weights are saved. Empty means all.
        pointers: Names that point to this checkpoint from now on, such as `latest`.
        retention: By name of who asks, how many of its newest checkpoints stay; None stands for all of them. A
            checkpoint goes when nobody who asked for it still keeps it and no pointer names it.
    """

    tag: str | None = None
    weights: bool = True
    optimizer: bool = True
    weights_of: str | None = None
    models: tuple[str, ...] = ()
    pointers: tuple[str, ...] = ()
    retention: Mapping[str, int | None] = field(default_factory=lambda: FrozenDict(default=None))


@dataclass(frozen=True, kw_only=True)
class SaveTensors(Effect):
    """Write tensors to `tensors/{name}.safetensors` in the run's directory.

    Args:
        name: Path below that directory, such as `outputs/E1_U100_S800`.
        tensors: Tensor by name.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MeasurePeakMemory(Effect):
    """Log the peak memory since the last request for `key`. It goes to the logs only: no callback can consume it.

    Args:
        key: Metric key, in bytes.
    """

    key: str = "memory/peak_bytes"


@dataclass(frozen=True, kw_only=True)
class ShowProgress(Effect):
    """Show how far the run is: a live display on a terminal; elsewhere a line where `due`, and else nothing.

    Args:
        end: The run's last iteration.
        fired: Updates completed at the last firing of the callback whose interval is shown.
        fires: Updates completed at its next firing; None if it does not fire again.
        update_s: Mean seconds of an update, or None where it is not known yet.
        next_s: Seconds to the next firing, or None.
        left_s: Seconds to the end, or None.
        due: Whether the interval is due now.
    """

    end: TrainingIteration
    fired: int
    fires: int | None
    update_s: float | None
    next_s: float | None
    left_s: float | None
    due: bool


def format_duration(seconds: float) -> str:
    """Return a duration as `h:mm:ss`, whole seconds.

    Example:
        >>> format_duration(3661.5)
        '1:01:01'
    """
    return str(timedelta(seconds=int(seconds)))
