"""Checks that a callback is a pure function: its result depends on its arguments only, and it changes nothing else."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from noether.core.callback import label_of
from noether.core.iteration import TrainingIteration
from noether.core.reducer import compose
from noether.core.tensors.tree import storages, tensors
from noether.testing.comparison import differences, same
from noether.testing.counterexamples import LawError
from noether.testing.forbidden_calls import watch_call
from noether.testing.functions import CallbackProxy, copy_callback
from noether.testing.global_settings import GENERATORS, global_settings, keep_settings
from noether.testing.law_runs import check_runs
from noether.testing.metric_source import add_metric_source
from noether.testing.outside_memory import (
    cached_names,
    copy_values,
    marks_of,
    outside_memory,
)
from noether.testing.traces import drive

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.testing.models import ModelArguments
    from noether.testing.traces import Trace

_Value = TypeVar("_Value")
_EXAMPLES: Final = 30
_LONG_END: Final = TrainingIteration(update=60)
_LATE_EPOCH: Final = 10_000
_LATER_S: Final = 2.0**31
"""How many seconds later the second call is: a time that a callback compares with lies between the two."""


class ImpureError(LawError):
    """A callback is not a pure function."""


def check_pure(
    callback: Callback,
    *,
    traces: SearchStrategy[Trace] | None = None,
    examples: int = _EXAMPLES,
    **model: Unpack[ModelArguments],
) -> None:
    """Raise unless `callback` is a pure function: two calls return the same, and nothing else changes.

    A source provides the metrics that it consumes and does not produce. After the random runs come a run of 60 updates
    and the end of a run of 10,000 epochs.

    Args:
        callback: Any callback; the members of a reducer are checked one by one.
        traces: The runs to try; None for all kinds, long enough for the schedules of the callback.
        examples: Largest number of runs to try, >= 1.
        model: What the callback sees of the model: `model=`, `losses=`, `outputs=`, `groups=`, `data=`, `forward=`; see
            `noether.testing.ModelArguments`.

    Raises:
        ImpureError: If two results differ; if the state that it returns depends on `event.time_s`; if the callback
            writes to its arguments, to itself, or to what it refers to (closures, globals of its modules, classes); if
            its memory shares storage with the weights; if it does I/O; if it reads a clock, the process, the time zone
            or an environment variable; if it uses a global random generator or changes a global setting. Calls of
            `logging` and `warnings` are allowed.

    Example:
        >>> import time
        >>> from noether import AfterEpoch, LogText, on
        >>> @on(AfterEpoch)
        ... def dated(state, event):
        ...     return state, (LogText(f"it is {time.time()}"),)
        >>> check_pure(dated)
        Traceback (most recent call last):
        noether.testing.purity.ImpureError: dated reads the clock: time.time(); take the time from the event: ...
    """
    example: list[Trace] = []

    def law(trace: Trace) -> None:
        _drive_purely(callback, trace, None)
        example[:] = [trace]

    check_runs(callback, law, traces=traces, examples=examples, model=model)
    for trace in example:
        _drive_purely(callback, replace(_simplify(trace), run=trace.run.replace(end=_LONG_END)), None)
        _drive_purely(callback, *_start_late(_simplify(trace)))


def _simplify(trace: Trace) -> Trace:
    """Return a trace that starts at update 0, and that nothing interrupts or stops."""
    return replace(trace, first_update=0, interruptions=(), evaluations=(), stop=None)


def _drive_purely(callback: Callback, trace: Trace, state: TrainState | None) -> None:
    """Drive a callback through a run with `call_purely`, from a state or from the start."""
    # A copy, because a callback that writes to itself would carry its writes into the next run.
    members = add_metric_source(copy_callback(callback), finite=trace.finite_metrics).members
    with keep_settings():
        drive(compose(*map(_PurityProxy, members)), trace, state, resumed=state is not None)


def _start_late(trace: Trace) -> tuple[Trace, TrainState]:
    """Return the end of a long run like `trace`, and the state that it starts from."""
    update = _LATE_EPOCH * trace.run.updates_per_epoch
    epoch = trace.run.iteration_after(update).epoch
    late = replace(trace, run=trace.run.replace(end=TrainingIteration(epoch=epoch + 2)), first_update=update)
    return late, late.start()


def call_purely(callback: Callback, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
    """Return the result of `callback`; raise an error if it is impure. It is called twice or three times.

    The second call gets copies of the arguments and a later `event.time_s`, which the returned state may not show.

    Args:
        callback: Any callback.
        state: The state to call it with.
        event: The event to call it with.

    Raises:
        ImpureError: As for `check_pure`.

    Example:
        >>> import torch
        >>> from noether import AfterEpoch, TrainState, log
        >>> call_purely(lambda state, event: log(state, event, {"x": torch.rand(())}), TrainState(), AfterEpoch())
        Traceback (most recent call last):
        noether.testing.purity.ImpureError: <lambda> draws from a global random generator; make a generator from ...
    """
    name = label_of(callback)
    arguments = {"state": vars(state), "event": vars(event), "event.run": vars(event.run)}
    copied, marks = copy_values(arguments), _marks(arguments)
    attributes, memory, settings = _attribute_ids(callback), outside_memory(callback), global_settings()
    modules = len(sys.modules)
    first = watch_call(name, ImpureError, callback, state, event)
    if len(sys.modules) == modules:  # importing a module may change settings, but only once
        _check_settings(name, settings)
    _check_arguments(name, arguments, copied, marks)
    # Memory may return to what it was at the second call, as that of a switch does.
    changed_attributes, changed_memory = _attribute_ids(callback), outside_memory(callback)
    other_state, other_event = _with_fields(state, copied["state"]), _with_fields(event, copied["event"])
    later = other_event.replace(time_s=event.time_s + _LATER_S)
    second = watch_call(name, ImpureError, callback, other_state, later)
    repeated = second if same(first, second) else watch_call(name, ImpureError, callback, other_state, other_event)
    if changed_attributes != attributes:
        raise ImpureError(f"{name} assigns to itself; keep memory in the state: state.remember(...)")
    if not same(first, repeated):
        hint = "keep its memory in the state: state.remember(...)"
        raise ImpureError(f"{name} returns another result when called again with the same arguments; {hint}")
    _check_state(name, first[0], second[0])
    _check_outside(name, memory, changed_memory)
    return first


class _PurityProxy(CallbackProxy):
    """Calls a callback with `call_purely`."""

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        return call_purely(self._callback, state, event)


def _attribute_ids(callback: Callback) -> dict[str, int]:
    """Return the id of each attribute's object, without the values of cached properties."""
    cached = cached_names(type(callback))
    return {name: id(value) for name, value in getattr(callback, "__dict__", {}).items() if name not in cached}


