"""Callbacks composed into one: each is called in order, and their effects are collected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import (
    callable_while_closed,
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
from noether.core.schedules.window import ALWAYS, START, earliest_thresholds
from noether.core.tensors.memory import check_memory, check_savable, freeze_memory
from noether.core.tensors.tree import FrozenDict, storages

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.schedules.base import Schedule
    from noether.core.state import Memory, TrainState

    _Call = tuple[Callback, Callback]  # a member, and the callable to call for it


class UnclaimedMemoryError(NoetherError, LookupError):
    """A saved run contains the memory of a callback that the resumed run does not have."""


def identity(state: TrainState, event: Event) -> tuple[TrainState, Effects]:  # noqa: ARG001  # a callback takes both
    """Return the state unchanged and no effects: the unit of `compose`."""
    return state, ()


def compose(*callbacks: Callback) -> Reducer:
    """Return the callback that calls `callbacks` in order, each with the state that the previous one returned.

    Reducers nest, and composition is associative: `compose(a, compose(b, c))` equals `compose(compose(a, b), c)`.

    Args:
        callbacks: Any callbacks, reducers included; a bare function is called on every event.

    Raises:
        TypeError: If one of them is not callable, or is a class instead of an instance.
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

    On `BeforeTraining` it checks the declarations of its members and fills in missing memory. It raises an error if a
    member changes a field of the state that only the loop may change.
    """

    def __init__(self, members: tuple[Callback, ...], *, outermost: bool = True) -> None:
        self.members = members
        self._outermost = outermost
        self._listeners_by_event: dict[type[Event], tuple[Callback, ...]] = {}
        self._calls_by_event: dict[type[Event], tuple[_Call, ...]] = {}
        # For updates, in order: a member, the callable to call while it is not due, and its index in `_pending`.
        self._at_updates: list[tuple[Callback, Callback | None, int | None]] = []
        pending: list[Schedule] = []
        for member in members:
            closed, schedule = callable_while_closed(member), _schedule_at_updates(member)
            if schedule is None or closed is member or _is_always_due(schedule):
                self._at_updates.append((member, closed if schedule is None else member, None))
            else:
                self._at_updates.append((member, closed, len(pending)))
                pending.append(schedule)
        self._pending = PendingSchedules(pending)
        self._calls_while_closed = self._update_calls(())  # the calls of most updates, at which no gate opens

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state after all members, and their effects in the same order."""
        if isinstance(event, BeforeTraining) and self._outermost:
            state = self._start(state, event)
        effects: Effects = ()
        member: Callback = identity
        try:
            for member, call in self._calls(state, type(event)):
                result = call(state, event)
                try:
                    after, requested = result
                except (TypeError, ValueError):
                    raise TypeError(_describe_result(member, result)) from None
                if after is not state:
                    _check_change(member, state, after, event)
                    if after.stop is not None and state.stop is None and after.stopped_by is None:
                        after = after.replace(stopped_by=label_of(member))
                    state = after
                if requested:
                    effects += requested
        except BaseException as error:
            _note_place(error, member, effects, state, event)
            raise
        if effects and isinstance(event, AfterAccumulationStep):
            raise ValueError(f"{effects[0]!r} was requested after an accumulation step; log and save after an update")
        return state, effects

    def __repr__(self) -> str:
        return f"compose({', '.join(map(label_of, self.members))})"

    def without_checks(self) -> Reducer:
        """Return the reducer for use inside another one, which checks declarations and fills in memory for it."""
        return Reducer(self.members, outermost=False)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return the memory that the members start with, by name."""
        return FrozenDict({name: memory for member in self.members for name, memory in init_of(member, state).items()})

    @property
    def produces(self) -> tuple[str, ...] | None:
        """Patterns of the metric keys that the members log; None if one of them may log any."""
        produced = [declaration_of(member).produces for member in self.members]
        return None if None in produced else tuple(key for keys in produced for key in keys or ())

    @property
    def consumes(self) -> tuple[str, ...]:
        """Metric keys that a member consumes and no member before it produces."""
        keys: list[str] = []
        produced: list[str] | None = []  # None after a member that may produce any key
        for declared in map(declaration_of, self.members):
            if produced is not None:
                keys += [k for k in declared.consumes if not any(keys_overlap(p, k) for p in produced)]
                produced = None if declared.produces is None else [*produced, *declared.produces]
        return merge_keys(*keys)

    @property
    def readings(self) -> tuple[str, ...]:
        """Costly fields of `AfterUpdate` that a member reads; a loop need not compute the others."""
        return tuple(dict.fromkeys(name for member in self.members for name in declaration_of(member).readings))

    @property
    def _tracker(self) -> Callback | None:
        return None if all(tracker_of(member) is None for member in self.members) else self

    def _listens(self, event_type: type[Event]) -> bool:
        return bool(self._listeners(event_type))

    def _listeners(self, event_type: type[Event]) -> tuple[Callback, ...]:
        if event_type not in self._listeners_by_event:
            self._listeners_by_event[event_type] = tuple(m for m in self.members if listens_to(m, event_type))
        return self._listeners_by_event[event_type]

    def _calls(self, state: TrainState, event_type: type[Event]) -> tuple[_Call, ...]:
        if event_type is AfterUpdate:
            due = self._pending.due(state.previous, state.iteration)
            return self._update_calls(due) if due else self._calls_while_closed
        if event_type not in self._calls_by_event:
            self._calls_by_event[event_type] = tuple((member, member) for member in self._listeners(event_type))
        return self._calls_by_event[event_type]

    def _update_calls(self, due: Iterable[int]) -> tuple[_Call, ...]:
        """Return the calls at an update; `due` are the indices in `_pending` of the members that may be due."""
        due = frozenset(due)
        calls = ((member, member if index in due else closed) for member, closed, index in self._at_updates)
        return tuple((member, call) for member, call in calls if call is not None)

    def _start(self, state: TrainState, event: BeforeTraining) -> TrainState:
        """Check the declarations, and return the state with missing memory filled in."""
        check_declarations(self.members, state, event.run)
        initial = self.init(state)
        if event.resumed:
            _check_claimed(state, initial)
        missing = {name: memory for name, memory in initial.items() if name not in state.callback_states}
        if not missing:
            return state
        _check_new_memory(missing, state)
        frozen = {name: freeze_memory(name, memory) for name, memory in missing.items()}
        return state.replace(callback_states=FrozenDict({**state.callback_states, **frozen}))


@final
class PendingSchedules:
    """Finds the schedules that may be due at an update without evaluating each of them.

    It caches the next threshold of each schedule. Its results are a pure function of schedules and iterations, so a
    run may return to an earlier iteration.

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
        self._since = START  # the cached thresholds are the next ones after this iteration
        self._following = [schedule.next_due(START) for schedule in schedules]
        self._first = earliest_thresholds(self._following)

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> tuple[int, ...]:
        """Return the positions of the schedules that may be due at the update from `previous` to `iteration`."""
        if not previous.reached(self._since):
            self._following = [schedule.next_due(previous) for schedule in self._schedules]
            self._since, self._first = previous, earliest_thresholds(self._following)
        if not self._first.reached(iteration):
            return ()
        reached = tuple(index for index, each in enumerate(self._following) if each.reached(iteration))
        for index in reached:
            self._following[index] = self._schedules[index].next_due(iteration)
        self._since, self._first = iteration, earliest_thresholds(self._following)
        return reached


