"""`events.jsonl`: the scalar part of every event of a run, from which callbacks can be called again without it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from noether.core.effect import LogScalars
from noether.core.event import EVENTS, BeforeTraining
from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.metrics import keys_overlap
from noether.core.tensors.tree import FrozenDict
from noether.effects.disk.encoding import NUMBERS, json_number
from noether.effects.disk.files import read_file
from noether.effects.logs.jsonl import LogError, event_name, position_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

_KINDS: Final = {event_name(kind()): kind for kind in EVENTS}
_FIXED: Final = (
    "end", "updates_per_epoch", "samples_per_epoch", "effective_batch_size", "run_id", "rank", "world_size", "frozen",
)  # fmt: skip
_SHAPED: Final = ("params", "buffers", "opt_state")


class RecordedEvent(NamedTuple):
    """One event as it was recorded.

    Args:
        kind: Its type.
        counts: Epochs, updates and samples that were completed.
        time_s: When it was, in seconds since 1970.
        readings: Its other fields; of tensors in outputs their means, in double precision.
        measured: The metrics that data iterators measured there.
        run: Fields of the run, where the event begins a process.
        state: There also what the state had: its seed, and its tensors on the meta device.
        lengths: There also the number of samples of each dataset.
    """

    kind: type[Event]
    counts: tuple[int, int, int]
    time_s: float
    readings: Mapping[str, Any]
    measured: Mapping[str, Any]
    run: Mapping[str, Any] | None = None
    state: Mapping[str, Any] | None = None
    lengths: Mapping[str, int] | None = None


def event_line_builder(
    measured: Sequence[str], lengths: Callable[[Run], Mapping[str, int]]
) -> Callable[[Effects, TrainState, Event], Mapping[str, Any]]:
    """Return what makes the line of an event from what was asked for there.

    Args:
        measured: Patterns of the metric keys that data iterators produce.
        lengths: Returns the number of samples of each dataset of a run.
    """

    def line(effects: Effects, state: TrainState, event: Event) -> Mapping[str, Any]:
        logged = {key: value for each in effects if isinstance(each, LogScalars) for key, value in each.values.items()}
        values = {
            key: value for key, value in logged.items() if any(keys_overlap(pattern, key) for pattern in measured)
        }
        told = {**position_fields(state, event), "readings": _scalars(_fields(event))}
        if values:
            told["measured"] = _scalars(values)
        if isinstance(event, BeforeTraining):
            told["run"] = {**_fixed(event.run), "lengths": dict(lengths(event.run))}
            told["state"] = {"seed": state.seed, **{name: _shapes(getattr(state, name)) for name in _SHAPED}}
        return told

    return line


def read_events(path: Path, disk: Disk) -> Iterator[RecordedEvent]:
    """Yield the events in a file, in order; a torn one at its end is left out.

    Raises:
        LogError: If a line before the last is none of ours, with its number.
    """
    for index, line in enumerate(io.BytesIO(read_file(path, disk)), start=1):
        try:
            yield _recorded(_value(line.decode()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if not line.endswith(b"\n"):  # the last, torn
                return
            text = line[:80].decode(errors="replace")
            raise LogError(f"{path}:{index}: not a recorded event: {text!r}") from error


def _value(text: str) -> Any:
    value, end = _JSON.raw_decode(text)
    if text[end:] not in ("\n", ""):
        raise ValueError("a line holds more than one value")
    return value


def _recorded(line: Mapping[str, Any]) -> RecordedEvent:
    run, lengths = line.get("run"), None
    if run is not None:
        lengths = run["lengths"]
        run = {name: value for name, value in run.items() if name != "lengths"}
        run |= {"end": TrainingIteration.parse(run["end"]), "frozen": frozenset(run.get("frozen", ()))}
    counts = (line["epoch"], line["update"], line["sample"])
    kind, measured = _KINDS[line["event"]], line.get("measured", _EMPTY)
    return RecordedEvent(kind, counts, line["time_s"], line["readings"], measured, run, line.get("state"), lengths)


def _fields(event: Event) -> dict[str, Any]:
    """Return the fields of an event that are its own and not as by default."""
    defaults = _DEFAULTS[type(event)].items()
    return {name: value for name, default in defaults if (value := getattr(event, name)) is not default}


_DEFAULTS: Final[dict[type, dict[str, Any]]] = {
    kind: {each.name: each.default for each in dataclasses.fields(kind) if each.name not in ("run", "time_s")}
    for kind in EVENTS
}


def _fixed(run: Run) -> dict[str, Any]:
    given = {name: vars(run)[name] for name in _FIXED if name in vars(run)}
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, TrainingIteration):
        used = {name: getattr(value, name) for name in COUNTERS if getattr(value, name)}
        return "_".join(f"{name[0].upper()}{count}" for name, count in used.items())
    return sorted(value) if isinstance(value, frozenset) else value


_NO_SCALAR: Final = object()


def _scalars(value: Any) -> Any:
    """Return the JSON value of what is scalar in a tree; what has more dimensions is there by its mean."""
    if isinstance(value, torch.Tensor):
        scalar = value.detach() if value.ndim == 0 else value.detach().double().mean()
        return {f"${scalar.dtype}": _number(scalar.item())}
    if isinstance(value, Mapping):
        parts = {str(key): _scalars(each) for key, each in value.items()}
        return {key: part for key, part in parts.items() if part is not _NO_SCALAR}
    if isinstance(value, (list, tuple)):
        return {"$tuple": [part for part in map(_scalars, value) if part is not _NO_SCALAR]}
    if isinstance(value, float):
        return _number(value)
    return value if isinstance(value, (str, int, type(None))) else _NO_SCALAR


def _number(value: Any) -> Any:
    told = json_number(value) if isinstance(value, float) else value
    return {"$number": told} if isinstance(told, str) else told


def _shapes(tree: Any) -> Any:
    """Return a tree with the shape of each tensor in its place, and nothing else of it."""
    if isinstance(tree, torch.Tensor):
        return {f"$shape.{tree.dtype}": list(tree.shape)}
    if isinstance(tree, Mapping):
        return {str(key): _shapes(value) for key, value in tree.items()}
    return _scalars(tree)


def _made(held: dict[str, Any]) -> Any:
    """Return what an object of JSON stands for."""
    if len(held) == 1:
        (key,) = held
        if key in _MAKERS:
            return _MAKERS[key](held[key])
    return FrozenDict(held)


_EMPTY: Final = FrozenDict()
_JSON: Final = json.JSONDecoder(object_hook=_made)
_DTYPES: Final = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
_MAKERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$number": NUMBERS.__getitem__,
    "$tuple": tuple,
    **{f"${dtype}": partial(torch.scalar_tensor, dtype=dtype) for dtype in _DTYPES},
    **{f"$shape.{dtype}": partial(torch.empty, dtype=dtype, device="meta") for dtype in _DTYPES},
}
