"""`noether eval`: evaluates a checkpoint of a run."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from noether.cli.output import echo, printable
from noether.config import ConfigError
from noether.config.errors import LocatedProblem, Place
from noether.core.callback import label_of, listens_to
from noether.core.effect import LogScalars, LogText, MeasurePeakMemory, SaveTensors, SetSummary, ShowProgress
from noether.core.errors import WeightsError
from noether.core.event import AtEval
from noether.core.loop import dispatch
from noether.core.reducer import compose
from noether.core.tensors.stored_weights import find_weights, memory_of, name_in_tags, use_weights
from noether.core.tensors.tree import clone_tensors
from noether.effects import CheckpointError, CheckpointStore, Interpreter
from noether.effects.disk.encoding import to_plain
from noether.effects.disk.files import make_directories, os_error_text, replace_text
from noether.training.data.interruptible import DataInterrupt, interruptible
from noether.training.experiment import build
from noether.training.runs.directories import load_run_config
from noether.training.runs.interruption import Interruption
from noether.training.runs.services import add_handlers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from noether.core.reducer import Reducer
    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest


def evaluate(run_dir: Path, checkpoint: str, weights: str | None, settings: Sequence[str], allow: Sequence[str]) -> int:
    """Evaluate a checkpoint with the data iterators of its run; print the metrics and write `eval/TAG.json`.

    Where the file cannot be written, as in a run that is read-only, a warning says so and the command succeeds. A
    signal ends the evaluation at the next batch. Returns the exit code.

    Args:
        run_dir: The run directory.
        checkpoint: Tag of the checkpoint, or a pointer.
        weights: Averaged weights to evaluate, such as `ema=0.999`, which a callback keeps in the checkpoint; the file
            is then `eval/TAG.ema=0.999.json`. None for the training weights.
        settings: Overrides such as `data.val.split=test`.
        allow: Further prefixes of modules that `kind` may name.

    Raises:
        ConfigError: If `run_dir` is not the directory of a run, or the checkpoint or the weights do not exist.
        CheckpointError: If the checkpoint is damaged, or contains none of the weights that its callbacks evaluate.
    """
    config = load_run_config(run_dir, settings, allow)
    experiment = build(config, run_id=run_dir.resolve().name, fresh=False)
    if not listens_to(experiment.reducer, AtEval):
        raise config.error(
            ("callbacks",), "no callback evaluates data; add trainer.evaluate: {val: [loss], every_n_epochs: 1}"
        )
    store = CheckpointStore(run_dir / "checkpoints", experiment.run.run_id)
    manifest = _find_checkpoint(store, checkpoint)
    state = experiment.to_device(store.load(manifest))
    if manifest.weights_of is not None:  # the checkpoint stores averaged weights as its params: remember them as such
        averaged = {"params": state.params, "buffers": state.buffers}
        state = state.remember(memory_of(manifest.weights_of), clone_tensors(averaged))
    name = manifest.tag
    if weights is not None:
        state = _use_weights(state, weights, store)
        name = f"{name}.{name_in_tags(weights)}"
    metrics: dict[str, Any] = {}
    interruption = Interruption(second_kills=True)
    reducer = _drop_callbacks_without_weights(experiment.reducer, state)
    if not listens_to(reducer, AtEval):
        raise CheckpointError(
            f"nothing to evaluate: {manifest.tag} contains none of the weights that the callbacks evaluate"
        )
    interpreter = add_handlers(_collecting_interpreter(metrics), config)
    with interruption, closing(experiment):
        try:
            dispatch(state, AtEval(run=interruptible(experiment.run, interruption)), reducer, interpreter)
        except DataInterrupt:
            echo(f"interrupted in the evaluation of {name}; nothing was written")
            return interruption.exit_code
    _print_metrics(name, metrics)
    _write_metrics(run_dir / "eval" / f"{name}.json", metrics)
    return 0


def _find_checkpoint(store: CheckpointStore, checkpoint: str) -> Manifest:
    try:
        return store.find(checkpoint)
    except CheckpointError as error:
        raise ConfigError([LocatedProblem(Place(f"--checkpoint {checkpoint}"), (), str(error))]) from error


def _drop_callbacks_without_weights(reducer: Reducer, state: TrainState) -> Reducer:
    """Return the reducer without callbacks whose weights the checkpoint does not contain, and print their names."""
    known = (None, *find_weights(state))
    dropped = [member for member in reducer.members if getattr(member, "weights", None) not in known]
    for member in dropped:
        echo(f"{label_of(member)} is skipped: the checkpoint does not contain its weights")
    return compose(*(member for member in reducer.members if not any(member is each for each in dropped)))


def _use_weights(state: TrainState, weights: str, store: CheckpointStore) -> TrainState:
    try:
        return use_weights(state, weights)
    except WeightsError as error:
        pointers = [name for name in store.pointers() if name.endswith(f".{name_in_tags(weights)}")]
        fix = f"; use --checkpoint {' or '.join(pointers)} without --weights" if pointers else ""
        raise ConfigError([LocatedProblem(Place(f"--weights {weights}"), (), f"{error}{fix}")]) from error


def _collecting_interpreter(metrics: dict[str, Any]) -> Interpreter:
    def collect(effect: LogScalars, _state: object, _event: object) -> None:
        metrics.update({key: to_plain(value) for key, value in effect.values.items()})

    ignored = (LogText, SetSummary, SaveTensors, MeasurePeakMemory, ShowProgress)
    return Interpreter({LogScalars: [collect], **dict.fromkeys(ignored, ())})


def _write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write the metrics to a file and print its path, or warn that it cannot be written."""
    try:
        make_directories(path.parent)
        replace_text(path, json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        echo(f"Warning: the metrics above cannot be written to {path}: {os_error_text(error)}", err=True)
    else:
        echo(f"written to {path}")


def _print_metrics(tag: str, metrics: Mapping[str, Any]) -> None:
    table = Table("metric", "value", title=Text(printable(tag)))
    for key, value in metrics.items():
        text = f"{value:.6g}" if isinstance(value, (int, float)) else str(value)
        table.add_row(Text(printable(key)), Text(printable(text)))
    Console().print(table)
