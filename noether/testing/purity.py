"""Whether a callback is a pure function: its result depends on its arguments only, and nothing else is touched."""

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
    """A callback did what a pure function does not."""


def check_pure(callback: Callback, *, traces: SearchStrategy[Trace] | None = None, examples: int = _EXAMPLES) -> None:
    """Return if `callback` is a pure function: called twice it gives the same, and it touches nothing else.

    Metrics that it consumes and does not produce are measured for it.

    Args:
        callback: Any callback; of a reducer each member is watched by itself.
        traces: The runs to try; None for all kinds.
        examples: How many runs to try, >= 1.

    Raises:
        ImpureError: If two results differ, the state, the event or the callback itself was written to, or a call opened
            a file, a socket or a process, read a clock, or drew from the global random generators.

    Example:
        >>> from noether import AfterEpoch, LogText, on
        >>> @on(AfterEpoch)
        ... def dated(state, event):
        ...     return state, (LogText(f"it is {time.time()}"),)
        >>> check_pure(dated)
        Traceback (most recent call last):
        noether.testing.purity.ImpureError: dated reads the clock: time.time(); the time arrives on the event, as ...
    """

    def law(trace: Trace) -> None:
        # A callback that writes to itself is written to in every example.
        members = add_metric_source(copy.deepcopy(callback)).members
        drive(compose(*map(_Watched, members)), trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def call_purely(callback: Callback, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
    """Return what `callback` returns, after calling it twice and watching the second call.

    Args:
        callback: Any callback.
        state: The state to call it with.
        event: The event to call it with.

    Raises:
        ImpureError: As `check_pure`.

    Example:
        >>> from noether import AfterEpoch, TrainState, log
        >>> call_purely(lambda state, event: log(state, event, {"x": torch.rand(())}), TrainState(), AfterEpoch())
        Traceback (most recent call last):
        noether.testing.purity.ImpureError: <lambda> draws from a global random generator; derive a generator ...
    """
    name = label_of(callback)
    given = (_fields(state), _fields(event))
    held, written, settings = copy.deepcopy(given[0]), _writes(given), _settings(callback)
    first = callback(state, event)  # what it imports on its first call reads files, and is nothing to hold against it
    with _watching(name, sys.modules.get(getattr(inspect.unwrap(callback), "__module__", ""))):
        second = callback(state, event)
    if _writes(given) != written or not same(given[0], held):
        raise ImpureError(f"{name} writes to what it is given; return a new state: state.replace(...)")
    if _settings(callback) != settings:
        memory = "settings are fields, and memory is in the state: state.remember(...)"
        raise ImpureError(f"{name} writes to itself; {memory}")
    if not same(first, second):
        raise ImpureError(f"{name} returns something else when it is called again: it remembers outside of the state")
    return second


class _Watched:
    """A callback of which every call is watched; whatever it says about itself, it says."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        return call_purely(self._callback, state, event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)


def _settings(callback: Callback) -> dict[str, int]:
    """Return which object each attribute is; what a property keeps once it is computed is none of them."""
    kept = {name for name, value in inspect.getmembers_static(type(callback)) if isinstance(value, cached_property)}
    return {name: id(value) for name, value in getattr(callback, "__dict__", {}).items() if name not in kept}


def _fields(value: TrainState | Event) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}


def _writes(tree: Any) -> dict[str, int]:
    """Return how often each tensor was written to, as torch counts it."""
    found = dict(tensors(tree))
    return dict(zip(found, write_counts(found.values()), strict=True))


@contextmanager
def _watching(name: str, module: ModuleType | None) -> Iterator[None]:
    drawn = _generators()
    with _clocks_refused(name, module), _world_refused(name):
        yield
    if not same(_generators(), drawn):
        raise ImpureError(f"{name} draws from a global random generator; derive a generator of its own from state.seed")


def _generators() -> tuple[Any, ...]:
    legacy = np.random.get_state()  # noqa: NPY002  # the global generator is what is watched
    return random.getstate(), tuple(map(str, legacy)), torch.get_rng_state()


_TOUCHES: Final = ("open", "socket.", "subprocess.", "os.", "shutil.", "tempfile.", "urllib.", "sqlite3.")
_watched: list[tuple[str, int]] = []  # by name, and in which thread: others may do what they like
_hooked: list[bool] = []


@contextmanager
def _world_refused(name: str) -> Iterator[None]:
    if not _hooked:  # a hook cannot be taken away again
        sys.addaudithook(_refuse_touch)
        _hooked.append(True)
    _watched.append((name, threading.get_ident()))
    try:
        yield
    finally:
        _watched.pop()


def _refuse_touch(event: str, arguments: tuple[Any, ...]) -> None:
    name, thread = _watched[-1] if _watched else ("", 0)
    if thread == threading.get_ident() and event.startswith(_TOUCHES):
        raise ImpureError(f"{name} touches the world: {event}{arguments[:1]}; ask for an effect instead")


_CLOCKS: Final = (
    "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time",
    "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "clock_gettime_ns", "sleep",
)  # fmt: skip


@contextmanager
def _clocks_refused(name: str, module: ModuleType | None) -> Iterator[None]:
    """Replace the clocks, in `time` and where the callback's module imported them by name, by ones that refuse."""

    def refusing(clock: str) -> Callable[..., Never]:
        def refuse(*_: object, **__: object) -> Never:
            raise ImpureError(f"{name} reads the clock: {clock}(); the time arrives on the event, as event.time_s")

        return refuse

    dates = type(
        "datetime", (dt.datetime,), {each: refusing(f"datetime.{each}") for each in ("now", "utcnow", "today")}
    )
    stand_ins: dict[int, Any] = {id(getattr(time, clock)): refusing(f"time.{clock}") for clock in _CLOCKS}
    stand_ins[id(dt.datetime)] = dates
    places = [time, dt, *([] if module is None else [module])]
    held = [(place, key, value) for place in places for key, value in vars(place).items() if id(value) in stand_ins]
    try:
        for place, key, value in held:
            setattr(place, key, stand_ins[id(value)])
        yield
    finally:
        for place, key, value in held:
            setattr(place, key, value)
