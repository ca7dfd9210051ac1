"""Runs from the command line: begun, resumed, tried."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import click

from noether.cli.interruption import Interruption
from noether.config import ConfigError, load
from noether.config.changes import refuse_changes
from noether.config.errors import LocatedProblem, Place
from noether.config.objects.import_policy import import_path
from noether.config.serialization import dump
from noether.core.callbacks.summaries import dataset_lengths, param_counts
from noether.core.effect import SaveCheckpoint, SetSummary
from noether.core.event import AfterTraining, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, dispatch, next_move
from noether.core.tensors.donation import donate
from noether.core.tensors.tree import FrozenDict
from noether.effects import CheckpointError, open_run
from noether.effects.disk.files import make_directories, replace_text
from noether.effects.logs.tensorboard import TensorBoard
from noether.effects.logs.wandb import WeightsAndBiases
from noether.effects.run_directory import CONFIG_FILE
from noether.effects.run_logs import LOG_EFFECTS
from noether.planning.replay import to_line
from noether.training.experiment import Experiment, build
from noether.training.step.compiled import CompiledStep
from noether.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.config import Config
    from noether.core.state import TrainState
    from noether.effects import Interpreter, RunDirectory
    from noether.effects.interpreter import Handler
    from noether.effects.run_directory import Interpret
    from noether.effects.run_logs import LogService


def start(config_path: Path, settings: Sequence[str], allow: Sequence[str]) -> int:
    """Train what a file describes in a new run directory; return the exit code.

    Raises:
        ConfigError: If the configuration is refused; then no directory is made.
    """
    config = load(config_path, settings, allow)
    check_services(config)
    experiment = build(config)
    path = _new_directory(Path(config.run.output) / config.run.name)
    experiment = replace(experiment, run=experiment.run.replace(run_id=path.name))
    with _opened(path, config) as directory:
        replace_text(directory.path / CONFIG_FILE, dump(config))
        return _train(experiment, directory, experiment.state, resumed=False, allow=allow)


def go_on(run_dir: Path, settings: Sequence[str], allow: Sequence[str], drop_memory: Sequence[str]) -> int:
    """Go on with a run from its newest checkpoint; return the exit code.

    Raises:
        ConfigError: If it is not a run, or a setting is changed that may not change.
        UnclaimedMemoryError: If the run holds memory that no callback claims, and that is not to be dropped.
    """
    config = resumed_config(run_dir, settings, allow)
    check_services(config)
    target = _target(run_dir, config, allow)
    with _opened(run_dir, config) as directory:
        state = _newest(directory)
        experiment = build(config, run_id=directory.run_id, fresh=state is None)
        if state is not None:
            state = _without(experiment.to_device(state), drop_memory)
            # A reducer is pure: asked in vain, it refuses what does not fit before anything is written.
            experiment.reducer(state, BeforeTraining(run=experiment.run, resumed=True))
            if next_move(state, experiment.run) is Move.NOTHING:
                _set_ending(experiment, directory.interpreter, state, _ending(state))
                click.echo(f"{run_dir} {_ending(state)} already; it goes on with --set and a later end")
                return 0
        if target == run_dir:
            return _gone_on(experiment, directory, state, allow)
        make_directories(target.parent)
        shutil.move(run_dir, target)  # while it is locked
    click.echo(f"{run_dir} moved to {target}")
    replace_text(target / CONFIG_FILE, dump(config))
    return go_on(target, (), allow, drop_memory)


def _gone_on(experiment: Experiment, directory: RunDirectory, state: TrainState | None, allow: Sequence[str]) -> int:
    begun = f"{directory.path} holds no checkpoint yet: training begins at update 0"
    click.echo(begun if state is None else f"going on at {state.iteration}")
    if dropped := directory.truncate_logs(state):
        click.echo(f"lines of metrics.jsonl beyond that are dropped, to be written again: {dropped}")
    replace_text(directory.path / CONFIG_FILE, dump(experiment.config))
    return _train(experiment, directory, state or experiment.state, resumed=state is not None, allow=allow)


def _newest(directory: RunDirectory) -> TrainState | None:
    """Return the newest state of a run; where only parts were saved, the refusal says how to make use of them."""
    try:
        return directory.load()
    except CheckpointError as error:
        saved = directory.checkpoints.manifests()
        if not saved or directory.checkpoints.newest() is not None:
            raise
        instead = f"--set run.init_from={directory.path}/checkpoints/{saved[-1].tag}, and save_latest_optim: true"
        raise CheckpointError(f"{error}\nBegin a new run with {instead}") from error


def _target(run_dir: Path, config: Config, allow: Sequence[str]) -> Path:
    """Return where the run is to be: elsewhere if `run.output` was changed."""
    before = load(run_dir / CONFIG_FILE, (), allow, run_dir).run.output
    target = Path(config.run.output) / config.run.name / run_dir.resolve().name
    if config.run.output == before or target.resolve() == run_dir.resolve():
        return run_dir
    if target.exists():
        raise config.error(("run", "output"), f"{str(target)!r} exists already; the run cannot move there")
    return target


def smoke(config_path: Path, settings: Sequence[str], allow: Sequence[str]) -> None:
    """Try a configuration: one update, one evaluation, one save that is read back, in a temporary directory."""
    experiment = build(load(config_path, settings, allow), run_id="smoke")
    run = experiment.run.replace(end=TrainingIteration(update=1))
    config = experiment.config
    with tempfile.TemporaryDirectory() as folder, _opened(Path(folder) / "smoke", config, services=()) as directory:
        interpreter = _interpreter(config, directory)
        state = _trainer(experiment, interpreter, Interruption(), run=run)(experiment.state)
        state = dispatch(state, AtEval(run=run), experiment.reducer, interpreter)
        interpreter([SaveCheckpoint(tag="smoke")], state, AfterTraining(run=run))
        directory.wait()
        experiment.to_device(directory.checkpoints.load(directory.checkpoints.find("smoke")))
    click.echo(f"{config_path}: one update, one evaluation and one save went well")


def resumed_config(run_dir: Path, settings: Sequence[str] = (), allow: Sequence[str] = ()) -> Config:
    """Return the configuration of a run, with what may change in a run changed.

    Raises:
        ConfigError: If `run_dir` is not a run, or a setting is changed that may not change.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        message = f"is not the directory of a run: it has no {CONFIG_FILE}; give one like runs/NAME/RUN_ID"
        raise ConfigError([LocatedProblem(Place(str(run_dir)), (), message)])
    config = load(path, settings, allow, run_dir)
    if settings:
        refuse_changes(load(path, (), allow, run_dir), config)
    return config


