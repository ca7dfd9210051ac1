"""A finished run, told to callbacks again: without model, data or accelerator, from what was recorded of its events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from noether.core.callback import OptionalKey, declaration_of, label_of, tracker_of
from noether.core.callbacks.periodic import PeriodicDataIteratorCallback
from noether.core.callbacks.summaries import dataset_lengths
from noether.core.declarations import DeclarationError
from noether.core.effect import LogScalars
from noether.core.errors import NoetherError, OutputError
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, next_move
from noether.core.metrics import MetricError, keys_overlap, log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict
from noether.effects.logs.events import event_line_builder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.reducer import Reducer
    from noether.effects.logs.events import RecordedEvent
    from noether.effects.logs.jsonl import ToLine

_ANY_TIME: Final = (BeforeTraining, AtEval)


class ReplayError(NoetherError):
    """A record does not hold what a replay needs."""


class ReplayStep(NamedTuple):
    """One event of a replay.

    Args:
        event: What happened.
        before: The state that the event came with.
        state: The state that the callbacks settled on.
        asked: What each callback asked for, by its name, in order.
    """

    event: Event
    before: TrainState
    state: TrainState
    asked: tuple[tuple[str, Effect], ...]


class Replayed(NamedTuple):
    """A run as callbacks would have seen it.

    Args:
        steps: Those of its events that were to be kept, in order.
        left_out: Callbacks that could not be replayed, by name: why.
        state: The last state; its params, buffers and optimizer are shapes on the meta device.
        over: Whether the callbacks saw the run end; else the record ends before.
    """

    steps: list[ReplayStep]
    left_out: dict[str, str]
    state: TrainState
    over: bool


def to_line(reducer: Reducer) -> ToLine:
    """Return what makes the line that is recorded of an event; the reducer tells which metrics come from datasets."""
    iterators = [member for member in reducer.members if isinstance(member, PeriodicDataIteratorCallback)]
    return event_line_builder([pattern for member in iterators for pattern in member.produces or ()], dataset_lengths)


def beginning(recorded: Iterable[RecordedEvent], config: Mapping[str, Any]) -> tuple[TrainState, Run]:
    """Return the state that a recorded run began with, its tensors on the meta device, and what was fixed for it.

    Raises:
        ReplayError: If the record is empty.
    """
    record = _Record(recorded, config)
    return _begun(TrainState(), record.take()), record.run


def producers(own: Sequence[Callback], other: Sequence[Callback]) -> list[Callback]:
    """Return those of a run's own callbacks that produce what others consume and do not produce themselves, in order.

    Example:
        >>> from noether.core.callbacks import LrCallback, MetricCallback, MetricEarlyStopping
        >>> accuracy = MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy")
        >>> patience = MetricEarlyStopping(every_n_epochs=1, metric_key="val/accuracy", tolerance=3)
        >>> [each.name for each in producers([LrCallback(every_n_epochs=1), accuracy], [patience])]
        ['MetricCallback/E1/val/accuracy']
    """
    chosen: list[Callback] = []
    while True:
        said = [declaration_of(each) for each in (*chosen, *other)]
        produced = [pattern for each in said for pattern in each.produces or ()]
        missing = {key for each in said for key in each.required if not any(keys_overlap(p, key) for p in produced)}
        more = [each for each in own if _produces(each, missing) and not any(each is held for held in chosen)]
        if not more:
            return chosen
        chosen = [each for each in own if any(each is held for held in (*chosen, *more))]


def _produces(callback: Callback, keys: Iterable[str]) -> bool:
    return any(keys_overlap(pattern, key) for pattern in declaration_of(callback).produces or () for key in keys)


def replay(
    members: Sequence[Callback],
    recorded: Callable[[], Iterable[RecordedEvent]],
    config: Mapping[str, Any],
    keep: Callable[[ReplayStep], bool] = lambda _: True,
) -> Replayed:
    """Return what callbacks would have done in a run that was recorded.

    Data iterators do not run: at their events, what was measured in the run stands for what they would have measured. A
    callback that needs what was not recorded, such as the values of params, is left out, and so is who consumes what it
    produces. Where the callbacks stop the run earlier than it was stopped, the rest of the record is not looked at.

    Args:
        members: The callbacks, in their order.
        recorded: Returns the events of the run, from its beginning; called again whenever a callback is left out.
        config: The resolved configuration of the run.
        keep: Judges which events are kept; all by default.

    Raises:
        ReplayError: If the record is empty, or events are missing in it.
    """
    left_out: dict[str, str] = {}
    while True:
        staying = [member for member in members if label_of(member) not in left_out]
        try:
            return _replayed(staying, _Record(recorded(), config), keep, left_out)
        except _UnreplayableError as error:
            left_out |= error.reasons


class _UnreplayableError(NoetherError):
    """Callbacks need what was not recorded."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = reasons


class _Record:
    """The events of a run, one after the other; what was measured at the last one, and the state that it left."""

    def __init__(self, recorded: Iterable[RecordedEvent], config: Mapping[str, Any]) -> None:
        self._events = iter(recorded)
        self._config = config
        self.following = next(self._events, None)
        self.measured: Mapping[str, Any] = FrozenDict()
        self.run = Run()
        self.state = TrainState()
        self.time_s = 0.0
        if self.following is None or self.following.state is None:
            raise ReplayError("nothing was recorded of the beginning of the run")

    def take(self) -> RecordedEvent:
        """Return the next event, and go on to the one after it."""
        taken, self.following = self.following, next(self._events, None)
        if taken is None:
            raise ReplayError("the record has ended")
        self.measured, self.time_s = taken.measured, taken.time_s
        if taken.run is not None:
            data = {key.partition("/")[2]: range(length) for key, length in (taken.lengths or {}).items()}
            self.run = Run(**taken.run, config=self._config, data=data)
        return taken

    def made_up(self, kind: type[Event]) -> Event:
        """Return an event that the run did not have, because it did not stop there."""
        self.measured = FrozenDict()
        return kind(run=self.run, time_s=self.time_s)


