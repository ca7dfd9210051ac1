"""The requests of one event, merged: one log line, one checkpoint per tag; logs are written before checkpoints."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from noether.core.effect import Effect, LogScalars, SaveCheckpoint, SetSummary
from noether.core.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Sequence


def merge(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """Return `effects` with those that belong together made one.

    Scalars and summary entries are united, the later value winning. Checkpoints of one tag are united and come last, so
    that what is logged at an event is written before the checkpoint that was taken there.

    Example:
        >>> merge([SaveCheckpoint(pointers=("a",)), LogScalars({"x": 1}), SaveCheckpoint(pointers=("b",))])
        (LogScalars(values=FrozenDict({'x': 1})), SaveCheckpoint(tag=None, ... pointers=('a', 'b'), ...))
    """
    scalars = [effect.values for effect in effects if isinstance(effect, LogScalars)]
    entries = [effect.values for effect in effects if isinstance(effect, SetSummary)]
    others = [effect for effect in effects if not isinstance(effect, (LogScalars, SetSummary, SaveCheckpoint))]
    logs: list[Effect] = []
    if scalars:
        logs.append(LogScalars(FrozenDict({key: value for values in scalars for key, value in values.items()})))
    if entries:
        logs.append(SetSummary(FrozenDict({key: value for values in entries for key, value in values.items()})))
    return (*others, *logs, *_checkpoints(effects))


def _checkpoints(effects: Sequence[Effect]) -> tuple[SaveCheckpoint, ...]:
    merged: dict[str | None, SaveCheckpoint] = {}
    for effect in effects:
        if isinstance(effect, SaveCheckpoint):
            merged[effect.tag] = _united(merged[effect.tag], effect) if effect.tag in merged else effect
    return tuple(merged.values())


def _united(a: SaveCheckpoint, b: SaveCheckpoint) -> SaveCheckpoint:
    asked = [effect.models for effect in (a, b) if effect.weights]
    return dataclasses.replace(
        a,
        weights=a.weights or b.weights,
        optimizer=a.optimizer or b.optimizer,
        models=() if () in asked else tuple(dict.fromkeys(name for models in asked for name in models)),
        pointers=tuple(dict.fromkeys(a.pointers + b.pointers)),
        retention=FrozenDict({**a.retention, **b.retention}),
    )
