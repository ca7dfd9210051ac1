"""Where the time of a process goes: waiting for data, steps, evaluations and saves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from noether.core.effect import SetSummary
from noether.core.event import AfterUpdate
from noether.core.stretch import find_interpret_stretch
from noether.core.tensors.tree import FrozenDict
from noether.effects.logs.summary_entries import read_summary, set_process_entry
from noether.effects.run_files import SUMMARY_FILE
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.core.stretch import CompletedUpdate, InterpretStretch
    from noether.effects import RunDirectory
    from noether.effects.run_directory import Interpret

PHASES: Final = "phases"
_CLOCK: Final = Clock()
_INTERVAL_S: Final = 10.0
_DIGITS: Final = 6


@final
class PhaseTimes:
    """An interpreter that also measures the phases of a process, and writes them to the summary every ten seconds.

    An update without effects costs a few additions, because it reads no clock. An evaluation lasts from the first
    batch that a callback requests until the callbacks of that event are done.

    Args:
        interpret: Runs the effects.
        directory: The open directory of the run, which counts the time of saves.
        state: The state in which the process begins.
        clock: Reads the time; the total begins when this object is made.

    Example:
        >>> import tempfile
        >>> from noether import TrainState, open_run
        >>> seconds = iter([0.0, 4.0])
        >>> state = TrainState()
        >>> with tempfile.TemporaryDirectory() as path, open_run(path) as directory:
        ...     phases = PhaseTimes(directory.interpreter, directory, state, Clock(elapsed_s=lambda: next(seconds)))
        ...     phases((), state.advance(samples=4), AfterUpdate(samples=4, data_s=0.5, step_s=3.0))
        ...     times = phases.read(state)
        >>> times["total_s"], times["data_s"], times["step_s"], times["updates"]
        (4.0, 0.5, 3.0, 1)
    """

    def __init__(self, interpret: Interpret, directory: RunDirectory, state: TrainState, clock: Clock = _CLOCK) -> None:
        self._interpret, self._directory, self._clock = interpret, directory, clock
        self._begin = state.iteration
        self._earlier = read_summary(directory.path / SUMMARY_FILE) if directory.writes else {}
        self._began_s = clock.elapsed_s()
        self._saving_s, self._background_s = directory.saving_s, directory.background_saving_s
        self._data_s = self._step_s = self._evaluation_s = 0.0
        self._updates = 0
        self._evaluating_since_s: float | None = None
        self._written_s = 0.0  # by the time of events; 0 before the first update

    def __call__(self, effects: Effects, state: TrainState, event: Event) -> None:
        """Run the effects, and count the time of the update or evaluation that the event ends."""
        if self._evaluating_since_s is not None:
            self._evaluation_s += self._clock.elapsed_s() - self._evaluating_since_s
            self._evaluating_since_s = None
        is_due = False
        if isinstance(event, AfterUpdate):
            self._count(event)
            self._written_s = self._written_s or event.time_s
            if not 0 <= event.time_s - self._written_s < _INTERVAL_S:  # negative if the clock was set back
                self._written_s, is_due = event.time_s, True
        self._interpret(effects, state, event)
        if is_due:  # not by `interpret`, which may be a function of the user that ignores the summary
            self._directory.interpreter([SetSummary(FrozenDict(self.entry(state)))], state, event)

    @property
    def interpret_stretch(self) -> InterpretStretch | None:
        """Runs the effects of several updates, and counts their time; None if `interpret` takes those of one only."""
        inner = find_interpret_stretch(self._interpret)
        if inner is None:
            return None

        def interpret(effects: Effects, state: TrainState, updates: Sequence[CompletedUpdate]) -> None:
            for _, event in updates:
                self._count(event)
            inner(effects, state, updates)

        return interpret

    def _count(self, event: AfterUpdate) -> None:
        self._updates += 1
        self._data_s += event.data_s or 0.0
        self._step_s += event.step_s or 0.0

    def evaluate(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a dataset that a callback iterates, and count the time until its event is complete."""
        self._begin_evaluation()
        for batch in batches:
            self._begin_evaluation()  # an iterator may be read at several events
            yield batch

    def _begin_evaluation(self) -> None:
        if self._evaluating_since_s is None:
            self._evaluating_since_s = self._clock.elapsed_s()

    def read(self, state: TrainState) -> dict[str, float | int]:
        """Return the seconds of each phase so far, the number of updates, and the peak memory in bytes.

        Args:
            state: The state, on whose device memory is measured.

        Returns:
            `total_s`, and of it `data_s` (waiting for training data), `step_s`, `evaluation_s` and `saving_s` (waiting
            for saves); the rest is spent in callbacks and logs. `background_saving_s` passes beside training.
        """
        now_s = self._clock.elapsed_s()
        evaluating_s = 0.0 if self._evaluating_since_s is None else now_s - self._evaluating_since_s
        seconds = {
            "total_s": now_s - self._began_s,
            "data_s": self._data_s,
            "step_s": self._step_s,
            "evaluation_s": self._evaluation_s + evaluating_s,
            "saving_s": self._directory.saving_s - self._saving_s,
            "background_saving_s": self._directory.background_saving_s - self._background_s,
        }
        rounded = {name: round(value, _DIGITS) for name, value in seconds.items()}
        return {**rounded, "updates": self._updates, "peak_bytes": self._directory.peak_bytes(state)}

    def entry(self, state: TrainState) -> dict[str, Any]:
        """Return the entry `phases` of the summary: the times of every process that trained the run."""
        return {PHASES: set_process_entry(self._earlier, PHASES, self._begin, self.read(state))}
