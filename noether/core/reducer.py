"""Callbacks composed into one callback: a fold over them, in order, that collects what they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import (
    call_while_closed,
    check_readings,
    declaration_of,
    init_of,
    label_of,
    listens_to,
    merge_keys,
    tracker_of,
)
from noether.core.declarations import check_declarations
from noether.core.errors import NoetherError, suggest
from noether.core.event import AfterAccumulationStep, AfterUpdate, BeforeTraining
from noether.core.metrics import keys_overlap
from noether.core.schedules.window import ALWAYS, START, Thresholds
from noether.core.tensors.tree import FrozenDict, check_memory, freeze, storages

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.schedules.base import Schedule
    from noether.core.state import Memory, TrainState

    _Call = tuple[Callback, Callback]  # a member, and what is called in its place


class UnclaimedMemoryError(NoetherError, LookupError):
    """A saved run holds the memory of a callback that is not there."""


def identity(state: TrainState, event: Event) -> tuple[TrainState, Effects]:  # noqa: ARG001  # a callback takes both
    """Return the state as it is and ask for nothing: the unit of `compose`."""
    return state, ()


def compose(*callbacks: Callback) -> Reducer:
    """Return the callback that calls `callbacks` in order, each on the state that the one before it left.

    It nests, and composition is associative: `compose(a, compose(b, c))` does what `compose(compose(a, b), c)` does.

    Args:
        callbacks: Any callbacks, other reducers among them; a bare function is called on every event.

    Raises:
        TypeError: If one of them cannot be called, or is a class in place of an object.
        SettingsError: If one of them declares an unknown reading.

    Example:
        >>> from noether import AfterUpdate, LogText, TrainState, compose, every_n_updates
        >>> @every_n_updates(2)
        ... def say(state, event):
        ...     return state, (LogText(str(state.iteration)),)
        >>> reducer = compose(say)
        >>> state = TrainState().advance(samples=4).advance(samples=4)
        >>> reducer(state, AfterUpdate(samples=4))[1]
        (LogText(text='E0_U2_S8'),)
    """
    members: list[Callback] = []
    for callback in callbacks:
        if isinstance(callback, type) or not callable(callback):
            raise TypeError(f"compose takes callbacks (state, event) -> (state, effects), got {callback!r}")
        check_readings(callback)
        members.extend(callback.members if isinstance(callback, Reducer) else [callback])
    return Reducer(tuple(member for member in members if member is not identity))


@final
class Reducer:
    """The callback that `compose` returns.

    On `BeforeTraining` it checks that its members fit together and fills in the memory that is missing. A member that
    changes what only the loop may change is refused by name.
    """

    def __init__(self, members: tuple[Callback, ...], *, outermost: bool = True) -> None:
        self.members = members
        self._outermost = outermost
        self._listening: dict[type[Event], tuple[Callback, ...]] = {}
        self._acting: dict[type[Event], tuple[_Call, ...]] = {}
        # At updates, in order: a member, what is called of it while it is not due, and its place among those that wait.
        self._at_updates: list[tuple[Callback, Callback | None, int | None]] = []
        pending: list[Schedule] = []
        for member in members:
            closed, schedule = call_while_closed(member), _read_at_updates(member)
            if schedule is None or closed is member or _is_always_due(schedule):
                self._at_updates.append((member, closed if schedule is None else member, None))
            else:
                self._at_updates.append((member, closed, len(pending)))
                pending.append(schedule)
        self._pending = PendingSchedules(pending)
        self._idling = self._update_calls(())

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state after every member has had its say, and all that they ask for, in their order."""
        if isinstance(event, BeforeTraining) and self._outermost:
            state = self._prepare(state, event)
        effects: Effects = ()
        for member, call in self._calls(state, type(event)):
            after, asked = call(state, event)
            if after is not state:
                _check_change(member, state, after, event)
                state = after
            if asked:
                effects += asked
        if effects and isinstance(event, AfterAccumulationStep):
            raise ValueError(f"nothing can be logged or saved after an accumulation step; {effects[0]!r} was asked for")
        return state, effects

    def __repr__(self) -> str:
        return f"compose({', '.join(map(label_of, self.members))})"

    def nested(self) -> Reducer:
        """Return the reducer as a part of another callback, which then checks and fills in memory for it."""
        return Reducer(self.members, outermost=False)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return the memory that the members begin with, by name."""
        return FrozenDict({name: memory for member in self.members for name, memory in init_of(member, state).items()})

    @property
    def produces(self) -> tuple[str, ...] | None:
        """Patterns of the metric keys that the members log; None if one of them does not say."""
        said = [declaration_of(member).produces for member in self.members]
        return None if None in said else tuple(key for keys in said for key in keys or ())

    @property
    def consumes(self) -> tuple[str, ...]:
        """Metric keys that a member consumes and no member before it produces."""
        keys: list[str] = []
        produced: list[str] | None = []  # None once a member does not say: it may produce any
        for declared in map(declaration_of, self.members):
            if produced is not None:
                keys += [k for k in declared.consumes if not any(keys_overlap(p, k) for p in produced)]
                produced = None if declared.produces is None else [*produced, *declared.produces]
        return merge_keys(*keys)

    @property
    def readings(self) -> tuple[str, ...]:
        """Costly fields of `AfterUpdate` that a member needs; a loop need not read the others."""
        return tuple(dict.fromkeys(name for member in self.members for name in declaration_of(member).readings))

    @property
    def _tracker(self) -> Callback | None:
        return None if all(tracker_of(member) is None for member in self.members) else self

    def _listens(self, event_type: type[Event]) -> bool:
        return bool(self._listeners(event_type))

    def _listeners(self, event_type: type[Event]) -> tuple[Callback, ...]:
        if event_type not in self._listening:
            self._listening[event_type] = tuple(m for m in self.members if listens_to(m, event_type))
        return self._listening[event_type]

    def _calls(self, state: TrainState, event_type: type[Event]) -> tuple[_Call, ...]:
        if event_type is AfterUpdate:
            due = self._pending.due(state.previous, state.iteration)
            return self._update_calls(due) if due else self._idling
        if event_type not in self._acting:
            self._acting[event_type] = tuple((member, member) for member in self._listeners(event_type))
        return self._acting[event_type]

    def _update_calls(self, due: Iterable[int]) -> tuple[_Call, ...]:
        """Return what is called at an update at which the members at some places may be due."""
        due = frozenset(due)
        calls = ((member, member if place in due else idle) for member, idle, place in self._at_updates)
        return tuple((member, call) for member, call in calls if call is not None)

    def _prepare(self, state: TrainState, event: BeforeTraining) -> TrainState:
        check_declarations(self.members, state, event.run)
        initial = self.init(state)
        if event.resumed:
            _check_claimed(state, initial)
        missing = {name: freeze(memory) for name, memory in initial.items() if name not in state.callback_states}
        if not missing:
            return state
        _check_new_memory(missing, state)
        return state.replace(callback_states=FrozenDict({**state.callback_states, **missing}))


@final
class PendingSchedules:
    """Finds the schedules that may be due at an update without asking each of them.

    It caches the next threshold of each schedule. The answers are a pure function of schedules and iterations, so a
    state may be taken back to an earlier iteration.

    Args:
        schedules: Schedules that are read at updates.

    Example:
        >>> from noether import EveryNUpdates, TrainingIteration
        >>> pending = PendingSchedules([EveryNUpdates(2), EveryNUpdates(3)])
        >>> at = TrainingIteration
        >>> [pending.due(at(update=u - 1), at(update=u)) for u in range(1, 7)]
        [(), (0,), (1,), (0,), (), (0, 1)]
    """

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = schedules
        self._since = START
        self._following = [schedule.next_due(START) for schedule in schedules]
        self._first = _earliest(self._following)

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> tuple[int, ...]:
        """Return the positions of the schedules that may be due at the update from `previous` to `iteration`."""
        if not previous.reached(self._since):
            self._following = [schedule.next_due(previous) for schedule in self._schedules]
            self._since, self._first = previous, _earliest(self._following)
        if not self._first.reached(iteration):
            return ()
        reached = tuple(index for index, each in enumerate(self._following) if each.reached(iteration))
        for index in reached:
            self._following[index] = self._schedules[index].next_due(iteration)
        self._since, self._first = iteration, _earliest(self._following)
        return reached


def _earliest(thresholds: Iterable[Thresholds]) -> Thresholds:
    counts = zip(*((each.epoch, each.update, each.sample) for each in thresholds), strict=True)
    return Thresholds(*(min((count for count in each if count is not None), default=None) for each in counts))


def _read_at_updates(member: Callback) -> Schedule | None:
    """Return the schedule of a member's gate, as far as it is read at updates."""
    gate = declaration_of(member).gate
    return None if gate is None else gate.parts.get(AfterUpdate)


