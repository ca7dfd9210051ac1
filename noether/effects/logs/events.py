"""`events.jsonl`: the scalar fields of every event of a run, enough to replay callbacks without training."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from noether.core.effect import LogScalars
from noether.core.event import EVENTS, BeforeTraining, kind_of
from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.metric_keys import keys_overlap
from noether.core.tensors.tree import FrozenDict
from noether.effects.disk.files import read_file
from noether.effects.disk.json_numbers import NUMBERS, json_number
from noether.effects.logs.metrics import event_name, position_fields
from noether.effects.logs.resumption import LogError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

_EVENT_TYPES: Final = {event_name(event_type()): event_type for event_type in EVENTS}
_RUN_FIELDS: Final = (
    "end", "updates_per_epoch", "samples_per_epoch", "effective_batch_size", "run_id", "rank", "world_size", "frozen",
)  # fmt: skip
_COUNT_LIMIT: Final = 2**63
_TIME_LIMIT_S: Final = 2.0**37
"""The year 6325: calendars end at 9999."""
_TENSOR_FIELDS: Final = ("params", "buffers", "opt_state")


class RecordedEvent(NamedTuple):
    """One recorded event.

    Args:
        kind: Its type.
        counts: Completed epochs, updates and samples.
        time_s: Its time in seconds since 1970.
        readings: Its other fields; tensors of outputs are replaced by their means in double precision.
        measured: Metrics that data iterators measured at the event.
        run: Fields of the run; only at `BeforeTraining`, as are the following.
        state: Seed of the state, and its tensors on the meta device.
        lengths: Number of samples of each dataset.
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
    """Return a function that builds the line of an event from its effects, state and event.

    An event that derives from none of `EVENTS` has a line for the reader, without readings; a replay leaves it out.

    Args:
        measured: Patterns of the metric keys that data iterators produce.
        lengths: Returns the number of samples of each dataset of a run.
    """

    def build_line(effects: Effects, state: TrainState, event: Event) -> Mapping[str, Any]:
        scalars = {key: value for each in effects if isinstance(each, LogScalars) for key, value in each.values.items()}
        values = {
            key: value for key, value in scalars.items() if any(keys_overlap(pattern, key) for pattern in measured)
        }
        defaults = _DEFAULTS.get(kind_of(type(event)), _EMPTY).items()
        changed = {name: value for name, default in defaults if (value := getattr(event, name)) is not default}
        line = {**position_fields(state.iteration, event), "readings": _encode_scalars(changed)}
        if kind_of(type(event)) not in _DEFAULTS:
            line["custom"] = True
        if values:
            line["measured"] = _encode_scalars(values)
        if isinstance(event, BeforeTraining):
            line["run"] = {**_encode_run(event.run), "lengths": dict(lengths(event.run))}
            line["state"] = {
                "seed": state.seed,
                **{name: _encode_shapes(getattr(state, name)) for name in _TENSOR_FIELDS},
            }
        return line

    return build_line


def read_events(path: Path, disk: Disk) -> Iterator[RecordedEvent]:
    """Yield the events of a file in order; a partial last line, and events that only their loop knows, are skipped.

    Raises:
        LogError: If another line is not a recorded event, with its line number.
    """
    for number, line in enumerate(io.BytesIO(read_file(path, disk)), start=1):
        try:
            event = _decode_event(line.decode())
        except Exception as error:  # anyone may have written the file, so a decoder can fail in any way
            if not line.endswith(b"\n"):  # the partial last line
                return
            text = line[:80].decode(errors="backslashreplace")
            raise LogError(f"{path}:{number}: not a recorded event: {text!r}") from error
        if event is not None:
            yield event


