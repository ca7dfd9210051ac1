"""Callbacks composed into one: each is called in order, and their effects are collected."""

from __future__ import annotations

import dataclasses
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import (
    attribute_of,
    init_of,
    label_of,
    listens_to,
    memory_names,
    merge_keys,
    parts_of,
    tracker_of,
)
from noether.core.callback_checks import check_bound, check_callback, check_effects, check_result
from noether.core.declarations import check_declarations
from noether.core.effect import DeferredLog
from noether.core.errors import CallbackError, NoetherError, suggest
from noether.core.event import AfterAccumulationStep, AfterUpdate, BeforeTraining
from noether.core.metric_keys import keys_overlap
from noether.core.overwrites import check_overwrites
from noether.core.state import TrainState
from noether.core.tensors.memory import check_memory, check_savable, freeze_memory
from noether.core.tensors.tree import FrozenDict, storages
from noether.core.update_calls import CallsAtUpdates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.state import Memory
    from noether.core.stretch import CompletedUpdate
    from noether.core.update_calls import Call


LOOP_MEMORY: Final = "session"
"""Name of what a loop of a `Session` or of a framework remembers, and prefix of further such names.

It is no callback's memory: a loop that does not claim it, such as a plain one that resumes the run, goes on without it.
"""


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
        check_callback(callback, "compose")
        check_bound(callback)
        members.extend(callback.members if isinstance(callback, Reducer) else [callback])
    return Reducer(tuple(member for member in members if member is not identity))