def handled(
    config: Config, interpreter: Interpreter, guarded: Callable[[str, Handler], Handler] = lambda _, handler: handler
) -> Interpreter:
    """Return the interpreter that also has the handlers of `run.handlers`, those of logs `guarded`."""
    for effect_type, path in config.run.handlers.items():
        kind, handler = import_path(effect_type), import_path(path)
        interpreter = interpreter.with_handlers(
            kind, guarded(path, handler) if issubclass(kind, LOG_EFFECTS) else handler
        )
    return interpreter


def _train(
    experiment: Experiment, directory: RunDirectory, state: TrainState, *, resumed: bool, allow: Sequence[str]
) -> int:
    interpreter = _interpreter(experiment.config, directory)
    told: Interpret = interpreter
    if experiment.config.trainer.record == "events":
        told = directory.recording_interpreter(interpreter, to_line(experiment.reducer))
    with Interruption() as interruption:
        interpreter([SetSummary(_facts(experiment))], state, AfterTraining(run=experiment.run))
        given = donate(state) if experiment.step.donate else state
        del state  # what the run begins with is not to be held to its end
        state = _trainer(experiment, told, interruption)(given, resumed=resumed)
        directory.wait()  # the run has not ended before its last checkpoint is saved
    done = next_move(state, experiment.run) is Move.NOTHING
    ending = _ending(state) if done else f"interrupted at {state.iteration}"
    _set_ending(experiment, interpreter, state, ending)
    click.echo(f"{ending}; the run is in {directory.path}")
    if done:
        return 0
    prefixes = [word for prefix in allow for word in ("--allow", prefix)]
    click.echo(f"go on with: {shlex.join(['noether', 'train', '--resume', str(directory.path), *prefixes])}")
    return interruption.exit_code