def _decode_event(text: str) -> RecordedEvent | None:
    line, end = _JSON.raw_decode(text)
    if text[end:] not in ("\n", ""):
        raise ValueError("a line holds more than one value")
    if line.get("custom") is True:
        return None
    run, lengths = line.get("run"), None
    if run is not None:
        if not isinstance(run, Mapping):  # torch warns of a tensor with text as its index
            raise TypeError("its run is not a mapping")
        lengths = run["lengths"]
        run = {name: value for name, value in run.items() if name != "lengths"}
        run |= {"end": TrainingIteration.parse(run["end"]), "frozen": frozenset(run.get("frozen", ()))}
    counts = (line["epoch"], line["update"], line["sample"])
    kind, measured, readings = _EVENT_TYPES[line["event"]], line.get("measured", _EMPTY), line["readings"]
    valid = (
        all(type(each) is int and 0 <= each < _COUNT_LIMIT for each in counts)
        and 0 <= line["time_s"] < _TIME_LIMIT_S
        and isinstance(measured, Mapping)
        and set(readings) <= set(_DEFAULTS[kind])
    )
    if not valid:
        raise ValueError("it has an invalid count, time or reading")
    return RecordedEvent(kind, counts, line["time_s"], readings, measured, run, line.get("state"), lengths)


_DEFAULTS: Final[dict[type, dict[str, Any]]] = {
    event_type: {
        each.name: each.default for each in dataclasses.fields(event_type) if each.name not in ("run", "time_s")
    }
    for event_type in EVENTS
}
"""Default of each field that is recorded as a reading, by event type; a reading at its default is left out."""


def _encode_run(run: Run) -> dict[str, Any]:
    """Return the JSON value of the fields that were set on a run."""
    fields = vars(run)
    return {name: _encode_run_field(fields[name]) for name in _RUN_FIELDS if name in fields}


def _encode_run_field(value: Any) -> Any:
    if isinstance(value, TrainingIteration):
        counts = {name: getattr(value, name) for name in COUNTERS if getattr(value, name)}
        return "_".join(f"{name[0].upper()}{count}" for name, count in counts.items())
    return sorted(value) if isinstance(value, frozenset) else value


_NOT_SCALAR: Final = object()


def _encode_scalars(value: Any) -> Any:
    """Return the JSON value of the scalars in a tree; other tensors become their mean, the rest is left out."""
    if isinstance(value, torch.Tensor):
        scalar = value.detach() if value.ndim == 0 else value.detach().double().mean()
        return {f"${scalar.dtype}": _encode_number(scalar.item())}
    if isinstance(value, Mapping):
        parts = {str(key): _encode_scalars(each) for key, each in value.items()}
        return {key: part for key, part in parts.items() if part is not _NOT_SCALAR}
    if isinstance(value, (list, tuple)):
        return {"$tuple": [part for part in map(_encode_scalars, value) if part is not _NOT_SCALAR]}
    if isinstance(value, float):
        return _encode_number(value)
    return value if isinstance(value, (str, int, type(None))) else _NOT_SCALAR


def _encode_number(value: Any) -> Any:
    encoded = json_number(value) if isinstance(value, float) else value
    return {"$number": encoded} if isinstance(encoded, str) else encoded


def _encode_shapes(tree: Any) -> Any:
    """Return the JSON value of a tree in which tensors are replaced by their shapes and dtypes."""
    if isinstance(tree, torch.Tensor):
        return {f"$shape.{tree.dtype}": list(tree.shape)}
    if isinstance(tree, Mapping):
        return {str(key): _encode_shapes(value) for key, value in tree.items()}
    return _encode_scalars(tree)


def _decode_object(fields: dict[str, Any]) -> Any:
    """Return the value that a JSON object encodes."""
    if len(fields) == 1:
        (key,) = fields
        if key in _DECODERS:
            return _DECODERS[key](fields[key])
    return FrozenDict(fields)


_EMPTY: Final = FrozenDict()
_JSON: Final = json.JSONDecoder(object_hook=_decode_object)
_DTYPES: Final = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$number": NUMBERS.__getitem__,
    "$tuple": tuple,
    **{f"${dtype}": partial(torch.scalar_tensor, dtype=dtype) for dtype in _DTYPES},
    **{f"$shape.{dtype}": partial(torch.empty, dtype=dtype, device="meta") for dtype in _DTYPES},
}
