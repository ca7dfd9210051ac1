"""Execution of a run in its directory, the same for new and resumed runs."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import leaves_of
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.callbacks.summaries import dataset_lengths, param_counts
from noether.core.effect import SaveCheckpoint, SetSummary
from noether.core.errors import NoetherError
from noether.core.event import AfterTraining
from noether.core.loop import Move, next_move
from noether.core.progress import show_progress_on
from noether.core.stretch import find_interpret_stretch
from noether.core.tensors.donation import donate
from noether.core.tensors.tree import FrozenDict
from noether.effects.logs.events import event_line_builder
from noether.effects.logs.summary_entries import PRODUCES, read_summary, set_process_entry
from noether.effects.run_ending import Status, describe_status
from noether.effects.run_files import SUMMARY_FILE
from noether.session.phases import PhaseTimes
from noether.session.provenance import record_process
from noether.training.configured_callbacks import produced_keys
from noether.training.data.interruptible import interruptible
from noether.training.replicated.step import ReplicatedStep
from noether.training.runs.end_panel import describe_end
from noether.training.runs.ending import Ending
from noether.training.runs.services import add_handlers
from noether.training.runs.start_panel import describe_start, no_warnings
from noether.training.runs.timed_saves import TimedSaves
from noether.training.step.compiled import CompiledStep
from noether.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.distributed.failures import Failures
    from noether.effects import Interpreter, RunDirectory
    from noether.effects.run_directory import BuildLine, Interpret
    from noether.training.data.interruptible import Watch
    from noether.training.experiment import Experiment
    from noether.training.runs.interruption import Interruption
    from noether.training.runs.start_panel import FindWarnings
    from noether.training.step.step import Step

_LOGGER: Final = logging.getLogger(__name__)
_WORLD_SIZE: Final = "world_size"


class TimeLimitError(NoetherError, RuntimeError):
    """The time of one process is too short for the run to get any further."""


@final
@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run after training.

    Args:
        directory: The run directory, with checkpoints, logs and `summary.json`.
        state: The final state.
        finished: Whether the run reached its end or stopped early; False if a signal or `trainer.max_hours` interrupted
            it.
        interrupted_by: Why it was interrupted, if not for a signal.
        rank: Rank of this process.
        world_size: Number of processes that trained it.
    """

    directory: Path
    state: TrainState
    finished: bool
    interrupted_by: str = ""
    rank: int = 0
    world_size: int = 1

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of every metric, best values such as `val/accuracy/best` included if a callback logs them."""
        return {key: float(measured.value) for key, measured in self.state.metrics.items()}

    @property
    def status(self) -> Status:
        """How the run ended: `finished`, `stopped` by a callback, or `interrupted`."""
        if not self.finished:
            return "interrupted"
        return "finished" if self.state.stop is None else "stopped"

    @property
    def ending(self) -> str:
        """Where the run ended and why, such as `ended at E2_U76_S2410`."""
        what, reason = ("ended", self.state.stop) if self.finished else ("interrupted", self.interrupted_by)
        return f"{what} at {self.state.iteration}{f': {reason}' if reason else ''}"


def execute(
    experiment: Experiment,
    directory: RunDirectory,
    state: TrainState,
    *,
    resumed: bool,
    interruption: Interruption,
    notify: Callable[[str], None],
    allow: Sequence[str] = (),
    find_warnings: FindWarnings = no_warnings,
) -> TrainedRun:
    """Train from `state` to the end of the run, or until it is interrupted.

    Args:
        experiment: The run.
        directory: Its open directory.
        state: Where training begins.
        resumed: Whether the state is that of a checkpoint.
        interruption: Receives signals during training; its clock counts `trainer.max_hours`.
        notify: Receives a line for the user at the end.
        allow: Further prefixes of modules that `kind` may name, for the commands that the run suggests.
        find_warnings: Returns what may be wrong with the plan of the run.

    Raises:
        TimeLimitError: If `trainer.max_hours` passed before an update was completed, in a process that torchrun has not
            restarted.
    """
    max_hours = experiment.config.trainer.max_hours
    ranks = experiment.ranks
    interruption.limit_time(max_hours, counts=ranks.is_first)
    interruption.announce = partial(_announce_interruption, directory, ranks.failures)
    directory.show_panel(partial(describe_start, experiment, directory.path, state, find_warnings))
    interpreter = add_handlers(
        directory.interpreter, experiment.config, directory.path.resolve, directory.services, directory.guard_log
    )
    phases = PhaseTimes(interpreter, directory, state)
    interpret: Interpret = phases
    if (minutes := experiment.config.trainer.checkpoints.every_n_minutes) is not None:
        interpret = TimedSaves(interpret, minutes, **({"clock": None} if ranks.are_several else {}))
    if ranks.are_several and ranks.is_first:
        interpret = _announce_saves(interpret, ranks.failures)
    if experiment.config.trainer.record == "events":
        interpret = directory.recording_interpreter(interpret, event_recorder(experiment.reducer))
    with interruption, closing(experiment), show_progress_on(directory.console if directory.writes else None):
        facts: dict[str, Any] = {**param_counts(state.params, experiment.run.frozen), **dataset_lengths(experiment.run)}
        facts |= _world_sizes(directory, ranks.world_size, state.iteration)
        facts |= {**describe_status("running"), PRODUCES: produced_keys(experiment.callbacks)}
        interpreter([SetSummary(FrozenDict(facts))], state, AfterTraining(run=experiment.run))
        record_process(directory, state, experiment.run)
        ending = Ending(
            run=experiment.run,
            directory=directory,
            interpret=interpret,
            interruption=interruption,
            phases=phases,
            at_end=experiment.config.trainer.checkpoints.at_end,
            failures=experiment.ranks.failures,
        )
        directory.console.watch(leaves_of(experiment.reducer), state)
        trainer = make_trainer(experiment, interpret, interruption, watch=phases.evaluate)
        begin = state.iteration
        start = donate(state) if experiment.step.donate else state
        del state  # the first state would otherwise stay in memory during the whole training
        final = replace(trainer, finish=ending.finish, fail=ending.fail)(start, resumed=resumed)
    finished = next_move(final, experiment.run) is Move.NOTHING
    if not finished:
        interruption.agree_on_reason(experiment.run.gather)
    run = TrainedRun(
        directory=directory.path,
        state=final,
        finished=finished,
        interrupted_by=interruption.reason,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    write_ending(run, experiment, interpreter, phases.entry(final))
    summary, pointers = directory.path / SUMMARY_FILE, directory.checkpoints.pointers
    describe = partial(describe_end, run, experiment, begin, phases.read(final), allow=allow)
    directory.show_panel(lambda: describe(read_summary(summary), pointers()))
    is_saved = finished or directory.checkpoints.holds(final)  # for a state with shards every rank asks
    if not directory.shows_panels:  # which say the same
        if not finished and ranks.is_first:
            notify(f"saved {final.iteration}" if is_saved else "nothing is saved: the first update was not completed")
        notify(f"{run.ending}; the run is in {directory.path}")
    if interruption.is_time_over and not interruption.is_restarted and not finished and final.iteration == begin:
        raise TimeLimitError(
            f"trainer.max_hours: {max_hours:g} is too short: the process ends where it began, at {final.iteration}, "
            "and so would one that resumes the run; give it more hours"
        )
    return run


def _announce_interruption(directory: RunDirectory, failures: Failures, text: str) -> None:
    if failures.first() is None:  # else a launcher ends all ranks, with a signal
        directory.write_notice(text)


def _announce_saves(interpret: Interpret, failures: Failures) -> Interpret:
    """Return an interpreter that tells the other ranks, which wait meanwhile, that rank 0 saves."""

    def run_effects(effects: Effects, state: TrainState, event: Event) -> None:
        if any(isinstance(effect, SaveCheckpoint) for effect in effects):
            with failures.announce_work(f"a save at {state.iteration}"):
                interpret(effects, state, event)
        else:
            interpret(effects, state, event)

    # As it is: no callback requests a save for several updates.
    run_effects.interpret_stretch = find_interpret_stretch(interpret)  # type: ignore[attr-defined]  # of a function
    return run_effects


def _world_sizes(directory: RunDirectory, world_size: int, begin: TrainingIteration) -> dict[str, Any]:
    """Return the entry `world_size` of the summary: on how many ranks the run trained, by the point where that began.

    Args:
        directory: The open directory of the run.
        world_size: The number of ranks now.
        begin: Where they begin.

    Returns:
        Nothing for a run that only one process has trained.
    """
    before = read_summary(directory.path / SUMMARY_FILE) if directory.writes else {}
    if world_size == 1 and not before.get(_WORLD_SIZE):
        return {}
    return {_WORLD_SIZE: set_process_entry(before, _WORLD_SIZE, begin, world_size)}


def make_trainer(
    experiment: Experiment,
    interpret: Interpret,
    interrupted: Callable[[], bool],
    run: Run | None = None,
    watch: Watch = iter,
) -> Trainer:
    """Return the trainer of an experiment.

    Args:
        experiment: The experiment.
        interpret: Runs the effects.
        interrupted: Returns whether to stop at the next update.
        run: Replaces the run of the experiment.
        watch: Returns an iterator over the batches of a dataset that a callback iterates.
    """
    return Trainer(
        run=interruptible(run or experiment.run, interrupted, watch),
        step=_choose_step(experiment),
        data=experiment.data,
        reducer=experiment.reducer,
        interpreter=interpret,
        evaluate_first=experiment.config.trainer.evaluate_first,
        interrupted=interrupted,
        ranks=experiment.ranks,
    )


def _choose_step(experiment: Experiment) -> Step | CompiledStep | ReplicatedStep:
    compiles = experiment.config.trainer.compile
    if not experiment.ranks.are_several:
        return CompiledStep(experiment.step) if compiles else experiment.step
    if compiles and experiment.ranks.is_first:
        _LOGGER.warning(
            "updates are not compiled: several ranks reduce gradients in the middle of an update; training continues "
            "as with trainer.compile: false"
        )
    return ReplicatedStep(experiment.step, experiment.ranks)


def write_ending(
    run: TrainedRun, experiment: Experiment, interpreter: Interpreter, more: Mapping[str, Any] = FrozenDict()
) -> None:
    """Write how and where the run ended to `summary.json`, with more entries."""
    entries = FrozenDict({**more, **describe_status(run.status, run.ending)})
    interpreter([SetSummary(entries)], run.state, AfterTraining(run=experiment.run))


def event_recorder(reducer: Reducer) -> BuildLine:
    """Return the function that turns each event into a line of `events.jsonl`, for a later replay.

    Args:
        reducer: The callbacks; the line contains the metrics that its data iterators measured.
    """
    iterators = [each for each in leaves_of(reducer) if isinstance(each, PeriodicDataIteratorCallback)]
    return event_line_builder([pattern for member in iterators for pattern in member.produces or ()], dataset_lengths)
