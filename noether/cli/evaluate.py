"""Evaluation of a checkpoint from the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from noether.cli.train import handled, resumed_config
from noether.config import ConfigError
from noether.config.errors import LocatedProblem, Place
from noether.core.callback import label_of, listens_to
from noether.core.effect import LogScalars, LogText, MeasurePeakMemory, SaveTensors, SetSummary, ShowProgress
from noether.core.errors import WeightsError
from noether.core.event import AtEval
from noether.core.loop import dispatch
from noether.core.reducer import compose
from noether.core.tensors.stored_weights import find_weights, memory_of, use_weights
from noether.core.tensors.tree import clone_tensors
from noether.effects import CheckpointError, CheckpointStore, Interpreter
from noether.effects.disk.encoding import to_plain
from noether.effects.disk.files import make_directories, replace_text
from noether.training.experiment import build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from noether.core.reducer import Reducer
    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest


def evaluate(
    run_dir: Path, checkpoint: str, weights: str | None, settings: Sequence[str], allow: Sequence[str]
) -> None:
    """Print what the data iterators of a run measure at a checkpoint, and keep it in `eval/TAG.json`.

    With `weights` they evaluate those that a callback kept, such as `ema=0.999`, and it is `eval/TAG.ema=0.999.json`.

    Raises:
        ConfigError: If `run_dir` is not a run, or has no such checkpoint, or that no such weights.
        CheckpointError: If the checkpoint is damaged.
    """
    config = resumed_config(run_dir, settings, allow)
    experiment = build(config, run_id=run_dir.resolve().name, fresh=False)
    if not listens_to(experiment.reducer, AtEval):
        raise config.error(
            ("callbacks",), "none of them iterates data; add trainer.evaluate: {val: [loss], every_n_epochs: 1}"
        )
    store = CheckpointStore(run_dir / "checkpoints", experiment.run.run_id)
    manifest = _found(store, checkpoint)
    state = experiment.to_device(store.load(manifest))
    if manifest.weights_of is not None:  # they lie in the place of those in training, and are what they are, too
        kept = {"params": state.params, "buffers": state.buffers}
        state = state.remember(memory_of(manifest.weights_of), clone_tensors(kept))
    name = manifest.tag
    if weights is not None:
        state = _weighted(state, weights, store)
        name = f"{name}.{weights.replace('/', '.')}"
    metrics: dict[str, Any] = {}
    reducer = _with_their_weights(experiment.reducer, state)
    if not listens_to(reducer, AtEval):
        raise CheckpointError(
            f"nothing is left to evaluate: {manifest.tag} holds none of the weights that are asked for"
        )
    dispatch(state, AtEval(run=experiment.run), reducer, handled(config, _collecting(metrics)))
    _keep(run_dir / "eval" / f"{name}.json", metrics)
    _show(name, metrics)


def _found(store: CheckpointStore, checkpoint: str) -> Manifest:
    try:
        return store.find(checkpoint)
    except CheckpointError as error:
        raise ConfigError([LocatedProblem(Place(f"--checkpoint {checkpoint}"), (), str(error))]) from error


def _with_their_weights(reducer: Reducer, state: TrainState) -> Reducer:
    """Return the reducer without the callbacks whose weights a checkpoint does not hold, and say so."""
    there = (None, *find_weights(state))
    lost = [member for member in reducer.members if getattr(member, "weights", None) not in there]
    for member in lost:
        click.echo(f"{label_of(member)} is left out: the checkpoint does not hold its weights")
    return compose(*(member for member in reducer.members if not any(member is each for each in lost)))


def _weighted(state: TrainState, weights: str, store: CheckpointStore) -> TrainState:
    try:
        return use_weights(state, weights)
    except WeightsError as error:
        saved = [name for name in store.pointers() if name.endswith(f".{weights.replace('/', '.')}")]
        instead = f"; evaluate --checkpoint {' or '.join(saved)} without --weights" if saved else ""
        raise ConfigError([LocatedProblem(Place(f"--weights {weights}"), (), f"{error}{instead}")]) from error


def _collecting(metrics: dict[str, Any]) -> Interpreter:
    def collect(effect: LogScalars, _state: object, _event: object) -> None:
        metrics.update({key: to_plain(value) for key, value in effect.values.items()})

    ignored = (LogText, SetSummary, SaveTensors, MeasurePeakMemory, ShowProgress)
    return Interpreter({LogScalars: [collect], **dict.fromkeys(ignored, ())})


def _keep(path: Path, metrics: Mapping[str, Any]) -> None:
    make_directories(path.parent)
    replace_text(path, json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    click.echo(f"kept in {path}")


def _show(tag: str, metrics: Mapping[str, Any]) -> None:
    table = Table("metric", "value", title=tag)
    for key, value in metrics.items():
        table.add_row(key, f"{value:.6g}" if isinstance(value, (int, float)) else str(value))
    Console().print(table)
