"""The law that all ranks of a distributed run make the same decisions."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch

from noether.core.callback import label_of
from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterAccumulationStep, AfterUpdate
from noether.core.reducer import compose
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.tree import FrozenDict
from noether.testing.counterexamples import LawError
from noether.testing.functions import CallbackProxy, copy_callback
from noether.testing.law_runs import check_runs
from noether.testing.metric_source import add_metric_source
from noether.testing.other_process import call_in_other_processes
from noether.testing.run_differences import compare_runs, event_text
from noether.testing.traces import DrivenRun, Trace, drive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.testing.models import ModelArguments

    Traces = SearchStrategy[Trace] | None

_EXAMPLES: Final = 100
_REPEATED_RUNS: Final = 20
"""Number of runs that other processes repeat."""
_VIOLATION: Final = (
    "makes different decisions on different ranks; decide from values that all ranks share: rank 1 differs"
)
_DURATIONS: Final = ("duration_s", "data_s", "step_s", "forward_s", "backward_s", "optimizer_s")
_RANK_VARIABLES: Final = (
    "RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMIX_RANK", "MPI_LOCALRANKID", "GROUP_RANK", "NODE_RANK",
)  # fmt: skip
_SIGNALS: Final = [
    each for each in signal.Signals if each.name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM")
]
"""Signals with which a cluster announces that it will end a process, and those that are free."""
_LATER_S: Final = 2.0**31
_LARGE: Final = 2.0**50


def check_rank_agreement(
    callback: Callback, *, traces: Traces = None, examples: int = _EXAMPLES, **model: Unpack[ModelArguments]
) -> None:
    """Raise unless every rank of a distributed run makes the same decisions.

    The ranks differ a lot in `time_s` and durations, in outputs, in the losses of accumulation steps, in the
    environment variables that launchers set, in the rank that `torch.distributed` gives, and in signals: handlers that
    a callback installs are called on one rank only. Decisions of a callback
    are: where it stops, the params, buffers and hyperparams that it sets, which metrics it measured at which iteration,
    and which checkpoints it requests. Ranks
    that disagree on one wait for each other forever, or train different models.

    The losses of `AfterUpdate` are means over all ranks, but only in loops that average them. So a callback may log and
    remember them, but a decision that it makes at an event may not depend on the losses of that event; decide from a
    metric instead.

    Two other processes, in which texts have other hashes, repeat some of the runs. They are started once and take as
    long as importing torch. They cannot repeat those of a callback that contains an object of the operating system,
    such as an open file, or an enumeration that was defined in a function or in a script; a decision that depends on
    `hash()` or on the order of a set is not found there. Elsewhere it is found with high probability only, because an
    order may be the same in all three processes.

    Args:
        callback: Any callback.
        traces: The runs to try; None for all kinds, long enough for the schedules of the callback.
        examples: Largest number of runs to try, >= 1.
        model: What the callback sees of the model: `model=`, `losses=`, `outputs=`, `groups=`, `data=`, `forward=`; see
            `noether.testing.ModelArguments`.

    Raises:
        LawError: With the simplest run in which two ranks disagree, and the first difference.

    Example:
        >>> from noether import AfterUpdate, on
        >>> @on(AfterUpdate)
        ... def impatient(state, event):
        ...     return (state.request_stop("slow") if event.duration_s > 1 else state), ()
        >>> check_rank_agreement(impatient)
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: impatient makes different decisions on different ranks...
    """
    tried: dict[str, Trace] = {}

    def law(trace: Trace) -> None:
        first, second = (_decisions(_drive_rank(callback, trace, rank)) for rank in (0, 1))
        compare_runs(callback, _VIOLATION, second, first, trace)
        tried[str(trace)] = trace

    check_runs(callback, law, traces=traces, examples=examples, model=model)
    sent = list(tried.values())[-_REPEATED_RUNS:]
    expected = describe_decisions(callback, sent)
    for found in call_in_other_processes(describe_decisions, callback, sent):
        for trace, ours, theirs in zip(sent, expected, found, strict=True):
            _compare_processes(callback, trace, ours, theirs)


def describe_decisions(callback: Callback, traces: list[Trace]) -> list[list[list[str]]]:
    """Return for each run the decisions of a callback on rank 0, as `[event, path, text of the value]`."""
    driven = [_decisions(_drive_rank(callback, trace, 0)) for trace in traces]
    return [
        [
            [event_text(run, number), path, text]
            for number, (state, effects) in enumerate(zip(run.states, run.effects, strict=True))
            for path, text in _describe({"state": vars(state), "effects": effects})
        ]
        for run in driven
    ]


def _compare_processes(callback: Callback, trace: Trace, ours: list[list[str]], theirs: list[list[str]]) -> None:
    if ours == theirs:
        return
    found = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), ([["the end", "", ""]] * 2))
    (place, path, one), (_, other_path, other) = found
    raise LawError(
        f"{label_of(callback)} makes different decisions in a process with another hash seed: hash() of a text and the "
        f"order of a set differ between processes; use zlib.crc32(text.encode()) and sorted(...)\n"
        f"  at {place}: {path} is {one}, there {other_path} is {other}\n  in {trace}"
    )


def _drive_rank(callback: Callback, trace: Trace, rank: int) -> DrivenRun:
    """Return the run of a callback as one of two ranks sees it."""
    complete = add_metric_source(copy_callback(callback), finite=trace.finite_metrics)
    members = (_RankProxy(member, rank, trace) for member in complete.members)
    variables = {**dict.fromkeys(_RANK_VARIABLES, str(rank)), "WORLD_SIZE": "2"}
    functions: dict[str, Any] = {"is_initialized": lambda: True, "get_world_size": lambda *_, **__: 2}
    functions["get_rank"] = functions["get_node_local_rank"] = lambda *_, **__: rank
    environment, distributed = (
        mock.patch.dict(os.environ, variables),
        mock.patch.multiple(torch.distributed, **functions),
    )
    with environment, distributed, _keep_signal_handlers():
        return drive(compose(*members), trace.on_rank(rank))


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Install the handlers of signals again that were installed before the block."""
    before = _signal_handlers()
    try:
        yield
    finally:
        for number in _find_new_handlers(before):
            signal.signal(number, before[number])