def _ending(state: TrainState) -> str:
    return f"ended at {state.iteration}" + (f": {state.stop}" if state.stop is not None else "")


def _set_ending(experiment: Experiment, interpreter: Interpreter, state: TrainState, ending: str) -> None:
    interpreter([SetSummary(FrozenDict(ending=ending))], state, AfterTraining(run=experiment.run))


def _trainer(experiment: Experiment, interpreter: Interpret, interruption: Interruption, **changes: object) -> Trainer:
    return Trainer(
        **{"run": experiment.run, **changes},  # type: ignore[arg-type]  # fields by name
        step=CompiledStep(experiment.step) if experiment.config.trainer.compile else experiment.step,
        data=experiment.data,
        reducer=experiment.reducer,
        interpreter=interpreter,
        evaluate_first=experiment.config.trainer.evaluate_first,
        interrupted=interruption,
    )


def _facts(experiment: Experiment) -> FrozenDict:
    run = experiment.run
    return FrozenDict({**param_counts(experiment.state.params, run.frozen), **dataset_lengths(run)})


def _interpreter(config: Config, directory: RunDirectory) -> Interpreter:
    """Return the interpreter of a run that also has its own handlers; those of logs never stop training."""
    return handled(config, directory.interpreter, directory.guard_log)


def _opened(path: Path, config: Config, services: Sequence[LogService] | None = None) -> RunDirectory:
    """Return the directory of a run, open; a state of the trainer's is never written to, so saves copy nothing."""
    checkpoints = config.trainer.checkpoints
    return open_run(
        path,
        asynchronous=checkpoints.asynchronous,
        borrowed=False,
        on_error=checkpoints.on_error,
        services=_services(path, config) if services is None else services,
    )


def check_services(config: Config) -> None:
    """Refuse to log to what is not installed.

    Raises:
        ConfigError: Naming the setting, and what to install.
    """
    asked = {"tensorboard": config.run.tensorboard, "wandb": config.run.wandb is not None}
    for name, is_asked in asked.items():
        spec = find_spec(name)
        # A folder of that name, as wandb itself leaves, is a package without a file.
        if is_asked and (spec is None or spec.origin is None):
            raise config.error(("run", name), f"{name} is not installed; pip install 'noether[{name}]' does that")


def _services(path: Path, config: Config) -> list[LogService]:
    services: list[LogService] = []
    if config.run.tensorboard:
        services.append(TensorBoard(path / "tensorboard"))
    if config.run.wandb is not None:
        run_id = f"{config.run.name}-{path.resolve().name}"
        services.append(WeightsAndBiases(path / "wandb", run_id, **vars(config.run.wandb)))
    return services


def _without(state: TrainState, names: Sequence[str]) -> TrainState:
    unknown = [name for name in names if name not in state.callback_states]
    if unknown:
        known = ", ".join(map(repr, state.callback_states)) or "none"
        raise click.UsageError(f"--drop-memory {unknown[0]}: the run has no such memory; it has {known}")
    kept = {name: memory for name, memory in state.callback_states.items() if name not in names}
    return state.replace(callback_states=FrozenDict(kept))


def _new_directory(folder: Path) -> Path:
    """Return the directory of a new run, made here, so that two runs begun at once never share one."""
    make_directories(folder)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in count(1):
        path = folder / (stamp if number == 1 else f"{stamp}-{number}")
        with suppress(FileExistsError):
            path.mkdir()
            break
    return path
