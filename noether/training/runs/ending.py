"""How a run ends: at its end, interrupted, or at an exception; what is saved there, and what is said."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

from noether.core.effect import SetSummary
from noether.core.errors import NoetherError
from noether.core.event import AfterTraining
from noether.core.loop import Move, next_move
from noether.core.tensors.tree import FrozenDict
from noether.distributed.failures import Failures
from noether.effects.disk.path_checks import RunMovedError
from noether.effects.run_ending import (
    Status,
    describe_status,
    record_failure,
    save_end,
    save_interrupted,
    write_traceback,
)
from noether.effects.run_files import TRACEBACK_FILE
from noether.training.error_locations import describe_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects import RunDirectory
    from noether.effects.run_directory import Interpret
    from noether.session.phases import PhaseTimes
    from noether.training.runs.interruption import Interruption

_FAILURE: Final = "_noether_failure"


@final
@dataclass(frozen=True)
class Failure:
    """What a run that an exception ended left behind.

    Args:
        directory: The run directory.
        places: Where the exception was raised: the callback, the sample, the update.
        outcome: What was saved, and where the traceback is.
    """

    directory: Path
    places: tuple[str, ...]
    outcome: tuple[str, ...]


def failure_of(error: BaseException) -> Failure | None:
    """Return what a run left behind that `error` ended; None if no run was ended by it."""
    failure: Failure | None = vars(error).get(_FAILURE)
    return failure


def describe_resume(directory: Path, allow: Sequence[str] = ()) -> str:
    """Return how a Python program resumes a run.

    Args:
        directory: The run directory.
        allow: Further prefixes of modules that `kind` may name.

    Example:
        >>> from pathlib import Path
        >>> describe_resume(Path("runs/digits"), ["lab"])
        "resume with noether.train(resume='runs/digits', allow=['lab'])"
    """
    allowed = f", allow={list(allow)!r}" if allow else ""
    return f"resume with noether.train(resume={str(directory)!r}{allowed})"


@contextmanager
def record_refusal(directory: RunDirectory, state: TrainState) -> Iterator[None]:
    """Record an exception that a callback raises in the block, before a resumed run changes anything.

    An error of noether itself says what to do, and is left as it is.

    Args:
        directory: The open directory of the run.
        state: The state from which the run would continue.
    """
    try:
        yield
    except NoetherError:
        raise
    except Exception as error:
        outcome = "the run is as it was"
        with suppress(OSError):
            write_traceback(error, directory, state)
            outcome += f"; the traceback is in {directory.path / TRACEBACK_FILE}"
        vars(error)[_FAILURE] = Failure(directory.path, tuple(getattr(error, "__notes__", ())), (outcome,))
        raise


@final
@dataclass(frozen=True, kw_only=True)
class Ending:
    """Saves a run where it ends, unless a checkpoint holds that state already.

    Args:
        run: The run.
        directory: Its open directory.
        interpret: Runs the effects.
        interruption: Receives the signals.
        phases: Where the time went, for the summary.
        at_end: Whether to save the end of training.
        failures: Where this process reports an exception to the other ranks of the run.
    """

    run: Run
    directory: RunDirectory
    interpret: Interpret
    interruption: Interruption
    phases: PhaseTimes
    at_end: bool
    failures: Failures = field(default_factory=Failures)

    def finish(self, state: TrainState) -> None:
        """Save the state at the end of the run, or where it was interrupted.

        Raises:
            CheckpointError: If this checkpoint, or an earlier one in the background, cannot be written.
        """
        event = AfterTraining(run=self.run)
        with self.failures.announce_work(f"the save of the end at {state.iteration}"):
            self._save(state, event)

    def _save(self, state: TrainState, event: AfterTraining) -> None:
        self.directory.wait()
        if next_move(state, self.run) is not Move.NOTHING:
            save_interrupted(self.directory, state, self.run, event.time_s)
        elif self.at_end:
            save_end(self.directory, self.interpret, state, event)

    def fail(self, error: BaseException, settled: TrainState | None, state: TrainState, event: Event) -> None:
        """Save the settled state after an exception, and attach to the exception what the run left behind.

        Of several ranks, rank 0 saves, whichever raised the exception; the rank that shows it writes the traceback.
        Do neither after the KeyboardInterrupt of a second signal, which asks to end at once.

        Args:
            error: The exception.
            settled: The state from which the run continues exactly; None if there is none.
            state: The state at the event.
            event: The event at which the exception was raised.
        """
        first = self.failures.report(error)  # before the save, which takes time
        if isinstance(error, KeyboardInterrupt) and self.interruption.is_signal:
            self._record("interrupted", f"interrupted at {state.iteration} by a second signal", state, event)
            return
        is_shown = first is None or first.reporter == self.run.rank
        places = tuple(getattr(error, "__notes__", ()))
        record_failure(error, self.directory, settled, (state, event), self.interpret, with_traceback=is_shown)
        outcome = tuple(getattr(error, "__notes__", ()))[len(places) :]
        vars(error)[_FAILURE] = Failure(self.directory.path, places, outcome)
        error.add_note(describe_resume(self.directory.path))
        self._record("failed", f"failed at {state.iteration}: {describe_error(error)}", state, event)

    def _record(self, status: Status, ending: str, state: TrainState, event: Event) -> None:
        entries = {**self.phases.entry(state), **describe_status(status, ending)}
        with suppress(RunMovedError):  # which the notes name, or the error itself
            self.directory.interpreter([SetSummary(FrozenDict(entries))], state, event)