def _signal_handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in _SIGNALS}


def _find_new_handlers(before: Mapping[int, Any]) -> dict[int, Any]:
    """Return the handlers of signals that are others than before."""
    return {number: handler for number, handler in _signal_handlers().items() if handler is not before[number]}


class _RankProxy(CallbackProxy):
    """Calls a callback with the events of one rank."""

    def __init__(self, callback: Callback, rank: int, trace: Trace) -> None:
        super().__init__(callback)
        self._rank = rank
        self._trace = trace
        self._handlers = _signal_handlers()

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        event = _measure_on_rank(event, self._rank, state.iteration.update)
        if self._rank:
            for number, handler in _find_new_handlers(self._handlers).items():
                if callable(handler):  # of the callback: this rank receives the signal, rank 0 does not
                    handler(number, None)
        result = self._callback(state, event)
        if self._rank and isinstance(event, AfterUpdate):
            local = event.replace(losses=_shift_losses(event.losses, state.iteration.update))
            found, expected = (
                _decisions(DrivenRun((event,), (after,), (effects,)))
                for after, effects in (self._callback(state, local), result)
            )
            compare_runs(self._callback, _VIOLATION, found, expected, self._trace)
        return result


def _measure_on_rank(event: Event, rank: int, update: int) -> Event:
    """Return an event with the measurements of a rank: rank 0 is fast, rank 1 slow, late, and has other data."""
    changes: dict[str, Any] = {"time_s": event.time_s + _LATER_S if rank else event.time_s * 1e-9}
    if isinstance(event, AfterUpdate):
        factor = 1e6 if rank else 1e-6
        durations = {name: getattr(event, name) for name in _DURATIONS}
        changes |= {name: value * factor for name, value in durations.items() if value is not None}
    if rank and isinstance(event, (AfterUpdate, AfterAccumulationStep)):
        changes["outputs"] = map_tensors(_shift_floats, event.outputs)
    if rank and isinstance(event, AfterAccumulationStep):
        changes["losses"] = _shift_losses(event.losses, update + event.accumulation_step)
    return event.replace(**changes)


def _shift_floats(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + _LARGE if tensor.is_floating_point() else tensor


def _shift_losses(losses: Mapping[str, Any], number: int) -> FrozenDict:
    """Return losses that are far above or below; those that are not finite remain, as all ranks are to see NaN."""
    shift = -_LARGE if number % 2 else _LARGE
    return FrozenDict({name: loss + shift if math.isfinite(loss) else loss for name, loss in losses.items()})


def _decisions(run: DrivenRun) -> DrivenRun:
    """Return a run with only those parts of its states and effects on which ranks have to agree."""
    states = []
    for state in run.states:
        measured = {key: metric._replace(value=0.0) for key, metric in state.metrics.items()}
        states.append(state.replace(metrics=measured, callback_states={}))
    saves = (tuple(each for each in effects if isinstance(each, SaveCheckpoint)) for effects in run.effects)
    return DrivenRun(run.events, tuple(states), tuple(saves))


def _describe(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and a text of each part of a value, in an order that is the same in every process."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield path, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()}"
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _describe(value[key], f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _describe(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        yield from _describe(fields, path)
    else:
        yield path, repr(sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)
