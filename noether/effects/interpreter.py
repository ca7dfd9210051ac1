"""Interpreter of effects: a table from effect type to handlers, and how the effects of one event are merged."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from noether.core.artifacts import artifact_key
from noether.core.effect import (
    Effect,
    LogScalars,
    LogText,
    LogUpdates,
    LogUpdateText,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    ShowProgress,
)
from noether.core.errors import NoetherError, suggest
from noether.core.reducer import attach_effects
from noether.core.tensors.tree import FrozenDict
from noether.effects.checkpoints.file_names import requested_files
from noether.effects.checkpoints.manifest import NEWEST_TAG
from noether.effects.checkpoints.retention import is_resumable, unite_limits
from noether.effects.disk.json_numbers import NUMBER_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from noether.core.effect import UpdateScalars
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.core.stretch import InterpretStretch

    Handler = Callable[[Any, TrainState, Event], None]
    Measure = Callable[[Any, TrainState, Event], Mapping[str, float]]
    _MergedTypes = tuple[type[Effect], ...]

_Handler = TypeVar("_Handler", bound="Callable[..., None]")


class UnhandledEffectError(NoetherError, LookupError):
    """A callback returned an effect that has no handler."""


def on_all_ranks(handler: _Handler) -> _Handler:
    """Return the handler, marked as one that every rank calls; all others are called on rank 0 only.

    On other ranks it gets the effect as callbacks returned it, and events there have no logs.
    """
    handler.is_on_all_ranks = True  # type: ignore[attr-defined]  # functions have any attributes
    return handler


class Interpreter:
    """Runs effects: calls every handler of an effect's type with `(effect, state, event)`.

    Args:
        handlers: Handlers by type of effect, called in their order.
        measures: Functions by type of effect; each returns scalars that are logged with those of the same event.
        check: Called first at every event, with or without effects; it raises errors of background work, and lets a
            display see the state.

    Example:
        >>> from noether import AfterTraining, LogText, TrainState
        >>> interpreter = Interpreter({LogText: [lambda effect, state, event: print(effect.text)]})
        >>> interpreter([LogText("done")], TrainState(), AfterTraining())
        done
    """

    def __init__(
        self,
        handlers: Mapping[type[Effect], Sequence[Handler]],
        measures: Mapping[type[Effect], Measure] | None = None,
        check: Callable[[TrainState, Event], None] = lambda state, event: None,  # noqa: ARG005  # names the arguments
    ) -> None:
        self._given = {effect_type: tuple(each) for effect_type, each in handlers.items()}
        self._handlers = dict(self._given)
        if LogText in handlers:
            texts = map(_handle_update_text, handlers[LogText])
            self._handlers[LogUpdateText] = (*texts, *handlers.get(LogUpdateText, ()))
        self._on_all_ranks = {
            effect_type: tuple(filter(_is_on_all_ranks, each)) for effect_type, each in self._handlers.items()
        }
        self._measures = dict(measures or {})
        self._unmeasured = self._handlers.keys() - self._measures.keys()
        self._check_background = check

    def __call__(self, effects: Sequence[Effect], state: TrainState, event: Event) -> None:
        """Merge and run the effects of one event on the settled state.

        On ranks other than 0, only handlers that are marked with `on_all_ranks` run.

        Handlers of `LogScalars` and `LogUpdates` receive plain numbers: tensors on an accelerator are read here, in one
        transfer.

        Raises:
            UnhandledEffectError: If an effect has no handler; then no effect is run.
        """
        try:
            self._check_background(state, event)
            if not effects:
                return
            measured = False
            for effect in effects:
                if type(effect) not in self._unmeasured:
                    self._require_handler(type(effect))
                    self._require_handler(LogScalars)  # the measured values are logged
                    measured = True
            handlers = self._handlers
            if event.run.rank != 0:
                handlers = self._on_all_ranks
                effects = [effect for effect in effects if handlers.get(type(effect))]
            elif measured:
                effects = [each for effect in effects for each in self._replace_by_scalars(effect, state, event)]
        except Exception as error:
            attach_effects(error, tuple(effects))
            raise
        _run_merged(merge_effects(effects), handlers, state, event)

    @property
    def interpret_stretch(self) -> InterpretStretch | None:
        """Runs the effects of several updates; None without a handler of `LogUpdates`: none is deferred."""
        if LogUpdates not in self._handlers:
            return None
        return lambda effects, state, updates: self(effects, state, updates[-1].event)

    def with_handlers(self, effect_type: type[Effect], *handlers: Handler) -> Interpreter:
        """Return a new interpreter that also calls `handlers` for effects of this type, after the existing ones.

        With handlers added for `LogScalars` or `LogText`, it does not handle `LogUpdates` any more: the new handlers
        get the scalars and texts of each update, with the state of that update.

        Example:
            >>> from dataclasses import dataclass
            >>> from noether import AfterTraining, Effect, TrainState
            >>> @dataclass(frozen=True)
            ... class Ring(Effect):
            ...     times: int
            >>> def ring_bell(ring, state, event):
            ...     print("ding " * ring.times)
            >>> interpreter = Interpreter({}).with_handlers(Ring, ring_bell)
            >>> interpreter([Ring(2)], TrainState(), AfterTraining())
            ding ding
        """
        table = {**self._given, effect_type: (*self._given.get(effect_type, ()), *handlers)}
        if effect_type in (LogScalars, LogText):  # new handlers may read the state at each update
            table.pop(LogUpdates, None)
        return Interpreter(table, self._measures, self._check_background)

    def handles(self, effect_type: type[Effect]) -> bool:
        """Return whether effects of this type have a handler, or are measured.

        Example:
            >>> from noether import LogText
            >>> Interpreter({LogText: []}).handles(LogText), Interpreter({}).handles(LogText)
            (True, False)
        """
        return effect_type in self._handlers or effect_type in self._measures

    def _replace_by_scalars(self, effect: Effect, state: TrainState, event: Event) -> Iterator[Effect]:
        """Yield the scalars measured for an effect; and the effect itself if it has a handler or no measure."""
        measure = self._measures.get(type(effect))
        if measure is None or type(effect) in self._handlers:
            yield effect
        if measure is not None:
            yield LogScalars(FrozenDict(measure(effect, state, event)))

    def _require_handler(self, effect_type: type[Effect]) -> None:
        if not self.handles(effect_type):
            name = LogText.__name__ if effect_type is LogUpdateText else effect_type.__name__  # its handlers run both
            known = [each.__name__ for each in dict.fromkeys((*self._given, *self._measures))]
            raise UnhandledEffectError(
                f"no handler for the effect {name}{suggest(name, known)}; "
                f"add one with interpreter.with_handlers({name}, handler), or by run.handlers in YAML. "
                f"Handled: {', '.join(known) or 'none'}"
            )


def _handle_update_text(handler: Handler) -> Handler:
    """Return the handler of `LogUpdateText` that calls a handler of `LogText`."""

    @wraps(handler)  # keeps the mark of `on_all_ranks`
    def handle(effect: LogUpdateText, state: TrainState, _event: Event) -> None:
        handler(effect.text, state.replace(iteration=effect.iteration), effect.event)

    return handle


def _run_merged(
    effects: Sequence[Effect], handlers: Mapping[type[Effect], Sequence[Handler]], state: TrainState, event: Event
) -> None:
    index = 0
    try:
        for index, merged in enumerate(effects):  # noqa: B007  # the error needs the index
            effect = _read_tensors(merged)
            for handler in handlers[type(effect)]:
                handler(effect, state, event)
    except Exception as error:
        name = type(effects[index]).__name__
        error.add_note(f"raised by a handler of {name} at {state.iteration}, {type(event).__name__}")
        attach_effects(error, tuple(effects[index + 1 :]))
        raise


def _is_on_all_ranks(handler: Any) -> bool:
    """Return whether a handler is marked; so is one with bound settings or in a wrapper, if what it calls is marked."""
    while handler is not None:
        if any(getattr(each, "is_on_all_ranks", False) for each in (handler, type(handler).__call__)):
            return True
        handler = handler.func if isinstance(handler, partial) else getattr(handler, "__wrapped__", None)
    return False


def _read_tensors(effect: Effect) -> Effect:
    """Return an effect with scalars as plain numbers."""
    if isinstance(effect, LogScalars) and not _are_numbers(effect.values):
        (numbers,) = _read_numbers([effect.values])
        return LogScalars(numbers, effect.quiet)
    if isinstance(effect, LogUpdates):
        different = {id(row.values): row.values for row in effect.rows}
        if not all(map(_are_numbers, different.values())):
            read = dict(zip(different, _read_numbers(list(different.values())), strict=True))
            return LogUpdates(tuple(row._replace(values=read[id(row.values)]) for row in effect.rows), effect.quiet)
    return effect


def _are_numbers(values: Mapping[str, Any]) -> bool:
    return NUMBER_TYPES.issuperset(map(type, values.values()))


def _read_numbers(mappings: Sequence[Mapping[str, Any]]) -> list[FrozenDict]:
    """Return values with tensors as numbers; those on an accelerator are read in one transfer."""
    tensors = {id(value): value for values in mappings for value in values.values() if isinstance(value, torch.Tensor)}
    on_device = [key for key, value in tensors.items() if value.is_cuda]
    numbers = {key: value.item() for key, value in tensors.items() if not value.is_cuda}
    if on_device:
        stacked = torch.stack([tensors[key].detach().double() for key in on_device]).tolist()
        numbers |= dict(zip(on_device, stacked, strict=True))
    return [FrozenDict({key: numbers.get(id(value), value) for key, value in each.items()}) for each in mappings]


def merge_effects(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """Merge the effects of one event: one log line, one checkpoint per tag, logs before checkpoints.

    Scalars, summary entries and tensors of one name are united; a later value replaces an earlier one, and so does a
    later artifact of one key. Rows of several `LogUpdates` for the same update become one row; rows and texts of
    updates are in the order of the updates.
    Of several `ShowProgress` the last due one remains, or the last if none is due.
    Checkpoints of one tag are united and come last, so that a checkpoint is never ahead of the log. A request for
    `TAG.latest` joins that for `TAG` if this is for the whole state, too. Those to resume from come first: from one of
    them, the others can be made again.

    Example:
        >>> merge_effects([SaveCheckpoint(pointers=("a",)), LogScalars({"x": 1}), SaveCheckpoint(pointers=("b",))])
        (LogScalars(values={'x': 1}), SaveCheckpoint(tag=None, ... pointers=('a', 'b'), ...))
    """
    if len(effects) == 1:  # the usual case
        return tuple(effects)
    groups: dict[_MergedTypes | None, list[Any]] = {}
    for effect in effects:
        merged_types = _find_merged_types(type(effect))  # type: ignore[arg-type]  # mypy asks for the hash of an instance
        groups.setdefault(merged_types, []).append(effect)
    others = groups.get(None, [])
    last = {key: effect for effect in others if (key := artifact_key(effect)) is not None}
    merged = [effect for effect in others if last.get(artifact_key(effect) or "", effect) is effect] if last else others
    for merged_types, merge in _MERGES.items():
        if merged_types in groups:
            merged += merge(groups[merged_types])
    return tuple(merged)


@cache
def _find_merged_types(effect_type: type[Effect]) -> _MergedTypes | None:
    """Return the key of `_MERGES` for a type of effect; None if its effects are not merged."""
    return next((merged for merged in _MERGES if issubclass(effect_type, merged)), None)


def _choose_progress(effects: Sequence[ShowProgress]) -> tuple[ShowProgress]:
    # A line is written only where progress is due, so the last one that is due remains.
    return (max(reversed(effects), key=lambda each: each.due),)


def _merge_updates(effects: Sequence[LogUpdates | LogUpdateText]) -> Iterator[LogUpdates | LogUpdateText]:
    """Yield rows and texts in the order of their updates; the text of an update comes before its row."""
    rows, quiet = _merge_rows([effect for effect in effects if isinstance(effect, LogUpdates)])
    texts = [effect for effect in effects if isinstance(effect, LogUpdateText)]
    begin = 0
    for text in sorted(texts, key=lambda each: each.iteration.update):
        end = bisect_left(rows, text.iteration.update, key=lambda row: row.iteration.update)
        if begin < end:
            yield LogUpdates(rows[begin:end], quiet)
        yield text
        begin = end
    if begin < len(rows) or not texts:
        yield LogUpdates(rows[begin:], quiet)


def _merge_rows(effects: Sequence[LogUpdates]) -> tuple[tuple[UpdateScalars, ...], frozenset[str]]:
    """Return one row for each update, in the order of the updates, and the quiet keys."""
    if len(effects) == 1:
        return effects[0].rows, effects[0].quiet
    rows: dict[int, UpdateScalars] = {}
    united: dict[tuple[int, int], FrozenDict] = {}  # by the ids of two values: logs encode an object only once
    quiet: frozenset[str] = frozenset()
    for effect in effects:
        for row in effect.rows:
            before = rows.setdefault(row.iteration.update, row)
            if before is not row:
                pair = id(before.values), id(row.values)
                if pair not in united:
                    united[pair] = FrozenDict({**before.values, **row.values})
                rows[row.iteration.update] = row._replace(values=united[pair])
        keys = frozenset(key for row in effect.rows for key in row.values)
        quiet = quiet - keys | effect.quiet & keys
    return tuple(rows[update] for update in sorted(rows)), quiet


def _merge_scalars(effects: Sequence[LogScalars]) -> Sequence[LogScalars]:
    if len(effects) == 1:
        return effects
    values: dict[str, Any] = {}
    quiet: frozenset[str] = frozenset()
    for effect in effects:
        keys = effect.values.keys()
        values.update(effect.values)
        quiet = quiet - keys | effect.quiet & keys
    return (LogScalars(FrozenDict(values), quiet),)


def _merge_summary(effects: Sequence[SetSummary]) -> tuple[SetSummary]:
    return (SetSummary(FrozenDict({key: value for effect in effects for key, value in effect.values.items()})),)


def _merge_tensors(effects: Sequence[SaveTensors]) -> Iterator[SaveTensors]:
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for effect in effects:
        by_name.setdefault(effect.name, {}).update(effect.tensors)
    return (SaveTensors(name=name, tensors=FrozenDict(tensors)) for name, tensors in by_name.items())


def _merge_checkpoints(effects: Sequence[SaveCheckpoint]) -> Iterator[SaveCheckpoint]:
    saves = tuple(sorted(_unite_newest(unite_saves(effects)), key=_can_be_resumed, reverse=True))
    return (dataclasses.replace(save, event_saves=saves) for save in saves)


_MERGES: Final[Mapping[_MergedTypes, Callable[[Any], Iterable[Effect]]]] = {
    (ShowProgress,): _choose_progress,
    (LogUpdates, LogUpdateText): _merge_updates,
    (LogScalars,): _merge_scalars,
    (SetSummary,): _merge_summary,
    (SaveTensors,): _merge_tensors,
    (SaveCheckpoint,): _merge_checkpoints,
}
"""How effects are merged, by their types, in the order in which they run, after all others."""


def unite_saves(effects: Iterable[Effect]) -> list[SaveCheckpoint]:
    """Return the requests for checkpoints among effects of one event: one for each tag and owner of weights."""
    merged: dict[tuple[str | None, str | None], SaveCheckpoint] = {}
    for effect in effects:
        if isinstance(effect, SaveCheckpoint):
            key = effect.tag, effect.weights_of
            merged[key] = _unite_checkpoints(merged[key], effect) if key in merged else effect
    return list(merged.values())


def _unite_newest(saves: list[SaveCheckpoint]) -> list[SaveCheckpoint]:
    """Return the requests, with those for `TAG.latest` joined to that for `TAG` if this is for the whole state."""
    if not any(save.tag is None and _can_be_resumed(save) for save in saves):
        return saves
    newest = [save.weights_of is None and NEWEST_TAG.fullmatch(save.tag or "") for save in saves]
    renamed = zip(saves, newest, strict=True)
    return unite_saves(dataclasses.replace(save, tag=None) if is_newest else save for save, is_newest in renamed)


def _can_be_resumed(save: SaveCheckpoint) -> bool:
    return is_resumable(requested_files(save), save.models, save.weights_of)


def _unite_checkpoints(a: SaveCheckpoint, b: SaveCheckpoint) -> SaveCheckpoint:
    models = [effect.models for effect in (a, b) if effect.weights]
    return dataclasses.replace(
        a,
        weights=a.weights or b.weights,
        optimizer=a.optimizer or b.optimizer,
        models=() if () in models else tuple(dict.fromkeys(name for names in models for name in names)),
        pointers=tuple(dict.fromkeys(a.pointers + b.pointers)),
        retention=FrozenDict(unite_limits(a.retention, b.retention)),
    )