@final
class Reducer:
    """The callback that `compose` returns.

    On `BeforeTraining` it checks the declarations of its members and fills in missing memory. It raises an error if a
    member changes a field of the state that only the loop may change.
    """

    copies_aliases = True
    """Effects that it returns are copies where they would change with a live model; `dispatch` copies others."""

    def __init__(self, members: tuple[Callback, ...], *, outermost: bool = True) -> None:
        self.members = members
        self._outermost = outermost
        # Both depend on the members and the type only, so threads may fill them in at the same time.
        self._listeners_by_event: dict[type[Event], tuple[Callback, ...]] = {}
        self._selectors: dict[type[Event], Callable[[TrainState], tuple[Call, ...]]] = {}
        self._calls_at_update = CallsAtUpdates(members, AfterUpdate)
        self._selectors[AfterUpdate] = self._calls_at_update.select

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state after all members, and their effects in the same order."""
        if isinstance(event, BeforeTraining) and self._outermost:
            state = self._start(state, event)
        effects: Effects = ()
        requests: tuple[tuple[Callback, Effects], ...] = ()
        member: Callback = identity
        try:
            select = self._selectors.get(type(event)) or self._find_selector(type(event))
            for member, call in select(state):
                result = call(state, event)
                try:
                    after, requested = result
                except (TypeError, ValueError):
                    check_result(member, result)
                    raise
                if after is not state:
                    _check_change(member, state, result, event)
                    if after.stop is not None and state.stop is None and after.stopped_by is None:
                        after = after.replace(stopped_by=label_of(member))
                    state = after
                if requested is not _NO_EFFECTS:
                    check_effects(member, requested)
                    effects += requested
                    requests = (*requests, (member, requested))
            if requests and len(effects) > 1:
                check_overwrites(requests, event)
        except BaseException as error:
            _note_place(error, member, effects, state, event)
            raise
        if effects and isinstance(event, AfterAccumulationStep):
            raise ValueError(f"{effects[0]!r} was requested after an accumulation step; log and save after an update")
        return state, state.copy_aliases(effects) if effects and self._outermost else effects

    @property
    def defers_updates(self) -> bool:
        """Whether `can_defer` returns True for some updates; False if a member has to be called at each."""
        return self._calls_at_update.deferred is not None

    def can_defer(self, state: TrainState, event: AfterUpdate) -> bool:
        """Return whether the members can be called later for an update, by `after_updates`.

        Args:
            state: The state after the update, in which the members' memory lacks the updates deferred before.
            event: The event of the update.

        Example:
            >>> from noether import TrainState, every_n_updates
            >>> reducer = compose(every_n_updates(2)(lambda state, event: (state, ())))
            >>> state, event = TrainState().advance(samples=4), AfterUpdate(samples=4)
            >>> [reducer.can_defer(each, event) for each in (state, state.advance(samples=4))]
            [True, False]
        """
        return self._calls_at_update.can_defer(state, event)

    def after_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Return the state and the effects after several deferred updates, with one call of each member.

        Args:
            state: The state after the last of the updates, or a later one that no member has seen.
            updates: Consecutive updates, for each of which `can_defer` returned True.

        Raises:
            CallbackError: If a member changes what the next update reads, or requests other effects than `LogUpdates`
                and `LogUpdateText`: both would come too late.

        Example:
            >>> from noether import OnlineLossCallback, TrainState
            >>> from noether.core.stretch import CompletedUpdate
            >>> reducer = compose(OnlineLossCallback(every_n_epochs=1))
            >>> state, updates = reducer(TrainState(), BeforeTraining())[0], []
            >>> for loss in (0.5, 1.5):
            ...     state = state.advance(samples=4)
            ...     updates.append(CompletedUpdate(state.iteration, AfterUpdate(samples=4, losses={"total": loss})))
            >>> state, effects = reducer.after_updates(state, updates)
            >>> state.memory("OnlineLossCallback/E1")["sums"]["total"]
            tensor(8., dtype=torch.float64)
        """
        requests: list[tuple[Callback, Effects]] = []
        effects: Effects = ()
        event = updates[-1].event
        member: Callback = identity
        try:
            for member, call in self._calls_at_update.deferred or ():
                after, requested = check_result(member, call(state, updates))
                _check_deferred_result(member, state, after, requested)
                state = after
                effects += requested
                requests += [(member, requested)] if requested else []
            if len(requests) > 1:
                check_overwrites(requests, event)
        except BaseException as error:
            _note_place(error, member, effects, state, event)
            raise
        return state, effects

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.members, self._outermost)

    def __repr__(self) -> str:
        return f"compose({', '.join(map(label_of, self.members))})"

    def without_checks(self) -> Reducer:
        """Return the reducer for use inside another one, which checks declarations and fills in memory for it."""
        return Reducer(self.members, outermost=False)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return the memory that the members start with, by name."""
        return FrozenDict({name: memory for member in self.members for name, memory in init_of(member, state).items()})

    def members_called(self, state: TrainState, event_type: type[Event]) -> tuple[Callback, ...]:
        """Return the members that it calls at an event of this type: a function of their schedules and the iteration.

        Example:
            >>> from noether import TrainState, every_n_updates
            >>> reducer = compose(every_n_updates(2)(lambda state, event: (state, ())))
            >>> state = TrainState().advance(samples=4)
            >>> [len(reducer.members_called(each, AfterUpdate)) for each in (state, state.advance(samples=4))]
            [0, 1]
        """
        return tuple(member for member, _ in self._find_selector(event_type)(state))

    def reads(self, reading: str, state: TrainState) -> bool:
        """Return whether a member that it calls at the `AfterUpdate` of a state declares a reading.

        Args:
            reading: Name of the reading.
            state: The state after the update, of which only the counters matter.

        Example:
            >>> from noether import HistogramCallback, TrainState
            >>> reducer = compose(HistogramCallback(every_n_updates=2, of=("gradients",)))
            >>> state = TrainState().advance(samples=4)
            >>> [reducer.reads("gradients", each) for each in (state, state.advance(samples=4))]
            [False, True]
        """
        return any(reading in attribute_of(each, "readings") for each in self.members_called(state, AfterUpdate))

    @property
    def produces(self) -> tuple[str, ...] | None:
        """Patterns of the metric keys that the members log; None if one of them may log any."""
        produced = [attribute_of(member, "produces") for member in self.members]
        return None if None in produced else tuple(key for keys in produced for key in keys or ())

    @property
    def consumes(self) -> tuple[str, ...]:
        """Metric keys that a member consumes and no member before it produces."""
        keys: list[str] = []
        produced: list[str] | None = []  # None after a member that may produce any key
        for member in self.members:
            if produced is not None:
                consumed, made = attribute_of(member, "consumes"), attribute_of(member, "produces")
                keys += [k for k in consumed if not any(keys_overlap(p, k) for p in produced)]
                produced = None if made is None else [*produced, *made]
        return merge_keys(*keys)

    @property
    def readings(self) -> tuple[str, ...]:
        """Costly fields of `AfterUpdate` that a member reads; a loop need not compute the others."""
        return tuple(dict.fromkeys(name for member in self.members for name in attribute_of(member, "readings")))

    @property
    def effects(self) -> tuple[type[Effect], ...]:
        """Types of effects that the members declare."""
        return tuple(dict.fromkeys(kind for member in self.members for kind in attribute_of(member, "effects")))

    @property
    def _tracker(self) -> Callback | None:
        return None if all(tracker_of(member) is None for member in self.members) else self

    def _listens(self, event_type: type[Event]) -> bool:
        return bool(self._listeners(event_type))

    def _listeners(self, event_type: type[Event]) -> tuple[Callback, ...]:
        if event_type not in self._listeners_by_event:
            self._listeners_by_event[event_type] = tuple(m for m in self.members if listens_to(m, event_type))
        return self._listeners_by_event[event_type]

    @property
    def _inside(self) -> tuple[Callback, ...]:
        return self.members

    @property
    def _parts(self) -> tuple[Callback, ...]:
        return tuple(part for member in self.members for part in parts_of(member))

    def _memory_names(self, state: TrainState) -> tuple[str, ...]:
        return tuple(name for member in self.members for name in memory_names(member, state))

    def _find_selector(self, event_type: type[Event]) -> Callable[[TrainState], tuple[Call, ...]]:
        """Return the function that selects what to call at an event of this type."""
        if event_type in self._selectors:
            return self._selectors[event_type]
        calls = tuple((member, member) for member in self._listeners(event_type))
        at_update = issubclass(event_type, AfterUpdate)
        selector = CallsAtUpdates(self.members, event_type).select if at_update else lambda _: calls
        self._selectors[event_type] = selector
        return selector

    def _start(self, state: TrainState, event: BeforeTraining) -> TrainState:
        """Check the declarations, and return the state with missing memory filled in."""
        check_declarations(self.members, state, event.run)
        initial = self.init(state)
        if event.resumed:
            state = _drop_memory_of_loops(state, initial)
            _check_claimed(state, initial)
        missing = {name: memory for name, memory in initial.items() if name not in state.callback_states}
        if not missing:
            return state
        _check_new_memory(missing, state)
        frozen = {name: freeze_memory(name, memory) for name, memory in missing.items()}
        return state.replace(callback_states=FrozenDict({**state.callback_states, **frozen}))


def _rebuild(members: tuple[Callback, ...], outermost: bool) -> Reducer:  # noqa: FBT001  # pickle passes it by position
    return Reducer(members, outermost=outermost)


_NO_EFFECTS: Final[Effects] = ()
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
    """Attach the effects of the callbacks before, and a note that names the callback unless an inner reducer did."""
    if _REMAINING_EFFECTS not in vars(error):
        error.add_note(f"raised by the callback {label_of(member)!r} at {state.iteration}, {type(event).__name__}")
    attach_effects(error, effects + remaining_effects(error))


_DEFERRABLE_FIELDS: Final = frozenset({"callback_states", "metrics"})
"""Fields of a state that a callback may change for deferred updates, because no update reads them."""
_OTHER_FIELDS: Final = tuple(
    each.name for each in dataclasses.fields(TrainState) if each.name not in _DEFERRABLE_FIELDS
)
_LOOP_FIELDS: Final = (
    "iteration", "previous", "epoch_start", "epoch_batches", "seed", "ended", "pending", "lengths",
)  # fmt: skip
"""Fields of a state that only the loop may change."""
# Each reads all fields in one call, because it runs after every call of a member.
_read_other_fields, _read_loop_fields = itemgetter(*_OTHER_FIELDS), attrgetter(*_LOOP_FIELDS)


def _check_change(member: Callback, before: TrainState, result: tuple[TrainState, Effects], event: Event) -> None:
    after, _ = result
    if type(after) is not type(before):
        check_result(member, result)
    if not all(map(is_, _read_loop_fields(after), _read_loop_fields(before))):
        name = next(each for each in _LOOP_FIELDS if getattr(after, each) is not getattr(before, each))
        raise ValueError(f"{label_of(member)} changed state.{name}, which only the loop may change")
    if after.hyperparams is not before.hyperparams:
        check_savable("hyperparams", after.hyperparams)
    if isinstance(event, BeforeTraining) and event.resumed:
        raise ValueError(
            f"{label_of(member)} changed the state in a resumed BeforeTraining; it may only return effects"
        )


def _check_deferred_result(member: Callback, before: TrainState, after: TrainState, effects: Effects) -> None:
    """Raise if a call for deferred updates changed or requested what comes too late after them."""
    old, new = vars(before), vars(after)
    is_unchanged = all(map(is_, _read_other_fields(new), _read_other_fields(old)))
    late = [] if is_unchanged else [f"changed state.{name}" for name in _OTHER_FIELDS if new[name] is not old[name]]
    late += [f"requested {effect!r}" for effect in effects if not isinstance(effect, DeferredLog)]
    if late:
        raise CallbackError(
            f"{label_of(member)} {late[0]} for deferred updates, which comes too late: let can_defer return False "
            "for such an update, or define track_after_update_step in place of track_updates"
        )


def _drop_memory_of_loops(state: TrainState, initial: Mapping[str, Any]) -> TrainState:
    """Return the state without what another kind of loop remembered: it is outdated once that loop resumes again."""
    names = set(state.callback_states) - set(initial)
    return state.forget(*(name for name in names if name.partition("/")[0] == LOOP_MEMORY))


def _check_claimed(state: TrainState, initial: Mapping[str, Any]) -> None:
    for name in state.callback_states:
        if name not in initial:
            raise UnclaimedMemoryError(
                f"the saved run contains memory of {name!r}, which no callback claims{suggest(name, initial) or '.'} "
                f"Give a callback that id, or drop the memory with --drop-memory {name}, in Python with "
                f"drop_memory=[{name!r}] of noether.open_run or noether.train"
            )


def _check_new_memory(missing: Mapping[str, Any], state: TrainState) -> None:
    model = storages((state.params, state.buffers, state.opt_state))
    for name, memory in missing.items():
        check_memory(name, memory)
        if storages(memory) & model:
            raise ValueError(f"memory {name!r} shares storage with the params, buffers or opt_state: clone the tensors")
