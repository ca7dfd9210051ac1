"""`noether eval`: evaluates a checkpoint of a run."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from noether.cli.output import echo, make_console, print_panel
from noether.cli.ranks import announce_exit
from noether.core.callback import label_of, listens_to
from noether.core.effect import SaveCheckpoint
from noether.core.event import AtEval
from noether.core.file_names import escape_name
from noether.core.loop import dispatch
from noether.core.reducer import compose
from noether.core.tensors.stored_weights import find_weights, memory_of, name_in_tags
from noether.core.tensors.tree import clone_tensors
from noether.distributed.ranks import leave_at_end
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.console.run_panels import RunPanel
from noether.effects.console.tables import Table
from noether.effects.disk.files import os_error_text
from noether.effects.evaluation_logs import EvaluationLogs
from noether.effects.run_files import CHECKPOINTS
from noether.session.timing import Clock
from noether.training.data.interruptible import DataInterrupt, interruptible
from noether.training.experiment import build
from noether.training.runs.agreement import agree_to_start, ask_rank_0, join_ranks, load_tag
from noether.training.runs.directories import choose_weights, load_checkpoint, load_run_config
from noether.training.runs.evaluated_data import check_datasets, evaluate_on
from noether.training.runs.interruption import Interruption
from noether.training.runs.services import add_handlers, evaluation_services

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from noether.config import Config
    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.reducer import Reducer
    from noether.core.state import TrainState
    from noether.distributed.ranks import Ranks
    from noether.effects import Interpreter
    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.run_directory import Interpret
    from noether.effects.run_logs import LogService


@announce_exit()
@leave_at_end()
def evaluate(
    run_dir: Path,
    checkpoint: str,
    weights: str | None,
    settings: Sequence[str],
    allow: Sequence[str],
    data: Sequence[str] = (),
) -> int:
    """Evaluate a checkpoint with the callbacks of its run that iterate data; print and write the metrics.

    The command runs all effects that callbacks request at `AtEval`, except saves of checkpoints. It does not change or
    lock the run. If it cannot write to `eval/`, as in a run that is read-only, it warns and succeeds. A signal ends the
    evaluation at the next batch.

    Under torchrun, each rank evaluates its share of the data, and the metrics have the bits of one process; rank 0
    chooses the checkpoint, prints and writes.

    Args:
        run_dir: The run directory.
        checkpoint: A name of the checkpoint, as in `find_tag`.
        weights: Averaged weights to evaluate, such as `ema=0.999`, which a callback keeps in the checkpoint; the file
            of the metrics is then `eval/TAG.ema=0.999.json`, else `eval/TAG.json`. None for the training weights.
        settings: Overrides such as `data.val.split=test`.
        allow: Further prefixes of modules that `kind` may name.
        data: Datasets to evaluate in place of those that the callbacks name, one after the other, as `evaluate_on`
            says; the files are then named like `eval/TAG.test.json`.

    Returns:
        The exit code: 0, or that of the interruption.

    Raises:
        ConfigError: If `run_dir` is not the directory of a run, or the checkpoint, the weights or a dataset do not
            exist.
        CheckpointError: If the checkpoint is damaged, or contains none of the weights that its callbacks evaluate.
    """
    config = load_run_config(run_dir, settings, allow)
    ranks = join_ranks(config)
    experiment = build(config, run_id=run_dir.resolve().name, fresh=False, ranks=ranks)
    agree_to_start(experiment)
    data = tuple(dict.fromkeys(data))
    check_datasets(data, experiment)
    if not data and not listens_to(experiment.reducer, AtEval):
        raise config.error(
            ("callbacks",),
            "no callback evaluates data; add trainer.evaluate: {val: [loss], every_n_epochs: 1}, or give --data NAME",
        )
    reader = CheckpointReader(run_dir / CHECKPOINTS)
    manifest, saved = _load_on_ranks(run_dir, reader, checkpoint, ranks)
    state = _remember_averages(experiment.to_device(saved), manifest)
    state = state if weights is None else choose_weights(state, weights, reader)
    members = _drop_callbacks_without_weights(experiment.reducer, state)
    passes = {f".{escape_name(key)}": evaluate_on(members, key) for key in data} or {"": [compose(*members)]}
    if not any(listens_to(reducer, AtEval) for reducers in passes.values() for reducer in reducers):
        raise CheckpointError(
            f"nothing to evaluate: {manifest.tag} contains none of the weights that the callbacks evaluate"
        )
    name = manifest.tag if weights is None else f"{manifest.tag}.{name_in_tags(weights)}"
    services = _open_services(run_dir, config, weights or manifest.weights_of) if ranks.is_first else []
    interruption = Interruption(second_kills=True)
    with interruption, closing(experiment):
        time_s = ask_rank_0(ranks, "time of the evaluation", Clock().wall_s)
        event = AtEval(run=interruptible(experiment.run, interruption), time_s=time_s)
        for suffix, reducers in passes.items():
            logs = EvaluationLogs(run_dir, name + suffix, services=services)
            interpret = _without_checkpoints(add_handlers(logs.interpreter, config, logs.claim_folder, logs.services))
            with closing(logs):
                try:
                    for reducer in reducers:
                        dispatch(state, event, reducer, interpret)
                except DataInterrupt:
                    interruption.agree_on_reason(experiment.run.gather)
                    echo(f"interrupted in the evaluation of {name}{suffix}; its metrics were not written")
                    ask_rank_0(ranks, "the interruption is reported", lambda: None)
                    return interruption.exit_code
                if ranks.is_first:
                    _print_metrics(name + suffix, logs.metrics)
                    _write(logs)
    return 0


def _load_on_ranks(run_dir: Path, reader: CheckpointReader, name: str, ranks: Ranks) -> tuple[Manifest, TrainState]:
    """Return the checkpoint that a name means on rank 0, and its state."""
    loaded = load_checkpoint(reader, name) if ranks.is_first else None
    tag = ask_rank_0(ranks, "checkpoint", lambda: None if loaded is None else loaded[0].tag)
    return loaded or load_tag(run_dir, tag, ranks)


def _remember_averages(state: TrainState, manifest: Manifest) -> TrainState:
    """Return a state that remembers its params as averaged weights, if its checkpoint is of averaged weights."""
    if manifest.weights_of is None:
        return state
    averaged = {"params": state.params, "buffers": state.buffers}
    return state.remember(memory_of(manifest.weights_of), clone_tensors(averaged))


def _open_services(run_dir: Path, config: Config, weights: str | None) -> list[LogService]:
    """Return the log services of an evaluation, and warn of those that are not installed."""
    services, missing = evaluation_services(run_dir, config, weights)
    for service in missing:
        echo(f"Warning: {service} is not installed, so the evaluation is not logged there", err=True)
    return services


def _without_checkpoints(interpret: Interpreter) -> Interpret:
    """Return an interpreter that saves no checkpoint and warns instead: an evaluation does not change its run."""

    def run_others(effects: Effects, state: TrainState, event: Event) -> None:
        saves = [effect for effect in effects if isinstance(effect, SaveCheckpoint)]
        if saves:
            tags = ", ".join(dict.fromkeys(save.tag or str(state.iteration) for save in saves))
            echo(f"Warning: an evaluation saves no checkpoint, so the callbacks do not get {tags}", err=True)
        interpret([effect for effect in effects if not isinstance(effect, SaveCheckpoint)], state, event)

    return run_others


def _drop_callbacks_without_weights(reducer: Reducer, state: TrainState) -> list[Callback]:
    """Return the callbacks without those whose weights the checkpoint does not contain, and print their names."""
    known = (None, *find_weights(state))
    dropped = [member for member in reducer.members if getattr(member, "weights", None) not in known]
    for member in dropped:
        echo(f"{label_of(member)} is skipped: the checkpoint does not contain its weights")
    return [member for member in reducer.members if not any(member is each for each in dropped)]


def _write(logs: EvaluationLogs) -> None:
    """Write the metrics to a file and print its path, or warn that it cannot be written."""
    try:
        path = logs.write()
    except OSError as error:
        text = os_error_text(error)
        echo(f"Warning: the metrics above cannot be written to {logs.planned_path()}: {text}", err=True)
    else:
        echo(f"written to {path}")


def _print_metrics(tag: str, metrics: Mapping[str, Any]) -> None:
    rows = [(key, f"{value:.6g}" if isinstance(value, (int, float)) else str(value)) for key, value in metrics.items()]
    print_panel(RunPanel(title=tag, table=Table(("metric", "value"), rows)), make_console())
