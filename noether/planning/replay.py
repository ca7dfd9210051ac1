"""Replay of a recorded run: calls callbacks with its events again, without model, data or accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from noether.core.callback import OptionalKey, declaration_of, label_of, tracker_of
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.declarations import DeclarationError
from noether.core.effect import LogScalars
from noether.core.errors import NoetherError, OutputError
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, next_move
from noether.core.metric_keys import keys_overlap
from noether.core.metrics import MetricError, log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.effects.logs.events import RecordedEvent

_UNCOUNTED_EVENTS: Final = (BeforeTraining, AtEval)
"""Events that may come at any time, as they do not follow from the counters."""


class ReplayError(NoetherError):
    """A record does not contain what a replay needs."""


class ReplayStep(NamedTuple):
    """One event of a replay.

    Args:
        event: What happened.
        before: The state before the callbacks.
        state: The state after them.
        effects: The effects with the name of their callback, in order.
    """

    event: Event
    before: TrainState
    state: TrainState
    effects: tuple[tuple[str, Effect], ...]


class Replay(NamedTuple):
    """The result of a replay.

    Args:
        steps: The selected events, in order.
        skipped: Why callbacks could not be replayed, by name.
        state: The last state; its params, buffers and optimizer state are on the meta device.
        finished: Whether the callbacks saw the end of the run; False if the record ends before.
    """

    steps: list[ReplayStep]
    skipped: dict[str, str]
    state: TrainState
    finished: bool


def initial_state(recorded: Iterable[RecordedEvent], config: Mapping[str, Any]) -> tuple[TrainState, Run]:
    """Return the first state of a recorded run, its tensors on the meta device, and the run.

    Raises:
        ReplayError: If the record is empty.
    """
    record = _Record(recorded, config)
    return _with_recorded_shapes(TrainState(), record.take()), record.run


def missing_producers(own: Sequence[Callback], other: Sequence[Callback]) -> list[Callback]:
    """Return the run's own callbacks that produce metrics which others consume but do not produce, in order.

    Example:
        >>> from noether.core.callbacks import LrCallback, MetricCallback, MetricEarlyStopping
        >>> accuracy = MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy")
        >>> patience = MetricEarlyStopping(every_n_epochs=1, metric_key="val/accuracy", tolerance=3)
        >>> [each.name for each in missing_producers([LrCallback(every_n_epochs=1), accuracy], [patience])]
        ['MetricCallback/E1/val/accuracy']
    """
    chosen: list[Callback] = []
    while True:
        declared = [declaration_of(each) for each in (*chosen, *other)]
        produced = [pattern for each in declared for pattern in each.produces or ()]
        missing = {key for each in declared for key in each.required if not any(keys_overlap(p, key) for p in produced)}
        more = [each for each in own if _produces(each, missing) and not any(each is known for known in chosen)]
        if not more:
            return chosen
        chosen = [each for each in own if any(each is known for known in (*chosen, *more))]


def _produces(callback: Callback, keys: Iterable[str]) -> bool:
    return any(keys_overlap(pattern, key) for pattern in declaration_of(callback).produces or () for key in keys)


def replay(
    members: Sequence[Callback],
    read_record: Callable[[], Iterable[RecordedEvent]],
    config: Mapping[str, Any],
    select: Callable[[ReplayStep], bool] = lambda _: True,
) -> Replay:
    """Return what callbacks would have done in a recorded run.

    Data iterators do not run: at their events the replay logs the recorded measurements. It skips a callback that
    needs values which are not recorded, such as those of params, and the consumers of its metrics. If the callbacks
    stop the run earlier than it stopped, the rest of the record is ignored.

    Args:
        members: The callbacks, in their order.
        read_record: Returns the events of the run from its start; called again whenever a callback has to be skipped.
        config: The resolved configuration of the run.
        select: Returns whether a step is part of the result; by default all are.

    Raises:
        ReplayError: If the record is empty, or events are missing in it.
    """
    skipped: dict[str, str] = {}
    while True:
        staying = [member for member in members if label_of(member) not in skipped]
        try:
            return _replay_once(staying, _Record(read_record(), config), select, skipped)
        except _UnreplayableError as error:
            skipped |= error.reasons


class _UnreplayableError(NoetherError):
    """Callbacks need values that were not recorded."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = reasons


class _Record:
    """The events of a run one after the other, with the measurements and the state at the last one taken."""

    def __init__(self, recorded: Iterable[RecordedEvent], config: Mapping[str, Any]) -> None:
        self._events = iter(recorded)
        self._config = config
        self.following = next(self._events, None)
        self.measured: Mapping[str, Any] = FrozenDict()
        self.run = Run()
        self.state = TrainState()
        self.time_s = 0.0
        if self.following is None or self.following.state is None:
            raise ReplayError("the record does not contain the start of the run")

    def take(self) -> RecordedEvent:
        """Return the next event and advance."""
        taken, self.following = self.following, next(self._events, None)
        if taken is None:
            raise ReplayError("the record has ended")
        self.measured, self.time_s = taken.measured, taken.time_s
        if taken.run is not None:
            data = {key.partition("/")[2]: range(length) for key, length in (taken.lengths or {}).items()}
            self.run = Run(**taken.run, config=self._config, data=data)
        return taken

    def missing_event(self, kind: type[Event]) -> Event:
        """Return an event that the record lacks, because the recorded run did not end there."""
        self.measured = FrozenDict()
        return kind(run=self.run, time_s=self.time_s)