def _is_always_due(schedule: Schedule) -> bool:
    return any(each.interval == 1 and each.window == ALWAYS for each in schedule.members)


_LOOPS: Final = ("iteration", "previous", "seed", "ended")
"""Fields of a state that only the loop may change."""


def _check_change(member: Callback, before: TrainState, after: TrainState, event: Event) -> None:
    if (
        after.iteration is not before.iteration
        or after.previous is not before.previous
        or after.seed is not before.seed
        or after.ended is not before.ended
    ):
        name = next(each for each in _LOOPS if getattr(after, each) is not getattr(before, each))
        raise ValueError(f"{label_of(member)} changed state.{name}, which only the loop may change")
    if isinstance(event, BeforeTraining) and event.resumed:
        raise ValueError(
            f"{label_of(member)} changed the state of a resumed run before training; it may ask for effects"
        )


def _check_claimed(state: TrainState, initial: Mapping[str, Any]) -> None:
    for name in state.callback_states:
        if name not in initial:
            raise UnclaimedMemoryError(
                f"the saved run holds the memory of {name!r}, which no callback claims{suggest(name, initial) or '.'} "
                f"Give a callback that id, or accept the loss with --drop-memory {name}"
            )


def _check_new_memory(missing: Mapping[str, Any], state: TrainState) -> None:
    theirs = storages((state.params, state.buffers, state.opt_state))
    for name, memory in missing.items():
        check_memory(name, memory)
        if storages(memory) & theirs:
            raise ValueError(f"memory {name!r} shares storage with the params, buffers or opt_state: clone the tensors")
