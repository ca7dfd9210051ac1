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
from typing import TYPE_CHECKING, Any, Final, Never

import numpy as np
import torch

from noether.core.tree import tensors
from noether.testing.compare import same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState


class ImpureError(AssertionError):
    """A callback did what a pure function does not."""


def check_pure(callback: Callback, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
    """Return what `callback` returns, after calling it twice and watching the second call.

    Args:
        callback: Any callback.
        state: The state to call it with.
        event: The event to call it with.

    Raises:
        ImpureError: If the two results differ, the state or the event was written to, or the call opened a file, a
            socket or a process, read a clock, or drew from the global random generators.

    Example:
        >>> from noether import AfterEpoch, LogText, TrainState
        >>> def dated(state, event):
        ...     return state, (LogText(f"it is {time.time()}"),)
        >>> check_pure(dated, TrainState(), AfterEpoch())
        Traceback (most recent call last):
        noether.testing.purity.ImpureError: dated reads the clock: time.time(); the time arrives on the event, as ...
    """
    name = getattr(callback, "__name__", type(callback).__name__)
    given = (_fields(state), _fields(event))
    held, written = copy.deepcopy(given[0]), _writes(given)
    first = callback(state, event)  # what it imports on its first call reads files, and is nothing to hold against it
    with _watching(name, sys.modules.get(getattr(inspect.unwrap(callback), "__module__", ""))):
        second = callback(state, event)
    if _writes(given) != written or not same(given[0], held):
        raise ImpureError(f"{name} writes to what it is given; return a new state: state.replace(...)")
    if not same(first, second):
        raise ImpureError(f"{name} returns something else when it is called again: it remembers outside of the state")
    return second


def _fields(value: TrainState | Event) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}


def _writes(tree: Any) -> dict[str, int]:
    """Return how often each tensor was written to, as torch counts it."""
    return {name: tensor._version for name, tensor in tensors(tree)}  # noqa: SLF001  # torch has no public name


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
