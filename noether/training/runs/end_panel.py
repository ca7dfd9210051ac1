"""What the panel at the end of a run says: best and last metrics, time per phase, checkpoints, and next commands."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Any, Final

from noether.config.schema import ENDS
from noether.core.callback import declaration_of, leaves_of, listens_to
from noether.core.callbacks.best_checkpoint import BestCheckpointCallback
from noether.core.callbacks.improvement import MetricWatcher
from noether.core.effect import format_duration
from noether.core.event import AtEval
from noether.core.file_names import best_pointer
from noether.core.metrics import keys_overlap
from noether.core.text import count_of, format_bytes
from noether.effects.console.columns import repeats_single_loss
from noether.effects.console.run_panels import RunPanel, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.iteration import TrainingIteration
    from noether.core.reducer import Reducer
    from noether.core.state import TrainState
    from noether.training.experiment import Experiment
    from noether.training.runs.execution import TrainedRun

_MAX_METRICS: Final = 12
_MINUTE_S: Final = 60.0
_PHASES: Final = {"step_s": "steps", "data_s": "waiting for data", "evaluation_s": "evaluation", "saving_s": "saving"}
_STYLES: Final = {"finished": "green", "stopped": "green", "interrupted": "yellow"}
_DERIVED: Final = ("/best", "/best_update")
_SIDE_METRICS: Final = ("optim/", "train_time/", "memory/", "lossdiff/")


def describe_end(
    run: TrainedRun,
    experiment: Experiment,
    begin: TrainingIteration,
    phases: Mapping[str, Any],
    summary: Mapping[str, Any],
    pointers: Mapping[str, str],
    *,
    allow: Sequence[str] = (),
) -> RunPanel:
    """Return the panel at the end of a process that trained a run.

    Args:
        run: The run.
        experiment: The same run, as it was built.
        begin: Where this process began.
        phases: Its seconds per phase, as `PhaseTimes.read` returns them.
        summary: The entries of the summary.
        pointers: The tag that each pointer to a checkpoint names.
        allow: Prefixes of modules that `kind` may name, for the commands.
    """
    state = run.state
    done = state.iteration
    facts = {
        "directory": [str(run.directory)],
        "saved": [] if run.finished else [describe_saved(pointers)],
        "stopped by": [state.stopped_by] if run.finished and state.stopped_by else [],
        "training": [_describe_speed(phases, done.sample - begin.sample)],
        "time": describe_phases(phases),
        "checkpoints": describe_pointers(pointers),
        "last values": describe_last_values(state, experiment.reducer),
    }
    return RunPanel(
        title=run.ending,
        facts=[(name, each) for name, each in facts.items() if each],
        table=tabulate_best(state, experiment.reducer, summary, pointers),
        commands=suggest_commands(run, experiment, pointers, allow),
        style=_STYLES[run.status],
    )


def describe_saved(pointers: Mapping[str, str]) -> str:
    """Return the checkpoint of an interrupted run."""
    tag = pointers.get("latest")
    if tag is None:
        return "nothing: the first update was not completed"
    return f"checkpoint {tag}, which the pointer latest names"


def format_seconds(seconds: float) -> str:
    """Return a duration: in seconds below a minute, then as `h:mm:ss`.

    Example:
        >>> format_seconds(0.0312), format_seconds(12.34), format_seconds(75)
        ('0.03 s', '12.3 s', '0:01:15')
    """
    if seconds >= _MINUTE_S:
        return format_duration(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def _describe_speed(phases: Mapping[str, Any], samples: int) -> str:
    updates, total_s = phases["updates"], phases["total_s"]
    counts = [count_of(updates, "update", form=","), count_of(samples, "sample", form=",")]
    text = f"{', '.join(counts)} in {format_seconds(total_s)}"
    rates = f" ({updates / total_s:,.1f} updates/s, {samples / total_s:,.0f} samples/s)" if updates and total_s else ""
    return f"{text}{rates}, {format_bytes(phases['peak_bytes'])} of memory at most"


def describe_phases(phases: Mapping[str, Any]) -> list[str]:
    """Return the phases of a run with their seconds and shares, the longest first.

    Example:
        >>> times = {"total_s": 10.0, "step_s": 7.0, "data_s": 0.0, "evaluation_s": 2.5, "saving_s": 0.0}
        >>> describe_phases(times)
        ['steps 7.0 s (70 %)', 'evaluation 2.5 s (25 %)', 'callbacks and other 0.50 s (5 %)']
    """
    total_s = phases["total_s"]
    times = {label: phases.get(name) or 0.0 for name, label in _PHASES.items()}
    times["callbacks and other"] = max(total_s - sum(times.values()), 0.0)
    if not total_s:
        return []
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return [f"{label} {format_seconds(each)} ({100 * each / total_s:.0f} %)" for label, each in ordered if each]


def describe_pointers(pointers: Mapping[str, str]) -> list[str]:
    """Return the checkpoints that pointers name, each with its pointers.

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
    """Return a table of the metrics that callbacks watch: the last and the best value, and its checkpoint.

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

    Those of the optimizer, of times and of differences are left out, and those that the console does not show.
    """
    leaves = leaves_of(reducer)
    watched = {each.metric_key for each in leaves if isinstance(each, MetricWatcher)}
    declared = [declaration_of(each) for each in leaves if getattr(each, "verbose", None) is False]
    quiet = [pattern for each in declared for pattern in each.produces or ()]
    values = {key: measured.value for key, measured in state.metrics.items()}
    keys = [
        key
        for key in values
        if key not in watched and not key.endswith(_DERIVED) and not key.startswith(_SIDE_METRICS)
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
    """Return the best value of a metric, where it was measured, and the pointer to a checkpoint of it."""
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


def suggest_commands(
    run: TrainedRun, experiment: Experiment, pointers: Mapping[str, str], allow: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return the commands that make sense after a run, by what they do."""
    path = str(run.directory)
    allowed = [word for prefix in allow for word in ("--allow", prefix)]
    commands = {"show": ["noether", "show", path], "report": ["noether", "report", path, "--to", "report.html"]}
    evaluated = _evaluate(experiment, pointers)
    if evaluated is not None:
        commands = {"evaluate": ["noether", "eval", path, *evaluated, *allowed], **commands}
    if run.finished and pointers:
        commands["continue"] = ["noether", "train", "--resume", path, *_continue(run, experiment), *allowed]
    return [(name, shlex.join(command)) for name, command in commands.items()]


def _evaluate(experiment: Experiment, pointers: Mapping[str, str]) -> list[str] | None:
    """Return the options that evaluate the best checkpoint on test data; None if nothing can be evaluated."""
    has_test = "test" in experiment.run.data
    if not pointers or not (has_test or listens_to(experiment.reducer, AtEval)):
        return None
    best = next((name for name in pointers if name.startswith("best_model.")), None)
    options = [] if best is None else ["--checkpoint", best]
    return [*options, *(["--data", "test"] if has_test else [])]


def _continue(run: TrainedRun, experiment: Experiment) -> list[str]:
    if run.state.stop is not None and not run.state.iteration.reached(experiment.run.end):
        return ["--continue"]
    trainer = experiment.config.trainer
    name = next(name for name in ENDS if getattr(trainer, name) is not None)
    return ["--set", f"trainer.{name}={2 * getattr(trainer, name)}"]
