"""The panel at the start of a run: model, data, device, optimizer, the end of the run, and when callbacks act."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from noether.core.callback import declaration_of, label_of
from noether.core.callbacks.summaries import dataset_lengths, param_counts
from noether.core.estimates import known_end
from noether.core.iteration import COUNTERS
from noether.core.reducer import Reducer
from noether.core.schedules.schedule import EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.schedules.window import ALWAYS
from noether.core.tensors.module import device_of
from noether.core.text import count_of
from noether.effects.console.run_panels import RunPanel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from noether.core.callback import Callback
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.state import TrainState

_MAX_CALLBACKS: Final = 24
_INTERVALS: Final = {EveryNEpochs: "epoch", EveryNUpdates: "update", EveryNSamples: "sample"}


def describe_start(title: str, facts: Mapping[str, Sequence[str]]) -> RunPanel:
    """Return the panel at the start of a process that trains a run, without the facts that have no entry."""
    return RunPanel(title=title, facts=[(name, each) for name, each in facts.items() if each])


def describe_model(kind: str, state: TrainState, run: Run) -> str:
    """Return the kind of a model, and how many of its parameters are trained and frozen."""
    counts = param_counts(state.params, run.frozen)
    trainable, frozen = counts["params/trainable"], counts["params/frozen"]
    return f"{kind}, {count_of(trainable, 'parameter', form=',')}" + (f", and {frozen:,} frozen" if frozen else "")


def describe_data(run: Run) -> list[str]:
    """Return each dataset with its number of samples; of the training data, the samples of an epoch.

    Example:
        >>> from noether import Run
        >>> describe_data(Run(samples_per_epoch=1205, data={"val": range(296)}))
        ['train 1,205 samples', 'val 296 samples']
    """
    lengths: dict[str, int] = {}
    with suppress(Exception):  # raised by a user's dataset, or by batches whose size is not known
        lengths = {name.removeprefix("samples/"): length for name, length in dataset_lengths(run).items()}
    if "samples_per_epoch" in vars(run):
        lengths = {"train": run.samples_per_epoch, **lengths}
    return [f"{name} {count_of(length, 'sample', form=',')}" for name, length in lengths.items()]


def describe_device(state: TrainState, world_size: int, how: str = "") -> str:
    """Return the device of a state, and the number of ranks if there are several.

    Args:
        state: The state.
        world_size: The number of ranks.
        how: Text after the number of ranks that says how they divide the work, such as ` (shard)`.
    """
    on = f" on each of {world_size} ranks{how}" if world_size > 1 else ""
    return f"{device_of(state.params.values())}{on}"


def describe_updates(run: Run) -> str:
    """Return the effective batch size as text, such as `updates of 32 samples`."""
    return f"updates of {count_of(run.effective_batch_size, 'sample', form=',')}"


def describe_end(run: Run) -> str:
    """Return the end of a run in epochs, updates and samples, or in those of the three that are known.

    Example:
        >>> from noether import Run, TrainingIteration
        >>> describe_end(Run(end=TrainingIteration(epoch=2)))
        '2 epochs'
        >>> describe_end(Run())
        'where a callback stops the run, or its loop ends'
    """
    if "end" not in vars(run):
        return "where a callback stops the run, or its loop ends"
    end = known_end(run) or run.end
    return " = ".join(count_of(getattr(end, name), name, form=",") for name in COUNTERS if getattr(end, name))


def describe_position(iteration: TrainingIteration, run: Run) -> str:
    """Return an iteration, and the completed share of the run in percent if its end is known."""
    final = known_end(run)
    share = f", {100 * iteration.update / final.update:.0f} % of the run" if final is not None and final.update else ""
    return f"{iteration}{share}"


def describe_callbacks(members: Iterable[Callback], where: str = "") -> list[str]:
    """Return a short line for each callback: its name, and when it acts.

    Args:
        members: The callbacks.
        where: Text after the number of callbacks that are left out, such as `, which noether plan shows`.

    Example:
        >>> from noether import CheckpointCallback, OnlineLossCallback
        >>> describe_callbacks([OnlineLossCallback(every_n_epochs=1), CheckpointCallback(every_n_updates=500)])
        ['OnlineLossCallback every epoch', 'CheckpointCallback every 500 updates']
    """
    listed = [inner for each in members for inner in (each.members if isinstance(each, Reducer) else (each,))]
    return limit_lines([_describe_callback(each) for each in listed], _MAX_CALLBACKS, "more callback", where)


def limit_lines(lines: Sequence[str], limit: int, what: str, where: str = "") -> list[str]:
    """Return at most `limit` lines, and one that counts the others.

    Args:
        lines: The lines.
        limit: The number of lines that are returned whole.
        what: A noun for one of the other lines, such as `more warning`.
        where: Text after their number that says where to see them.
    """
    more = len(lines) - limit
    return list(lines) if more <= 0 else [*lines[:limit], f"and {count_of(more, what)}{where}"]


def _describe_callback(callback: Callback) -> str:
    gate, name = declaration_of(callback).gate, label_of(callback)
    if gate is None:
        return name
    for member in gate.schedule.members:
        name = name.replace(f"/{member}", "", 1)
    when = " and ".join(_describe_schedule(member) for member in gate.schedule.members)
    return f"{name.replace('/', ' ', 1)} {when}" + (" and at the end" if gate.at_end else "")


def _describe_schedule(member: object) -> str:
    for kind, unit in _INTERVALS.items():
        if isinstance(member, kind) and member.window is ALWAYS:
            return f"every {unit}" if member.n == 1 else f"every {member.n:,} {unit}s"
    return str(member).replace("_", " ", 1)