def _with_fields(value: _Value, fields: Mapping[str, Any]) -> _Value:
    """Return an object like `value` with other fields."""
    other = object.__new__(type(value))
    vars(other).update(fields)
    return other


def _marks(arguments: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return marks_of(dict(tensors(arguments)))


def _check_arguments(
    name: str, arguments: Mapping[str, Any], copied: Mapping[str, Any], marks: Mapping[str, Any]
) -> None:
    """Raise if the arguments differ from the copies that were made before the call."""
    found = (path for key in copied for path, _, _ in differences(arguments[key], copied[key], key))
    place = next(found, None)
    if place is None and (now := _marks(arguments)) != marks:
        place = next(key for key in now if now[key] != marks[key])
    if place is not None:
        raise ImpureError(f"{name} writes to its arguments: {place}; return a new state: state.replace(...)")


def _check_state(name: str, state: TrainState, later: TrainState) -> None:
    """Raise if a state differs from the one at a later time, or if its memory shares storage with its weights."""
    for path, one, other in differences(state, later):
        text = f"state{path} depends on event.time_s: {one} at one time, {other} at another"
        raise ImpureError(f"{name}: {text}; the time may enter effects only; measure with event.duration_s")
    weights = storages((state.params, state.buffers, state.opt_state))
    for key, memory in state.callback_states.items():
        if storages(memory) & weights:
            raise ImpureError(
                f"{name}: memory {key!r} shares storage with the params, buffers or opt_state, and changes when they "
                "are updated in place: clone the tensors"
            )


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise if a global generator or another setting of the process has changed."""
    for key, value in global_settings().items():
        if value == settings[key]:
            continue
        if key in GENERATORS:
            hint = "make a generator from the seed: torch.Generator().manual_seed(state.seed)"
            raise ImpureError(f"{name} draws from a global random generator; {hint}")
        raise ImpureError(f"{name} changes {key}; a callback changes nothing but the state that it returns")


def _check_outside(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise if memory outside of the state has changed."""
    for key in (*before, *after):
        if key not in before or key not in after or not same(before[key], after[key]):
            raise ImpureError(
                f"{name} keeps memory outside of the state, in {name}{key}; keep it in the state: "
                "state.remember(...), or use functools.lru_cache for results of a pure function"
            )
