"""Checks that a callback is a pure function: its result depends on its arguments only, and it changes nothing else."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import inspect
import random
import sys
import threading
import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Never

import numpy as np
import torch

from noether.core.callback import label_of
from noether.core.reducer import compose
from noether.core.tensors.torch_internals import write_counts
from noether.core.tensors.tree import tensors
from noether.testing.comparison import same
from noether.testing.counterexamples import LawError, assert_law
from noether.testing.metric_source import add_metric_source
from noether.testing.strategies import runs
from noether.testing.traces import drive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.testing.traces import Trace


_EXAMPLES: Final = 30


class ImpureError(LawError):
    """A callback is not a pure function."""


def check_pure(callback: Callback, *, traces: SearchStrategy[Trace] | None = None, examples: int = _EXAMPLES) -> None:
    """Raise unless `callback` is a pure function: two calls return the same, and nothing else changes.

    A source provides the metrics that it consumes and does not produce.

    Args:
        callback: Any callback; the members of a reducer are checked one by one.
        traces: The runs to try; None for all kinds.
        examples: Largest number of runs to try, >= 1.

    Raises:
        ImpureError: If two results differ; if the callback writes to the state, the event or itself; if it opens a
            file, a socket or a process, reads a clock, or draws from a global random generator.

    Example:
        >>> from noether import AfterEpoch, LogText, on
        >>> @on(AfterEpoch)
        ... def dated(state, event):
        ...     return state, (LogText(f"it is {time.time()}"),)
        >>> check_pure(dated)
        Traceback (most recent call last):
        noether.testing.purity.ImpureError: dated reads the clock: time.time(); take the time from the event: ...
    """

    def law(trace: Trace) -> None:
        # A copy, because a callback that writes to itself would carry its writes into the next example.
        members = add_metric_source(copy.deepcopy(callback)).members
        drive(compose(*map(_PurityChecked, members)), trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def call_purely(callback: Callback, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
    """Return the result of `callback`; raise an error if it is impure. It is called twice, the second time watched.

    Args:
        callback: Any callback.
        state: The state to call it with.
        event: The event to call it with.

    Raises:
        ImpureError: As for `check_pure`.

    Example:
        >>> from noether import AfterEpoch, TrainState, log
        >>> call_purely(lambda state, event: log(state, event, {"x": torch.rand(())}), TrainState(), AfterEpoch())
        Traceback (most recent call last):
        noether.testing.purity.ImpureError: <lambda> draws from a global random generator; make a generator from ...
    """
    name = label_of(callback)
    fields = (_fields(state), _fields(event))
    state_before, writes, attributes = copy.deepcopy(fields[0]), _write_counts(fields), _attribute_ids(callback)
    first = callback(state, event)  # may read files to import modules, so only the second call is watched
    with _watch(name, sys.modules.get(getattr(inspect.unwrap(callback), "__module__", ""))):
        second = callback(state, event)
    if _write_counts(fields) != writes or not same(fields[0], state_before):
        raise ImpureError(f"{name} writes to its arguments; return a new state: state.replace(...)")
    if _attribute_ids(callback) != attributes:
        raise ImpureError(f"{name} assigns to itself; keep memory in the state: state.remember(...)")
    if not same(first, second):
        hint = "keep its memory in the state: state.remember(...)"
        raise ImpureError(f"{name} returns another result when called again with the same arguments; {hint}")
    return second


class _PurityChecked:
    """Calls a callback with `call_purely`; its declarations are those of the callback."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        return call_purely(self._callback, state, event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)


def _attribute_ids(callback: Callback) -> dict[str, int]:
    """Return the id of each attribute's object, without the values of cached properties."""
    cached = {name for name, value in inspect.getmembers_static(type(callback)) if isinstance(value, cached_property)}
    return {name: id(value) for name, value in getattr(callback, "__dict__", {}).items() if name not in cached}


def _fields(value: TrainState | Event) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}


def _write_counts(tree: Any) -> dict[str, int]:
    """Return how often each tensor was written to, as torch counts it."""
    found = dict(tensors(tree))
    return dict(zip(found, write_counts(found.values()), strict=True))


@contextmanager
def _watch(name: str, module: ModuleType | None) -> Iterator[None]:
    """Raise if the body, a call of the callback `name`, reads a clock, does I/O or draws a random number."""
    before = _generator_states()
    with _refuse_clocks(name, module), _refuse_io(name):
        yield
    if not same(_generator_states(), before):
        hint = "make a generator from the seed: torch.Generator().manual_seed(state.seed)"
        raise ImpureError(f"{name} draws from a global random generator; {hint}")


def _generator_states() -> tuple[Any, ...]:
    legacy = np.random.get_state()  # noqa: NPY002  # the global generator is the one to watch
    return random.getstate(), tuple(map(str, legacy)), torch.get_rng_state()


_IO_EVENTS: Final = ("open", "socket.", "subprocess.", "os.", "shutil.", "tempfile.", "urllib.", "sqlite3.")
"""Beginnings of the names of audit events (docs.python.org/3/library/audit_events.html)."""
_watches: list[tuple[str, int]] = []  # name of the callback and id of its thread; other threads may do I/O
_hooks: list[Callable[..., None]] = []


@contextmanager
def _refuse_io(name: str) -> Iterator[None]:
    """Raise if the body does I/O."""
    if not _hooks:  # once, because Python cannot remove an audit hook
        sys.addaudithook(_audit)
        _hooks.append(_audit)
    _watches.append((name, threading.get_ident()))
    try:
        yield
    finally:
        _watches.pop()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    name, thread = _watches[-1] if _watches else ("", 0)
    if thread == threading.get_ident() and event.startswith(_IO_EVENTS):
        raise ImpureError(f"{name} does I/O: {event}{arguments[:1]}; return an effect instead")


_CLOCKS: Final = (
    "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time",
    "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "clock_gettime_ns", "sleep",
)  # fmt: skip


@contextmanager
def _refuse_clocks(name: str, module: ModuleType | None) -> Iterator[None]:
    """Replace the clocks, in `time` and where the callback's module imported them by name, by functions that raise."""

    def refuse_clock(clock: str) -> Callable[..., Never]:
        def refuse(*_: object, **__: object) -> Never:
            raise ImpureError(f"{name} reads the clock: {clock}(); take the time from the event: event.time_s")

        return refuse

    dates = type(
        "datetime", (dt.datetime,), {each: refuse_clock(f"datetime.{each}") for each in ("now", "utcnow", "today")}
    )
    stand_ins: dict[int, Any] = {id(getattr(time, clock)): refuse_clock(f"time.{clock}") for clock in _CLOCKS}
    stand_ins[id(dt.datetime)] = dates
    places = [time, dt, *([] if module is None else [module])]
    clocks = [(place, key, value) for place in places for key, value in vars(place).items() if id(value) in stand_ins]
    try:
        for place, key, value in clocks:
            setattr(place, key, stand_ins[id(value)])
        yield
    finally:
        for place, key, value in clocks:
            setattr(place, key, value)