def _schedule_at_updates(member: Callback) -> Schedule | None:
    """Return the part of a member's schedule that its gate reads at updates."""
    gate = declaration_of(member).gate
    return None if gate is None else gate.parts.get(AfterUpdate)


def _is_always_due(schedule: Schedule) -> bool:
    return any(each.interval == 1 and each.window == ALWAYS for each in schedule.members)


_REMAINING_EFFECTS: Final = "_noether_effects"


def remaining_effects(error: BaseException) -> Effects:
    """Return the effects that were requested at the event of `error`, and that no handler has run.

    If a callback raised the error, they are those of the callbacks before it; if a handler raised it, those after the
    effect that it handled.

    Example:
        >>> from noether import AfterTraining, LogText, TrainState
        >>> def fail(state, event):
        ...     raise IndexError("no such batch")
        >>> try:
        ...     compose(lambda state, event: (state, (LogText("first"),)), fail)(TrainState(), AfterTraining())
        ... except IndexError as error:
        ...     remaining_effects(error), error.__notes__
        ((LogText(text='first'),), ["raised by the callback 'fail' at E0_U0_S0, AfterTraining"])
    """
    effects: Effects = vars(error).get(_REMAINING_EFFECTS, ())
    return effects


def attach_effects(error: BaseException, effects: Effects) -> None:
    """Attach to an error the effects that were requested at its event, and that no handler has run."""
    vars(error)[_REMAINING_EFFECTS] = effects


def _note_place(error: BaseException, member: Callback, effects: Effects, state: TrainState, event: Event) -> None:
    """Add a note that names the callback, and the effects of those before it; an inner reducer did so before."""
    if _REMAINING_EFFECTS not in vars(error):
        error.add_note(f"raised by the callback {label_of(member)!r} at {state.iteration}, {type(event).__name__}")
    attach_effects(error, effects + remaining_effects(error))


_LOOP_FIELDS: Final = (
    "iteration", "previous", "epoch_start", "epoch_batches", "seed", "ended", "pending", "lengths",
)  # fmt: skip
"""Fields of a state that only the loop may change."""


def _describe_result(member: Callback, result: Any) -> str:
    return (
        f"{label_of(member)} returned {'None' if result is None else f'a {type(result).__name__}'}, not "
        "(state, effects): write `return state, ()` where it does nothing"
    )


def _check_change(member: Callback, before: TrainState, after: TrainState, event: Event) -> None:
    if (
        after.iteration is not before.iteration
        or after.previous is not before.previous
        or after.seed is not before.seed
        or after.ended is not before.ended
        or after.pending is not before.pending
        or after.epoch_start is not before.epoch_start
        or after.epoch_batches is not before.epoch_batches
        or after.lengths is not before.lengths
    ):
        name = next(each for each in _LOOP_FIELDS if getattr(after, each) is not getattr(before, each))
        raise ValueError(f"{label_of(member)} changed state.{name}, which only the loop may change")
    if after.hyperparams is not before.hyperparams:
        check_savable("hyperparams", after.hyperparams)
    if isinstance(event, BeforeTraining) and event.resumed:
        raise ValueError(
            f"{label_of(member)} changed the state in a resumed BeforeTraining; it may only return effects"
        )


def _check_claimed(state: TrainState, initial: Mapping[str, Any]) -> None:
    for name in state.callback_states:
        if name not in initial:
            raise UnclaimedMemoryError(
                f"the saved run contains memory of {name!r}, which no callback claims{suggest(name, initial) or '.'} "
                f"Give a callback that id, or drop the memory with --drop-memory {name}"
            )


def _check_new_memory(missing: Mapping[str, Any], state: TrainState) -> None:
    model = storages((state.params, state.buffers, state.opt_state))
    for name, memory in missing.items():
        check_memory(name, memory)
        if storages(memory) & model:
            raise ValueError(f"memory {name!r} shares storage with the params, buffers or opt_state: clone the tensors")
