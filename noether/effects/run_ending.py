"""Saves at the end of a run: when it is complete, when it is interrupted, and after an exception."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterTraining, AfterUpdate
from noether.core.reducer import remaining_effects
from noether.core.tensors.tree import FrozenDict
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.disk.files import replace_text
from noether.effects.run_files import TRACEBACK_FILE
from noether.effects.run_logs import LOG_EFFECTS

if TYPE_CHECKING:
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects.run_directory import Interpret, RunDirectory


Status = Literal["running", "finished", "stopped", "interrupted", "failed"]
"""The status of a run in `summary.json`; if it is `running` and no process has locked the run, the run was killed."""


def describe_status(status: Status, ending: str | None = None) -> dict[str, str | None]:
    """Return the entries of the summary that say whether a run is running, or how it ended.

    Args:
        status: `stopped` if a callback ended it, `interrupted` after a signal or a time limit, `failed` after an
            exception.
        ending: Where and why it ended; None while it is running.
    """
    return {"status": status, "ending": ending}


def request_end_checkpoint(state: TrainState) -> SaveCheckpoint:
    """Return the request for a checkpoint at the end of a run, which is kept until a later end is saved.

    Example:
        >>> from noether import TrainState
        >>> request_end_checkpoint(TrainState().advance(samples=4)).tag
        'E0_U1_S4.end'
    """
    return SaveCheckpoint(tag=f"{state.iteration}.end", pointers=("latest",), retention=FrozenDict(end=1))


def save_end(directory: RunDirectory, interpret: Interpret, state: TrainState, event: AfterTraining) -> None:
    """Save the state at the end of a run, unless a checkpoint has it; return when it is on the disk.

    Args:
        directory: The run on disk.
        interpret: Runs the request.
        state: The state at the end.
        event: The event with which it ended.

    Raises:
        CheckpointError: If this checkpoint, or an earlier one that is saved in the background, cannot be written.
    """
    directory.wait()
    if not directory.checkpoints.holds(state):
        interpret((request_end_checkpoint(state),), state, event)
        directory.wait()


def save_interrupted(directory: RunDirectory, state: TrainState, run: Run, time_s: float) -> None:
    """Save a run that is interrupted before its end, under the pointer `latest`; return when it is on the disk.

    It does nothing if this process has already saved a checkpoint from which the run resumes at `state`, or later; and
    on ranks other than 0, unless the state has shards, which all ranks save together. The checkpoint stays until the
    resumed run has saved the next one from which it can resume.

    Raises:
        CheckpointError: If it cannot be saved, whatever `on_error` of the directory is.
    """
    if not directory.writes and not directory.checkpoints.needs_all_ranks(state):
        return
    save = SaveCheckpoint(pointers=("latest",), retention=FrozenDict(interrupted=0))
    with suppress(CheckpointError):  # an earlier background save failed; the saver logged or will raise that
        directory.wait()
    if directory.checkpoints.holds(state):
        return
    directory.interpreter((save,), state, AfterUpdate(run=run, time_s=time_s))
    directory.wait()
    if not directory.checkpoints.holds(state):
        raise CheckpointError(f"{state.iteration} is not saved in {directory.path}: the log says why")


def record_failure(
    error: BaseException,
    directory: RunDirectory,
    settled: TrainState | None,
    at: tuple[TrainState, Event],
    logs: Interpret,
    *,
    with_traceback: bool = True,
) -> None:
    """Save the run after an exception, and add notes to the exception that name what is saved where.

    First it saves the settled state, from which a resumed run repeats the event that raised the exception; but not a
    state with shards, which the other ranks would have to save, too. Then it writes the logs of the callbacks before
    the one that failed; the resumed run replaces them. Last, it writes the traceback to `traceback.txt`. If one of the
    three fails, a note says so; the exception itself does not change.

    Args:
        error: The exception.
        directory: The run on disk.
        settled: The state to save, from which the run continues exactly; None if there is none.
        at: The state and the event at which the exception was raised.
        logs: Runs the effects that write logs.
        with_traceback: Whether to write the traceback; of several ranks, only the one that shows the exception does.
    """
    state, event = at
    if directory.writes:
        error.add_note(_save_after_failure(directory, settled, state, event))
    try:
        logs(tuple(effect for effect in remaining_effects(error) if isinstance(effect, LOG_EFFECTS)), state, event)
        if with_traceback:
            write_traceback(error, directory, state, rank=event.run.rank if event.run.world_size > 1 else None)
    except Exception as failure:  # noqa: BLE001  # the first error is the one to report
        error.add_note(f"its logs and traceback could not be written: {failure}")
    else:
        if with_traceback:
            error.add_note(f"the traceback is in {directory.path / TRACEBACK_FILE}")


def _save_after_failure(directory: RunDirectory, settled: TrainState | None, state: TrainState, event: Event) -> str:
    """Save the settled state; return what is saved where, or why nothing is."""
    if (settled or state).iteration.update == 0:
        return "no update was completed: a resumed run begins at update 0"
    if settled is None:
        return f"nothing is saved at {state.iteration}, because the run could not continue exactly from there"
    if directory.checkpoints.needs_all_ranks(settled):
        return "nothing is saved, because each rank has only its shards of the state: resume from the last checkpoint"
    try:
        save_interrupted(directory, settled, event.run, event.time_s)
    except Exception as failure:  # noqa: BLE001  # the first error is the one to report
        return f"the state at {settled.iteration} could not be saved: {failure}"
    return f"the state at {settled.iteration} is saved in {directory.path}"


def write_traceback(
    error: BaseException, directory: RunDirectory, state: TrainState, *, rank: int | None = None
) -> None:
    """Write the traceback of an exception to `traceback.txt` in the run directory.

    Args:
        error: The exception.
        directory: The run on disk.
        state: The state at which it was raised.
        rank: The rank that raised it; None for a run of one process.

    Raises:
        OSError: If it cannot be written.
    """
    where = f"at {state.iteration}{'' if rank is None else f', on rank {rank}'}"
    text = "".join(traceback.format_exception(error))
    replace_text(directory.path / TRACEBACK_FILE, f"{time.strftime('%Y-%m-%d %H:%M:%S')}, {where}\n\n{text}")
