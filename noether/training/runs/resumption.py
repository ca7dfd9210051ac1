"""Resuming a run from its newest checkpoint."""

from __future__ import annotations

import shlex
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.config.serialization import dump
from noether.config.trainer_settings import ENDS
from noether.core.effect import SaveCheckpoint
from noether.core.errors import NoetherError
from noether.core.event import AfterUpdate, BeforeTraining
from noether.core.loop import Move, next_move
from noether.core.tensors.tree import FrozenDict
from noether.distributed.ranks import leave_at_end
from noether.distributed.restarts import Restart
from noether.effects import Console
from noether.effects.checkpoints.file_names import WEIGHTS
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.disk.files import replace_text
from noether.effects.disk.moves import finish_move
from noether.effects.run_files import CONFIG_FILE
from noether.training.experiment import build
from noether.training.runs.agreement import (
    accept_all,
    agree_to_start,
    ask_rank_0,
    describe_ranks,
    join_ranks,
    load_newest,
    load_tag,
    notify_once,
    open_on_ranks,
)
from noether.training.runs.branching import check_newest, check_target, load_resumable, make_branch
from noether.training.runs.directories import find_run, load_run_config, move_run, target_directory
from noether.training.runs.ending import record_refusal
from noether.training.runs.execution import TrainedRun, execute, write_ending
from noether.training.runs.services import check_services
from noether.training.runs.start_panel import no_warnings, show_building
from noether.training.runs.stops import clear_stop
from noether.training.runs.value_jumps import describe_jumps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.config import Config
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects import CheckpointStore, RunDirectory
    from noether.training.experiment import Experiment
    from noether.training.runs.agreement import CheckExperiment
    from noether.training.runs.interruption import Interruption
    from noether.training.runs.start_panel import FindWarnings


@leave_at_end()
def resume_run(  # noqa: PLR0913  # the options of the command line
    run_dir: Path,
    overrides: Sequence[str],
    allow: Sequence[str],
    drop_memory: Sequence[str],
    *,
    continue_stopped: bool = False,
    checkpoint: str | None = None,
    into: Path | None = None,
    interruption: Interruption,
    notify: Callable[[str], None],
    find_warnings: FindWarnings = no_warnings,
    check: CheckExperiment = accept_all,
) -> TrainedRun:
    """Resume a run from its newest checkpoint, or start it again if it never saved one.

    With `into`, a new run starts exactly at a checkpoint, and the run itself stays as it is.

    Args:
        run_dir: The run directory; a changed `run.output` moves it first.
        overrides: Settings such as `trainer.max_epochs=20`.
        allow: Further prefixes of modules that `kind` may name.
        drop_memory: Names of memories to drop although no callback claims them.
        continue_stopped: Whether the run continues if a callback stopped it. It does so too if its end or the settings
            of that callback change.
        checkpoint: Name of the checkpoint, as in `find_tag`; None for the newest. Without `into` it has to be the one
            from which the run resumes.
        into: Directory of the new run; None to resume the run itself.
        interruption: Receives signals during training.
        notify: Receives lines for the user.
        find_warnings: Returns what may be wrong with the plan of the run.
        check: Refuses the run before anything is written, as in `agree_to_start`.

    Raises:
        ConfigError: As `load_run_config`, or if the checkpoint is not one to resume from, a dropped memory does not
            exist, a callback would stop the run again at once, or the training set has another length than when the
            run began.
        UnclaimedMemoryError: If the run holds memory that no callback claims and that is not dropped.
        CheckpointError: If there are checkpoints, and the run can be resumed from none of them; or if there are none
            although the run had saved some.
        OSError: If the run cannot be moved.
    """
    given, found = run_dir, find_run(run_dir, overrides)
    ranks = join_ranks(load_run_config(found, overrides, allow))
    notify = notify_once(ranks, notify)
    run_dir = Path(ask_rank_0(ranks, "move that was killed", lambda: str(finish_move(found))))
    options = (overrides, drop_memory, continue_stopped, checkpoint, into)
    restart = Restart(f"resume {given} {options}")
    interruption.count_from(ask_rank_0(ranks, "time before a restart", restart.elapsed_s))
    # Without options, the same command once more does the same.
    if any(options) and (begun := ask_rank_0(ranks, "run before a restart", restart.find)) is not None:
        return resume_run(Path(begun), (), allow, (), interruption=interruption, notify=notify)
    execution = partial(execute, interruption=interruption, notify=notify, allow=allow, find_warnings=find_warnings)
    proceed = partial(_continue, restart=restart, execution=execution, notify=notify)
    if run_dir != given:
        notify(f"{given} moved to {run_dir}")
    old, config = load_run_config(run_dir, (), allow), load_run_config(run_dir, overrides, allow)
    check_services(config)
    adapt = partial(_adapt, old=old, drop_memory=drop_memory, continue_stopped=continue_stopped)
    if into is not None:
        check_target(run_dir, into, old, config)
        chosen = load_resumable(run_dir, checkpoint, allow) if ranks.is_first else None
        tag = ask_rank_0(ranks, "checkpoint", lambda: chosen and chosen[0].tag)
        manifest, branched = chosen or load_tag(run_dir, tag, ranks)
        with show_building(Console() if ranks.is_first else None, into):
            experiment = build(config, run_id=into.resolve().name, fresh=False, ranks=ranks)
        adapt(branched, experiment, run_dir)  # before anything is written
        agree_to_start(experiment, check)
        ask_rank_0(ranks, "branch", lambda: make_branch(run_dir, into, manifest, branched, notify))
        with open_on_ranks(into, config, ranks) as directory:
            saved = load_newest(directory, ranks)
            state, notes = adapt(saved, experiment, into, directory)
            return proceed(experiment, directory, saved, state, notes)
    target = target_directory(run_dir, old, config)
    with open_on_ranks(run_dir, config, ranks) as directory:
        saved = load_newest(directory, ranks, partial(_load, allow=allow))
        if checkpoint is not None:
            check_newest(directory, checkpoint, saved)
        with show_building(directory.console if directory.writes else None, directory.path):
            experiment = build(config, run_id=directory.run_id, fresh=saved is None, ranks=ranks)
        # All that can be refused is refused here, before anything is written.
        state, notes = adapt(saved, experiment, run_dir, directory)
        agree_to_start(experiment, check)
        if target == run_dir:
            return proceed(experiment, directory, saved, state, notes)
    ask_rank_0(ranks, "move", lambda: move_run(run_dir, target, old, config))
    notify(f"{run_dir} moved to {target}")
    with open_on_ranks(target, config, ranks) as directory:
        saved = load_newest(directory, ranks)  # again: the directory was unlocked for a moment
        state, notes = adapt(saved, experiment, target, directory)
        return proceed(experiment, directory, saved, state, notes)


