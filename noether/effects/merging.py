"""The requests of one event, merged: one log line, one checkpoint per tag; logs are written before checkpoints."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from noether.core.effect import Effect, LogScalars, SaveCheckpoint, SaveTensors, SetSummary, ShowProgress
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def merge(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """Return `effects` with those that belong together made one.

    Scalars, summary entries and tensors of one name are united, the later value winning; of several requests to show
    progress the last one that is due is left. Checkpoints of one tag are united and come last, so that what is logged
    at an event is written before the checkpoint that was taken there.

    Example:
        >>> merge([SaveCheckpoint(pointers=("a",)), LogScalars({"x": 1}), SaveCheckpoint(pointers=("b",))])
        (LogScalars(values=FrozenDict({'x': 1})), SaveCheckpoint(tag=None, ... pointers=('a', 'b'), ...))
    """
    if len(effects) == 1:  # as at most events: one request stands for itself
        return tuple(effects)
    scalars = [effect for effect in effects if isinstance(effect, LogScalars)]
    entries = [effect.values for effect in effects if isinstance(effect, SetSummary)]
    # A line is written only where it is due: what others track at this event must not hide that.
    shown = sorted((effect for effect in effects if isinstance(effect, ShowProgress)), key=lambda each: each.due)
    others = [effect for effect in effects if not isinstance(effect, _MERGED)]
    logs: list[Effect] = []
    if scalars:
        logs.append(_one_line(scalars))
    if entries:
        logs.append(SetSummary(FrozenDict({key: value for values in entries for key, value in values.items()})))
    return (*others, *shown[-1:], *logs, *_tensors(effects), *_checkpoints(effects))


_MERGED: Final = (LogScalars, SetSummary, ShowProgress, SaveTensors, SaveCheckpoint)


def _one_line(scalars: Sequence[LogScalars]) -> LogScalars:
    values = {key: value for effect in scalars for key, value in effect.values.items()}
    quiet = {key: key in effect.quiet for effect in scalars for key in effect.values}
    return LogScalars(FrozenDict(values), frozenset(key for key, is_quiet in quiet.items() if is_quiet))


def _tensors(effects: Sequence[Effect]) -> tuple[SaveTensors, ...]:
    merged: dict[str, SaveTensors] = {}
    for effect in effects:
        if isinstance(effect, SaveTensors):
            held = merged[effect.name].tensors if effect.name in merged else {}
            merged[effect.name] = SaveTensors(name=effect.name, tensors=FrozenDict({**held, **effect.tensors}))
    return tuple(merged.values())


def _checkpoints(effects: Sequence[Effect]) -> tuple[SaveCheckpoint, ...]:
    merged: dict[tuple[str | None, str | None], SaveCheckpoint] = {}
    for effect in effects:
        if isinstance(effect, SaveCheckpoint):
            which = effect.tag, effect.weights_of
            merged[which] = _united(merged[which], effect) if which in merged else effect
    return tuple(merged.values())


def _united(a: SaveCheckpoint, b: SaveCheckpoint) -> SaveCheckpoint:
    asked = [effect.models for effect in (a, b) if effect.weights]
    return dataclasses.replace(
        a,
        weights=a.weights or b.weights,
        optimizer=a.optimizer or b.optimizer,
        models=() if () in asked else tuple(dict.fromkeys(name for models in asked for name in models)),
        pointers=tuple(dict.fromkeys(a.pointers + b.pointers)),
        retention=FrozenDict({**a.retention, **b.retention, **_kept_longest(a.retention, b.retention)}),
    )


def _kept_longest(a: Mapping[str, int | None], b: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return for who asked twice the larger of the two numbers; None, which keeps all, is the largest."""
    return {who: None if None in (a[who], b[who]) else max(a[who] or 0, b[who] or 0) for who in a.keys() & b.keys()}
