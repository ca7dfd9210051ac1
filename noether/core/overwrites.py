"""Finds effects of one event of which a later one would replace what an earlier one writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.artifacts import artifact_key
from noether.core.callback import label_of
from noether.core.effect import LogScalars, LogUpdates, MeasurePeakMemory, SaveTensors, SetSummary
from noether.core.errors import NoetherError
from noether.core.tensors.tree import SCALARS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event


class OverwriteError(NoetherError, ValueError):
    """Two callbacks write the same thing at one event, so the value of the first would be lost."""


def check_overwrites(requests: Sequence[tuple[Callback, Effects]], event: Event) -> None:
    """Refuse effects of one event of which a later one replaces what an earlier one writes.

    Checkpoints of one tag are merged, and a pointer that moves twice names the later checkpoint: nothing is lost there.

    Args:
        requests: Callbacks with the effects that they requested, in order.
        event: The event.

    Raises:
        OverwriteError: If two effects log different values of one metric, set one summary entry to different values,
            save different tensors under one name, or write two artifacts under one key.
    """
    if not _may_overwrite(requests):
        return
    written: dict[tuple[str, str], tuple[Callback, Any]] = {}
    for callback, effects in requests:
        for effect in effects:
            for place, value in _writes(effect):
                first, earlier = written.setdefault(place, (callback, value))
                # Tensors are compared by identity: to read one, the device would have to finish its work.
                if earlier is not value and not (type(earlier) is type(value) in SCALARS and earlier == value):
                    raise OverwriteError(_describe(place, first, callback, event))


def _may_overwrite(requests: Sequence[tuple[Callback, Effects]]) -> bool:
    """Return False if all that the effects write is metrics, each once: the usual case, which is found fast."""
    metrics: set[str] = set()
    count = several = 0
    for _, effects in requests:
        for effect in effects:
            if type(effect) is LogScalars:
                metrics.update(effect.values)
                count += len(effect.values)
            elif type(effect) is LogUpdates:  # which has one row for each update
                several += 1
            elif isinstance(effect, _WRITING_TYPES) or artifact_key(effect) is not None:
                return True
    return len(metrics) < count or several > 1


_WRITING_TYPES: Final = (LogScalars, LogUpdates, SetSummary, SaveTensors, MeasurePeakMemory)


def _writes(effect: Effect) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield kind, name and value of each thing that an effect writes."""
    if isinstance(effect, LogScalars):
        yield from ((("metric", key), value) for key, value in effect.values.items())
    elif isinstance(effect, LogUpdates):
        for at, _, values in effect.rows:
            yield from (((f"metric of {at}", key), value) for key, value in values.items())
    elif isinstance(effect, SetSummary):
        yield from ((("summary entry", key), value) for key, value in effect.values.items())
    elif isinstance(effect, SaveTensors):
        yield from ((("tensor", f"{effect.name}: {key}"), value) for key, value in effect.tensors.items())
    elif isinstance(effect, MeasurePeakMemory):
        yield ("metric", effect.key), effect
    elif (artifact := artifact_key(effect)) is not None:
        yield ("artifact", artifact), effect


def _describe(place: tuple[str, str], first: Callback, second: Callback, event: Event) -> str:
    kind, name = place
    if first is second:
        return f"{label_of(first)} writes the {kind} {name!r} twice at one {type(event).__name__}: write it once"
    return (
        f"{label_of(first)} and {label_of(second)} both write the {kind} {name!r} at one {type(event).__name__}, so "
        "the first value would be lost: rename one, or remove one callback"
    )