def _adapt(
    saved: TrainState | None,
    experiment: Experiment,
    run_dir: Path,
    directory: RunDirectory | None = None,
    *,
    old: Config,
    drop_memory: Sequence[str],
    continue_stopped: bool,
) -> tuple[TrainState | None, list[str]]:
    """Return the state in which the run continues, and lines for the user; a traceback goes to an open directory."""
    if saved is None:
        return None, []
    state = _check_lengths(_drop_memory(experiment.to_device(saved), drop_memory), experiment, run_dir)
    state, notes = clear_stop(state, old, experiment, continue_stopped=continue_stopped)
    with nullcontext() if directory is None else record_refusal(directory, state):
        _try_start(state, experiment)
    return state, [*notes, *describe_jumps(state, old, experiment)]


def _try_start(state: TrainState, experiment: Experiment) -> None:
    """Refuse memory that does not fit the callbacks; reducers are pure, so this dry run changes nothing."""
    try:
        experiment.reducer(state, BeforeTraining(run=experiment.run, resumed=True))
    except NoetherError:
        raise
    except (AttributeError, LookupError, TypeError) as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("noether."):
            raise  # of the user's code, whose author needs the traceback
        notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
        text = f"{type(error).__name__}: {error}{notes}"
        fix = f"drop its memory with --drop-memory NAME; names are {', '.join(map(repr, state.callback_states))}"
        raise CheckpointError(f"the saved memory does not fit: {text}: {fix}") from error