class _Member:
    """A callback of a replay: who asked for what is noted, and who needs what was not recorded.

    Args:
        callback: Whom it is about.
        asked: Where it is noted who asked for what.
        call: What is called; by default the callback.
    """

    def __init__(self, callback: Callback, asked: list[tuple[str, Effect]], call: Callback | None = None) -> None:
        self._callback, self._asked, self._call = callback, asked, call or callback
        self._name = label_of(callback)

    @property
    def _tracker(self) -> Callback | None:
        tracker = tracker_of(self._callback)
        return None if tracker is None else _Member(self._callback, self._asked, tracker)

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        try:
            after, effects = self._call(state, event)
        except (MetricError, OutputError) as error:
            raise _UnreplayableError({self._name: str(error)}) from error
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise _UnreplayableError({self._name: "it reads the values of params"}) from error
        if effects:
            logged = [value for each in effects if isinstance(each, LogScalars) for value in each.values.values()]
            if any(getattr(value, "is_meta", False) for value in logged):
                raise _UnreplayableError({self._name: "it logs values of params"})
            self._asked.extend((self._name, effect) for effect in effects)
        return after, effects

    def __getattr__(self, name: str) -> Any:
        """Return what the callback says about itself."""
        return getattr(self._callback, name)


class _Measured:
    """Stands for a data iterator: measures what was measured, and says about itself what that one says."""

    def __init__(self, iterator: PeriodicDataIteratorCallback, record: _Record) -> None:
        self._iterator, self._record = iterator, record
        # It reads no weights, so none have to be there.
        self.consumes = tuple(key for key in iterator.consumes if isinstance(key, OptionalKey))

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        if not isinstance(event, AtEval) and self._iterator.gate.opens(state, event) is None:
            return state, ()
        patterns = self._iterator.produces or ()
        values = {
            key: v for key, v in self._record.measured.items() if any(keys_overlap(each, key) for each in patterns)
        }
        return log(state, event, values) if values else (state, ())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def _replayed(
    members: Sequence[Callback], record: _Record, keep: Callable[[ReplayStep], bool], left_out: dict[str, str]
) -> Replayed:
    asked: list[tuple[str, Effect]] = []
    standing = [_Measured(each, record) if isinstance(each, PeriodicDataIteratorCallback) else each for each in members]
    reducer = compose(*(_Member(each, asked) for each in standing))
    steps: list[ReplayStep] = []
    for before, event in _events(record):
        asked.clear()
        try:
            record.state, _ = reducer(before, event)
        except DeclarationError as error:
            raise _UnreplayableError({label_of(each.callback): each.message for each in error.misfits}) from error
        step = ReplayStep(event, before, record.state, (*asked,) if asked else ())
        if keep(step):
            steps.append(step)
    return Replayed(steps, left_out, record.state, over=next_move(record.state, record.run) is Move.NOTHING)


def _events(record: _Record) -> Iterator[tuple[TrainState, Event]]:
    """Yield the events of a run, each with the state that it comes with; the one after it is put into the record."""
    begin = record.take()
    yield _begun(TrainState(), begin), _event(begin, record.run)
    while True:
        state, following = record.state, record.following
        if following is not None and following.kind in _ANY_TIME:
            taken = record.take()
            if next_move(state, record.run) is not Move.NOTHING:  # a process that went on, as this run would have
                yield _begun(state, taken), _event(taken, record.run)
            continue
        move = next_move(state, record.run)
        if move is Move.UPDATE and following is not None and following.kind is AfterTraining:
            record.take()  # what stopped the run does not stop this one
            continue
        if move is Move.NOTHING or (following is None and move is Move.UPDATE):
            return
        yield _moved(state, move, record)


def _begun(state: TrainState, taken: RecordedEvent) -> TrainState:
    """Return the state at the beginning of a process, which has the shapes that the run's state had there."""
    return state if taken.state is None else state.replace(**taken.state)


def _moved(state: TrainState, move: Move, record: _Record) -> tuple[TrainState, Event]:
    """Return what comes next: as it was recorded, and else the end that the run did not have there."""
    following = record.following
    if move is Move.UPDATE:
        taken = record.take()
        event = _event(taken, record.run)
        if taken.kind is AfterAccumulationStep:
            return state, event
        state = state.advance(samples=taken.readings.get("samples", 0))
        if taken.kind is not AfterUpdate or taken.counts != _counts(state):
            there = TrainingIteration(*taken.counts)
            raise ReplayError(f"after {state.previous} the record goes on at {there}: events are missing")
        return state, event
    kind = AfterEpoch if move is Move.END_EPOCH else AfterTraining
    state = state.next_epoch() if move is Move.END_EPOCH else state.replace(ended=True)
    if following is not None and following.kind is kind and following.counts == _counts(state):
        taken = record.take()
        return state, _event(taken, record.run)
    return state, record.made_up(kind)


def _counts(state: TrainState) -> tuple[int, int, int]:
    return state.iteration.epoch, state.iteration.update, state.iteration.sample


def _event(taken: RecordedEvent, run: Run) -> Event:
    """Return an event as it was recorded."""
    return taken.kind.of(**taken.readings, run=run, time_s=taken.time_s)  # a record is long
