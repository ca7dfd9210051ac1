"""The record of a loop: status, process and phases in the summary of the run, and panels on the console."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, final

from noether.core.effect import SetSummary
from noether.core.event import AfterTraining
from noether.core.tensors.tree import FrozenDict
from noether.effects.disk.path_checks import RunMovedError
from noether.effects.logs.summary_entries import read_summary
from noether.effects.run_ending import describe_status
from noether.effects.run_files import SUMMARY_FILE
from noether.session.panels.end import RunEnd
from noether.session.panels.session import describe_end
from noether.session.phases import PhaseTimes
from noether.session.provenance import record_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from noether.core.iteration import TrainingIteration
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects import RunDirectory
    from noether.effects.console.run_panels import RunPanel
    from noether.effects.run_directory import Interpret
    from noether.effects.run_ending import Status
    from noether.session.timing import Clock

_Item = TypeVar("_Item")


@final
class LoopRecord:
    """Records in the run directory how a loop trains a run in this process.

    Without an open directory, and on ranks other than 0, every method is a no-op.

    Args:
        directory: The run on disk, if there is one.
        clock: Reads the time.
    """

    def __init__(self, directory: RunDirectory | None, clock: Clock) -> None:
        self._directory, self._clock = directory, clock
        self._phases: PhaseTimes | None = None
        self._begin: TrainingIteration | None = None
        self._has_shown_start = False
        self._is_running = False

    def begin(self, state: TrainState, run: Run, interpret: Interpret, describe: Callable[[], RunPanel]) -> None:
        """Write the status `running` and the process to the summary, and show the panel of the start once.

        Args:
            state: The state in which the process begins.
            run: The run.
            interpret: Runs the effects of events.
            describe: Returns the panel of the start.
        """
        directory = self._directory
        if directory is None or not directory.writes:
            return
        self._write(describe_status("running"), state, run)
        record_process(directory, state, run)
        self._phases, self._begin = PhaseTimes(interpret, directory, state, self._clock), state.iteration
        self._is_running = True
        if not self._has_shown_start:
            self._has_shown_start = True
            directory.show_panel(describe)

    def count_time(self, interpret: Interpret) -> Interpret:
        """Return an interpreter that also counts the time; before `begin`, return `interpret` itself."""
        return interpret if self._phases is None else self._phases

    def track(self, iterable: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
        """Yield the items of an evaluation, count its time, and show its progress."""
        if self._directory is None or not self._directory.writes:
            yield from iterable
            return
        shown = self._directory.console.track(iterable, description, total)
        yield from shown if self._phases is None else self._phases.evaluate(shown)

    def pause(self, state: TrainState, run: Run) -> None:
        """Write the phases at the end of a loop; another loop of this process may continue the run."""
        if self._is_running and self._phases is not None:
            self._write(self._phases.entry(state), state, run)

    def end(self, status: Status, ending: str, state: TrainState, run: Run, reducer: Reducer) -> None:
        """Write the status and the phases to the summary, and show the panel of the end.

        Of a run that ended without a checkpoint, the summary does not say where: that would refuse a new run in this
        directory.

        Args:
            status: How the run ended.
            ending: Where and why it ended, as one line.
            state: The state in which it ended.
            run: The run.
            reducer: The callbacks.
        """
        directory, phases, begin = self._directory, self._phases, self._begin
        if directory is None or not directory.is_open:
            return
        times = {} if phases is None else phases.entry(state)
        is_noted = status not in {"finished", "stopped"} or bool(directory.checkpoints.pointers())
        self._write({**times, **describe_status(status, ending if is_noted else None)}, state, run)
        self._is_running = False
        if phases is None or begin is None:
            return
        ended = RunEnd(
            directory=directory.path,
            status=status,
            ending=ending,
            begin=begin,
            state=state,
            reducer=reducer,
            phases=phases.read(state),
        )
        summary, pointers = directory.path / SUMMARY_FILE, directory.checkpoints.pointers
        describe = partial(describe_end, ended, has_title=directory.shows_panels)
        directory.show_panel(lambda: describe(read_summary(summary), pointers()), at_exit=True)

    def _write(self, entries: Mapping[str, Any], state: TrainState, run: Run) -> None:
        """Write entries of the summary; a no-op without an open directory."""
        if self._directory is None or not self._directory.is_open:
            return
        event = AfterTraining.of(run=run, time_s=self._clock.wall_s())
        with suppress(RunMovedError):  # the next save or flush of logs raises it
            self._directory.interpreter([SetSummary(FrozenDict(entries))], state, event)
