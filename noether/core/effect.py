"""Effects: requests to the outside world, as data. An interpreter runs them."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  # cattrs reads the annotations of SaveCheckpoint
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch

    from noether.core.event import AfterUpdate
    from noether.core.iteration import Counter, TrainingIteration


@dataclass(frozen=True)
class Effect:
    """A request as data. To add one, subclass this and register a handler `(effect, state, event)`.

    In YAML, `run.handlers: {my_module.Ring: my_module.ring_bell}` names the type and its handler; in Python,
    `directory.interpreter.with_handlers(Ring, ring_bell)` returns the interpreter to pass on. A handler in YAML may
    have the keyword parameters `directory`, the path of the run (of the evaluation for `noether eval`), and `services`,
    the log services in use by name (`tensorboard`, `wandb`). If a callback declares `effects = (Ring,)`, no run starts
    without a handler. For those that do not, `noether validate` and `noether train` call them a few times, the latter
    only if there is a type of effect without a handler.

    Example:
        >>> from noether.core.callbacks.base import CallbackBase
        >>> @dataclass(frozen=True)
        ... class Ring(Effect):
        ...     times: int
        >>> class Bell(CallbackBase):
        ...     effects = (Ring,)
        ...     def after_epoch(self, state, event):
        ...         return state, (Ring(state.iteration.epoch),)
        >>> def ring_bell(effect, state, event, *, directory):
        ...     (directory / "bell.txt").write_text("ding " * effect.times)
    """


@dataclass(frozen=True)
class LogScalars(Effect):
    """Write `values` to every log.

    Args:
        values: Number or 0-dimensional tensor by metric key; a tensor is read only when it is written.
        quiet: Keys that the console leaves out.
    """

    values: Mapping[str, float | torch.Tensor]
    quiet: frozenset[str] = field(default=frozenset(), repr=False)


class UpdateScalars(NamedTuple):
    """Scalars of one of several updates: a row of `LogUpdates`.

    Args:
        iteration: The iteration after the update.
        event: Its event, without outputs and gradients.
        values: Number or 0-dimensional tensor by metric key. Rows with equal values should share one object, because
            logs read and encode each object only once.
    """

    iteration: TrainingIteration
    event: AfterUpdate
    values: Mapping[str, float | torch.Tensor]


@dataclass(frozen=True)
class DeferredLog(Effect):
    """Base class of the effects that log deferred updates; a callback may request no others for such updates."""


@dataclass(frozen=True)
class LogUpdates(DeferredLog):
    """Write scalars of several updates to every log: a line for each, as `LogScalars` at each of them would have.

    Only a callback that is called once for several updates requests it; see `noether.core.stretch`.

    Args:
        rows: The scalars of each update, in the order of the updates.
        quiet: Keys that the console leaves out.

    Example:
        >>> from noether import AfterUpdate, TrainingIteration
        >>> from noether.core.tensors.tree import FrozenDict
        >>> values = FrozenDict({"optim/lr": 0.1})
        >>> at = [TrainingIteration(update=update) for update in (1, 2)]
        >>> effect = LogUpdates(tuple(UpdateScalars(each, AfterUpdate(samples=4), values) for each in at))
        >>> [(row.iteration.update, row.values["optim/lr"]) for row in effect.rows]
        [(1, 0.1), (2, 0.1)]
    """

    rows: tuple[UpdateScalars, ...]
    quiet: frozenset[str] = field(default=frozenset(), repr=False)

    def scalars_of(self, row: UpdateScalars) -> LogScalars:
        """Return the effect that logs one of the rows at its update."""
        return LogScalars(row.values, self.quiet.intersection(row.values))


@dataclass(frozen=True, repr=False)
class LogText(Effect):
    """Write a line to the console; with a key, write a text to a file of the run instead, as an artifact.

    Args:
        text: The text.
        key: Name of the artifact; empty for a line on the console.
        is_progress: Whether the line says how far the run is; a terminal leaves it out while a live display says it.

    Example:
        >>> LogText("training begins"), LogText("37 samples are mislabelled", key="data/report")
        (LogText(text='training begins'), LogText(text='37 samples are mislabelled', key='data/report'))
    """

    kind: ClassVar[str] = "text"
    text: str
    key: str = ""
    is_progress: bool = False

    def __repr__(self) -> str:
        key = f", key={self.key!r}" if self.key else ""
        return f"LogText(text={self.text!r}{key}{', is_progress=True' if self.is_progress else ''})"


@dataclass(frozen=True)
class LogUpdateText(DeferredLog):
    """Write a line to the console for one of several updates, as the `LogText` at that update would have.

    Only a callback that is called once for several updates requests it; see `noether.core.stretch`. The line comes
    before the metrics of its update, and after those of earlier updates. Handlers of `LogText` write it.

    Args:
        iteration: The iteration after the update.
        event: Its event, without outputs and gradients.
        text: The line, which has no key.
    """

    iteration: TrainingIteration
    event: AfterUpdate
    text: LogText


@dataclass(frozen=True)
class SetSummary(Effect):
    """Set entries of the run's summary; a later value replaces an earlier one.

    Args:
        values: JSON value or 0-dimensional tensor by key.
    """

    values: Mapping[str, Any]


def _keep_all() -> Mapping[str, int | None]:
    from noether.core.tensors.tree import FrozenDict  # it imports torch, which reading a manifest does without

    return FrozenDict(default=None)


@dataclass(frozen=True, kw_only=True)
class SaveCheckpoint(Effect):
    """Save the state under `tag` as a new checkpoint. Requests of one event for the same tag are merged.

    Args:
        tag: Name of the checkpoint; None for the iteration of the state.
        weights: Whether to save params and buffers.
        optimizer: Whether to save the optimizer's memory and the rest of the state; a resume needs them and the
            weights.
        weights_of: Which stored weights to save, such as `ema=0.999`; None for the weights in training.
        models: Names of sub-modules whose weights are saved; empty for all.
        pointers: Names that point to this checkpoint from now on, such as `latest`.
        retention: Number of newest checkpoints to keep for each requester, by its name; None keeps all. The store
            deletes a checkpoint once no requester keeps it and no pointer names it.
        event_saves: All checkpoints that its event requests, in the order in which they are saved. `merge_effects`
            sets it: a checkpoint to resume from records them, and a resume completes what a crash prevented.
    """

    tag: str | None = None
    weights: bool = True
    optimizer: bool = True
    weights_of: str | None = None
    models: tuple[str, ...] = ()
    pointers: tuple[str, ...] = ()
    retention: Mapping[str, int | None] = field(default_factory=_keep_all)
    event_saves: tuple[SaveCheckpoint, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class SaveTensors(Effect):
    """Write tensors to `tensors/{name}.safetensors` in the run's directory.

    Args:
        name: Path below that directory, such as `outputs/E1_U100_S800`. Characters other than letters, digits and
            `_-=.` are escaped in it, and so is what would lead out of the directory: see `escape_path`.
        tensors: Tensor by name.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MeasurePeakMemory(Effect):
    """Log the peak memory since the last request for `key`. Only logs receive it: no callback can consume it.

    Args:
        key: Metric key, in bytes.
    """

    key: str = "memory/peak_bytes"


@dataclass(frozen=True, kw_only=True)
class ShowProgress(Effect):
    """Show the progress of the run: as a live display on a terminal, elsewhere as a line if `due`.

    Args:
        end: The run's last iteration; None if unknown.
        fired: Updates completed at the last firing of the callback whose interval is shown.
        fires: Updates completed at its next firing; None if it does not fire again.
        update_s: Mean seconds of an update; None if not known yet.
        next_s: Seconds to the next firing, or None.
        left_s: Seconds to the end, or None.
        due: Whether the interval is due now.
    """

    end: TrainingIteration | None
    fired: int
    fires: int | None
    update_s: float | None
    next_s: float | None
    left_s: float | None
    due: bool


def format_count(name: Counter, iteration: TrainingIteration, end: TrainingIteration | None) -> str:
    """Return a count with its end, if that is known.

    Example:
        >>> from noether import TrainingIteration
        >>> at, end = TrainingIteration(update=2), TrainingIteration(update=8)
        >>> format_count("update", at, end), format_count("update", at, None)
        ('update 2/8', 'update 2')
    """
    count = f"{name} {getattr(iteration, name)}"
    return count if end is None else f"{count}/{getattr(end, name)}"