class _Member:
    """A callback of a replay: collects its effects, and refuses values that were not recorded.

    Args:
        callback: The callback.
        collected: Receives `(name, effect)` for each effect.
        call: Called instead of the callback; for its tracker.
    """

    def __init__(self, callback: Callback, collected: list[tuple[str, Effect]], call: Callback | None = None) -> None:
        self._callback, self._collected, self._call = callback, collected, call or callback
        self._name = label_of(callback)

    @property
    def _tracker(self) -> Callback | None:
        tracker = tracker_of(self._callback)
        return None if tracker is None else _Member(self._callback, self._collected, tracker)

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        try:
            after, effects = self._call(state, event)
        except (MetricError, OutputError) as error:
            raise _UnreplayableError({self._name: str(error)}) from error
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise _UnreplayableError({self._name: "it reads values of params"}) from error
        if effects:
            logged = [value for each in effects if isinstance(each, LogScalars) for value in each.values.values()]
            if any(getattr(value, "is_meta", False) for value in logged):
                raise _UnreplayableError({self._name: "it logs values of params"})
            self._collected.extend((self._name, effect) for effect in effects)
        return after, effects

    def __getattr__(self, name: str) -> Any:
        """Return a declaration of the callback."""
        return getattr(self._callback, name)


class _RecordedIterator:
    """Replaces a data iterator and logs the recorded measurements."""

    def __init__(self, iterator: PeriodicDataIteratorCallback, record: _Record) -> None:
        self._iterator, self._record = iterator, record
        # Unlike the iterator it reads no weights, so none are required.
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


def _replay_once(
    members: Sequence[Callback], record: _Record, select: Callable[[ReplayStep], bool], skipped: dict[str, str]
) -> Replay:
    collected: list[tuple[str, Effect]] = []
    replaced = [
        _RecordedIterator(each, record) if isinstance(each, PeriodicDataIteratorCallback) else each for each in members
    ]
    reducer = compose(*(_Member(each, collected) for each in replaced))
    steps: list[ReplayStep] = []
    for before, event in _events(record):
        collected.clear()
        try:
            record.state, _ = reducer(before, event)
        except DeclarationError as error:
            raise _UnreplayableError({label_of(each.callback): each.message for each in error.misfits}) from error
        step = ReplayStep(event, before, record.state, (*collected,) if collected else ())
        if select(step):
            steps.append(step)
    return Replay(steps, skipped, record.state, finished=next_move(record.state, record.run) is Move.NOTHING)


def _events(record: _Record) -> Iterator[tuple[TrainState, Event]]:
    """Yield the events of a run with the state before callbacks; the caller puts the state after them in the record."""
    first = record.take()
    yield _with_recorded_shapes(TrainState(), first), _make_event(first, record.run)
    while True:
        state, following = record.state, record.following
        if following is not None and following.kind in _UNCOUNTED_EVENTS:
            taken = record.take()
            # The replay resumes where the recorded run did, unless its callbacks ended it earlier.
            if next_move(state, record.run) is not Move.NOTHING:
                yield _with_recorded_shapes(state, taken), _make_event(taken, record.run)
            continue
        move = next_move(state, record.run)
        if move is Move.UPDATE and following is not None and following.kind is AfterTraining:
            record.take()  # the recorded run stopped here, the replay does not
            continue
        if move is Move.NOTHING or (following is None and move is Move.UPDATE):
            return
        yield _make_move(state, move, record)


def _with_recorded_shapes(state: TrainState, taken: RecordedEvent) -> TrainState:
    """Return the state with the shapes that were recorded at the start of a process."""
    return state if taken.state is None else state.replace(**taken.state)


def _make_move(state: TrainState, move: Move, record: _Record) -> tuple[TrainState, Event]:
    """Return the next state and event: the recorded one or, where only the replay ends, a new event."""
    following = record.following
    if move is Move.UPDATE:
        taken = record.take()
        event = _make_event(taken, record.run)
        if taken.kind is AfterAccumulationStep:
            return state, event
        state = state.advance(samples=taken.readings.get("samples", 0))
        if taken.kind is not AfterUpdate or taken.counts != _counts(state):
            recorded_at = TrainingIteration(*taken.counts)
            raise ReplayError(f"after {state.previous} the record continues at {recorded_at}: events are missing")
        return state, event
    kind = AfterEpoch if move is Move.END_EPOCH else AfterTraining
    state = state.next_epoch() if move is Move.END_EPOCH else state.replace(ended=True)
    if following is not None and following.kind is kind and following.counts == _counts(state):
        taken = record.take()
        return state, _make_event(taken, record.run)
    return state, record.missing_event(kind)


def _counts(state: TrainState) -> tuple[int, int, int]:
    return state.iteration.epoch, state.iteration.update, state.iteration.sample


def _make_event(taken: RecordedEvent, run: Run) -> Event:
    """Return the event that was recorded, with its readings."""
    return taken.kind.of(**taken.readings, run=run, time_s=taken.time_s)  # `of` is the fast path: records are long
