"""The panel at the end of a run: best and last metrics, time per phase, checkpoints, and commands to run next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import declaration_of, leaves_of
from noether.core.callbacks.best_checkpoint import BestCheckpointCallback
from noether.core.callbacks.improvement import MetricWatcher
from noether.core.file_names import best_pointer
from noether.core.metric_keys import keys_overlap
from noether.core.text import count_of, format_bytes, format_seconds
from noether.effects.console.columns import SIDE_METRICS, repeats_single_loss
from noether.effects.console.run_panels import RunPanel
from noether.effects.console.tables import Table
from noether.session.phase_texts import describe_phases

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from noether.core.iteration import TrainingIteration
    from noether.core.reducer import Reducer
    from noether.core.state import TrainState
    from noether.effects.run_ending import Status

_MAX_METRICS: Final = 12
_STYLES: Final = {"finished": "green", "stopped": "green", "interrupted": "yellow", "failed": "red"}
_DERIVED: Final = ("/best", "/best_update")


@final
@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a process that trained a run ended.

    Args:
        directory: The run directory.
        status: How the run ended.
        ending: Where and why it ended, as one line.
        begin: The iteration at which the process began.
        state: The state in which it ended.
        reducer: The callbacks.
        phases: Seconds of this process per phase, as `PhaseTimes.read` returns them.
    """

    directory: Path
    status: Status
    ending: str
    begin: TrainingIteration
    state: TrainState
    reducer: Reducer
    phases: Mapping[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether the run reached its end, or a callback stopped it."""
        return self.status in {"finished", "stopped"}


def describe_end(
    end: RunEnd,
    summary: Mapping[str, Any],
    pointers: Mapping[str, str],
    commands: Sequence[tuple[str, str]],
) -> RunPanel:
    """Return the panel at the end of a process that trained a run.

    Args:
        end: How the process ended.
        summary: The entries of the summary.
        pointers: The tag that each pointer to a checkpoint names.
        commands: What to run next, by what it does.
    """
    state = end.state
    facts = {
        "directory": [str(end.directory)],
        "saved": [] if end.is_complete else [describe_saved(pointers, state.iteration)],
        "stopped by": [state.stopped_by] if end.is_complete and state.stopped_by else [],
        "training": [_describe_speed(end.phases, state.iteration.sample - end.begin.sample)],
        "time": describe_phases(end.phases),
        "checkpoints": describe_pointers(pointers),
        "last values": describe_last_values(state, end.reducer),
    }
    return RunPanel(
        title=end.ending,
        facts=[(name, each) for name, each in facts.items() if each],
        table=tabulate_best(state, end.reducer, summary, pointers),
        commands=commands,
        style=_STYLES[end.status],
    )


def describe_saved(pointers: Mapping[str, str], at: TrainingIteration) -> str:
    """Return text that names the checkpoint from which an interrupted run resumes, or says why there is none."""
    tag = pointers.get("latest")
    if tag is not None:
        return f"checkpoint {tag}, which the pointer latest names"
    return "nothing: no update was completed" if at.update == 0 else "nothing from which the run could resume"


def _describe_speed(phases: Mapping[str, Any], samples: int) -> str:
    updates, total_s = phases["updates"], phases["total_s"]
    counts = [count_of(updates, "update", form=","), count_of(samples, "sample", form=",")]
    text = f"{', '.join(counts)} in {format_seconds(total_s)}"
    rates = f" ({updates / total_s:,.1f} updates/s, {samples / total_s:,.0f} samples/s)" if updates and total_s else ""
    return f"{text}{rates}, peak memory {format_bytes(phases['peak_bytes'])}"


def describe_pointers(pointers: Mapping[str, str]) -> list[str]:
    """Return a line for each checkpoint that a pointer names, with its pointers.

    Example:
        >>> describe_pointers({"latest": "E2_U8_S32", "last": "E2_U8_S32", "best_model.val.loss": "E1_U4_S16"})
        ['E2_U8_S32: latest, last', 'E1_U4_S16: best_model.val.loss']
    """
    by_tag: dict[str, list[str]] = {}
    for name, tag in pointers.items():
        by_tag.setdefault(tag, []).append(name)
    return [f"{tag}: {', '.join(names)}" for tag, names in by_tag.items()]


def tabulate_best(
    state: TrainState, reducer: Reducer, summary: Mapping[str, Any], pointers: Mapping[str, str]
) -> Table | None:
    """Return a table of the metrics that callbacks watch: last and best value, and the checkpoint of the best.

    Args:
        state: The state, with the last value of each metric.
        reducer: The callbacks.
        summary: The entries of the summary, which has best values.
        pointers: The tag that each pointer to a checkpoint names.
    """
    watchers = [each for each in leaves_of(reducer) if isinstance(each, MetricWatcher)]
    keys = dict.fromkeys(each.metric_key for each in watchers)
    rows = [(key, _last_value(state, key), *_find_best(key, watchers, state, summary, pointers)) for key in keys]
    measured = [row for row in rows if any(row[1:])]
    return Table(("metric", "last", "best", "at", "checkpoint"), measured) if measured else None


def describe_last_values(state: TrainState, reducer: Reducer) -> list[str]:
    """Return the last value of each metric that no callback watches, losses first.

    Metrics about training itself (`SIDE_METRICS`) and those that the console does not show are left out.

    Args:
        state: The state, with the last value of each metric.
        reducer: The callbacks.

    Returns:
        At most twelve lines, and one that counts the other metrics.
    """
    leaves = leaves_of(reducer)
    watched = {each.metric_key for each in leaves if isinstance(each, MetricWatcher)}
    declared = [declaration_of(each) for each in leaves if getattr(each, "verbose", None) is False]
    quiet = [pattern for each in declared for pattern in each.produces or ()]
    values = {key: measured.value for key, measured in state.metrics.items()}
    keys = [
        key
        for key in values
        if key not in watched and not key.endswith(_DERIVED) and not key.startswith(SIDE_METRICS)
        if not any(keys_overlap(pattern, key) for pattern in quiet)
        if not repeats_single_loss(key, values)
    ]
    keys.sort(key=lambda key: not key.startswith("loss/"))
    lines = [f"{key} {_format(values[key])}" for key in keys[:_MAX_METRICS]]
    more = len(keys) - len(lines)
    return [*lines, f"and {count_of(more, 'more metric')}"] if more else lines


def _find_best(
    key: str,
    watchers: Sequence[MetricWatcher],
    state: TrainState,
    summary: Mapping[str, Any],
    pointers: Mapping[str, str],
) -> tuple[str, str, str]:
    """Return the best value of a metric, its iteration, and the pointer to its checkpoint, each as text."""
    pointer = best_pointer(key)
    best, at = summary.get(f"{key}/best"), summary.get(f"{key}/best_at")
    tag = pointers.get(pointer, "")
    if best is None:
        saving = [each for each in watchers if isinstance(each, BestCheckpointCallback) and each.metric_key == key]
        memories = [state.callback_states.get(each.name) or {} for each in saving]
        best, at = next((memory.get("best") for memory in memories), None), at or tag.partition(".")[0]
    if not tag:
        return _format(best), str(at or ""), ""
    is_same = tag.partition(".")[0] == at
    return _format(best), str(at or ""), pointer if is_same else f"{pointer} ({tag})"


def _last_value(state: TrainState, key: str) -> str:
    measured = state.metrics.get(key)
    return "" if measured is None else _format(measured.value)


def _format(value: Any) -> str:
    if value is None:
        return ""
    number = float(value)
    return f"{number:.5g}" if math.isfinite(number) else str(number)