def _continue(
    experiment: Experiment,
    directory: RunDirectory,
    saved: TrainState | None,
    state: TrainState | None,
    notes: Sequence[str],
    *,
    restart: Restart,
    execution: Callable[..., TrainedRun],
    notify: Callable[[str], None],
) -> TrainedRun:
    """Train from `state` in the open directory of the run; do nothing if the run has ended."""
    if state is not None and next_move(state, experiment.run) is Move.NOTHING:
        directory.complete_saves(state)
        ranks = experiment.ranks
        run = TrainedRun(
            directory=directory.path, state=state, finished=True, rank=ranks.rank, world_size=ranks.world_size
        )
        write_ending(run, experiment, directory.interpreter)
        notify(f"{directory.path} already {run.ending}; to continue it, {_ways_to_continue(run, experiment)}")
        return run
    if state is None:
        notify(f"{directory.path} has no checkpoint: training starts at update 0{describe_ranks(experiment.ranks)}")
    else:
        notify(f"resuming at {state.iteration}{describe_ranks(experiment.ranks)}")
    for note in notes:
        notify(note)
    if removed := directory.truncate_logs(state):
        notify(f"lines of metrics.jsonl removed, because the resumed run logs them again: {removed}")
    directory.complete_saves(state)
    if saved is not None and state is not None and state.stop != saved.stop:
        # The configuration shows only once that it has changed, so the decision to continue is saved before it.
        save = SaveCheckpoint(pointers=("latest",), retention=FrozenDict(continued=0))
        directory.interpreter([save], state, AfterUpdate(run=experiment.run))
        directory.wait()
    if directory.writes:
        replace_text(directory.path / CONFIG_FILE, dump(experiment.config))
        restart.note(str(directory.path.resolve()))
    resumed = state is not None
    state = experiment.state if state is None else state
    return execution(experiment, directory, state, resumed=resumed)


def _ways_to_continue(run: TrainedRun, experiment: Experiment) -> str:
    trainer = experiment.config.trainer
    name = next(name for name in ENDS if getattr(trainer, name) is not None)
    later_end = f"set a later end (trainer.{name} is {getattr(trainer, name)})"
    if run.state.stop is None or run.state.iteration.reached(experiment.run.end):
        return later_end
    stopper = run.state.stopped_by or "the callback that stopped it"
    return f"give --continue, change the settings of {stopper}, or {later_end}"


def _load(directory: RunDirectory, allow: Sequence[str]) -> TrainState | None:
    """Return the newest state of a run; if only parts were saved, the error gives the command that uses them."""
    try:
        return directory.load()
    except CheckpointError as error:
        if not directory.checkpoints.manifests() or directory.checkpoints.newest() is not None:
            raise
        command = ["noether", "train", str(directory.path / CONFIG_FILE)]
        weights = _newest_weights(directory.checkpoints)
        command += [] if weights is None else ["--set", f"run.init_from={directory.path}/checkpoints/{weights}"]
        command += [word for prefix in allow for word in ("--allow", prefix)]
        raise CheckpointError(f"{error}\nStart a new run: {shlex.join(command)}") from error


def _newest_weights(store: CheckpointStore) -> str | None:
    """Return the tag of the newest intact checkpoint with weights of the whole model, averaged weights included."""
    for manifest in reversed(store.manifests()):
        if WEIGHTS in manifest.files and not manifest.models:
            with suppress(CheckpointError):
                store.load(manifest)
                return manifest.tag
    return None


def _drop_memory(state: TrainState, names: Sequence[str]) -> TrainState:
    for name in names:
        if name not in state.callback_states:
            known = ", ".join(map(repr, state.callback_states)) or "none"
            message = f"the run has no such memory; it has {known}"
            raise ConfigError([LocatedProblem(Place(f"--drop-memory {name}"), (), message)])
    return state.forget(*names)


def _check_lengths(state: TrainState, experiment: Experiment, run_dir: Path) -> TrainState:
    """Return the state with the lengths of the run, or refuse those with which it did not begin."""
    before, now = state.lengths, experiment.data.batching.lengths
    changed = [name for name in before if before[name] != now.get(name)]
    if changed and changed[0] == "training_samples":
        path, updates = ("data", "train"), f"epochs of {before.get('updates_per_epoch')} updates"
        change = (
            f"has {now['training_samples']} samples, but the run began with {before['training_samples']}, in {updates}"
        )
    elif changed:
        path, change = ("trainer", changed[0]), f"{now.get(changed[0])}, but the run began with {before[changed[0]]}"
    elif not before and not _are_possible(state.iteration, experiment.run):  # of an earlier version
        path = ("data", "train")
        change = f"gives epochs of {now['updates_per_epoch']} updates, in which no run reaches {state.iteration}"
    else:
        return state.replace(lengths=now)
    fix = f"noether train {run_dir / CONFIG_FILE} --set run.init_from={run_dir / 'checkpoints/latest'}"
    raise experiment.config.error(path, f"{change}: restore it, or start a new run from these weights with {fix}")


def _are_possible(at: TrainingIteration, run: Run) -> bool:
    """Return whether a run with epochs of one length passes through an iteration."""
    expected = run.iteration_after(at.update)
    uncounted = expected.epoch - at.epoch  # 1 after the last update of an epoch, before the epoch is counted
    return at.sample == expected.sample and (
        uncounted == 0 or (uncounted == 1 and at.update % run.updates_per_epoch == 0)
    )
