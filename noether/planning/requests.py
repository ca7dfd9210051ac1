"""Which checkpoints callbacks will ask for, found by asking them: a callback is pure, so nothing comes of a call.

It is called at a few of its firings with a state on the meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch

from noether.core.callback import declaration_of
from noether.core.effect import SaveCheckpoint
from noether.core.errors import NoetherError, WeightsError
from noether.core.event import AfterUpdate, Event
from noether.core.schedules.forecast import EARLY, Occasions, firings, nth_firing, state_at
from noether.core.schedules.gate import Gate
from noether.core.state import Measured
from noether.core.tensors.tree import FrozenDict, tensors
from noether.effects.checkpoints.contents import ModelNamesError, weights_asked
from noether.effects.merging import merge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.schedules.forecast import Firing
    from noether.core.state import TrainState

Slot = tuple[str | None, str | None]
"""What requests of one event are merged by: the tag, `{}` in it for the iteration, and whose weights."""
PROBES: Final = 12
"""How many of its first firings a callback is asked at; who saves at every tenth only is found."""
_VALUES: Final = (0.0, 1e9, -1e9)
"""What a callback that watches metrics is told of them, in turns: it may act on large values only, or on small ones."""


@final
@dataclass(frozen=True, kw_only=True)
class Ask:
    """A checkpoint that a callback asks for whenever it fires at one kind of event.

    Args:
        occasions: When: a schedule that is read at one kind of event, or an event that comes once.
        save: What is asked; `{}` in its tag stands for the iteration, or a count of it.
        sizes: Bytes of the tensors in the checkpoint, by name of a part that other requests may ask for, too.
        certain: Whether it is asked at every firing; otherwise a metric, or what the callback remembers, decides.
    """

    occasions: Occasions
    save: SaveCheckpoint
    sizes: Mapping[str, int]
    certain: bool

    @property
    def slot(self) -> Slot:
        """Requests with the same slot at the same event become one checkpoint."""
        return self.save.tag, self.save.weights_of


@final
@dataclass(frozen=True)
class Answers:
    """What came of asking a callback.

    Args:
        asks: The checkpoints that it asks for.
        stops: Whether it stopped the run before its end.
    """

    asks: tuple[Ask, ...]
    stops: bool


class UnaskedError(NoetherError):
    """A callback could not be asked: it reads values that are there in training only."""


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """What callbacks are asked with.

    Args:
        state: On the meta device, with the memory of all callbacks, and that which the optimizer has after an update.
        begun: The same before the first update.
        run: The run, whose data are read as little as possible.
    """

    state: TrainState
    begun: TrainState
    run: Run

    def asks(self, callback: Callback, occasions: Occasions) -> Answers:
        """Return what a callback asks for at some of its occasions: the first `PROBES` of each kind, and the last.

        Raises:
            UnaskedError: If it cannot be asked.
            ModelNamesError: If it asks for weights of sub-modules that there are not.
            WeightsError: If it asks for weights that nobody keeps.
        """
        parts = [self._asks_at(callback, part) for part in _parts(occasions)]
        return Answers(tuple(ask for part in parts for ask in part.asks), any(part.stops for part in parts))

    def _asks_at(self, callback: Callback, part: Occasions) -> Answers:
        count, state = firings(part, self.run).count, self.state
        watches = any(not key.startswith("weights/") for key in declaration_of(callback).consumes)
        seen: list[tuple[Firing, list[SaveCheckpoint]]] = []
        stops = False
        # What it remembers may make the first differ from the next, and how far the run is the last from all others.
        for n in sorted({*range(1, min(count, PROBES) + 1), count} - {0}):
            firing = nth_firing(part, n, self.run)
            for value in _VALUES if watches else _VALUES[:1]:
                state, effects = self._answer(callback, firing, self._before(callback, firing, state, value))
                seen.append((firing, _merged(effects)))
                stops = stops or (state.stop is not None and firing.iteration.update < self.run.final.update)
        return Answers(tuple(self._united(part, _by_slot(seen), watches=watches)), stops)

    def _before(self, callback: Callback, firing: Firing, memory: TrainState, value: float) -> TrainState:
        """Return the state at a firing, with a value for each metric that the callback needs."""
        at = state_at(firing, self.run)
        keys = [key for key in declaration_of(callback).consumes if "*" not in key]
        metrics = FrozenDict({key: Measured(value, at.iteration) for key in keys})
        return memory.replace(iteration=at.iteration, previous=at.previous, ended=at.ended, metrics=metrics, stop=None)

    def _united(self, part: Occasions, seen: list[dict[Slot, SaveCheckpoint]], *, watches: bool) -> Iterator[Ask]:
        """Yield what was asked at some firings; what differs between them is united."""
        for slot in dict.fromkeys(slot for saves in seen for slot in saves):
            asked = [saves[slot] for saves in seen if slot in saves]
            (save,) = _merged(asked)
            certain = not watches and len(asked) == len(seen) and all(each == save for each in asked)
            yield Ask(occasions=part, save=save, sizes=self._sizes(save, part), certain=certain)

    def _answer(self, callback: Callback, firing: Firing, state: TrainState) -> tuple[TrainState, Effects]:
        """Return what the callback returns: asked with nothing measured or, if it needs that, with one sample."""
        reasons: list[str] = []
        for stage in (_nothing_measured, _one_sample):
            try:
                after, effects = callback(state, stage(firing.event, state, self.run))
            except Exception as error:  # noqa: BLE001  # whatever a callback meets where there are no values
                reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            else:
                return after, effects
        raise UnaskedError(reasons[0])

    def _sizes(self, save: SaveCheckpoint, part: Occasions) -> Mapping[str, int]:
        state = self.begun if set(part.once) & set(EARLY) else self.state
        weights = weights_asked(save, state) if save.weights else {}
        sizes = {f"weights/{name}": _bytes(tensor) for name, tensor in weights.items()}
        if save.optimizer:
            held = (state.opt_state, state.callback_states, state.hyperparams)
            sizes["state"] = sum(_bytes(tensor) for _, tensor in tensors(held))
        return sizes


MISASKED: Final = (ModelNamesError, WeightsError)
"""What is raised for a checkpoint that could not be saved in training either."""


def _parts(occasions: Occasions) -> Iterator[Occasions]:
    """Yield the occasions of each kind of event by itself."""
    for kind in occasions.once:
        yield Occasions(None, (kind,))
    if occasions.schedule is not None:
        yield from map(Occasions, Gate(occasions.schedule).parts.values())


def _by_slot(seen: list[tuple[Firing, list[SaveCheckpoint]]]) -> list[dict[Slot, SaveCheckpoint]]:
    """Return what was asked at each firing by its slot; a tag that is the same at all of them is taken as it is."""
    same = set.intersection(*({save.tag for save in saves} for _, saves in seen)) if len(seen) > 1 else set()
    slots: list[dict[Slot, SaveCheckpoint]] = []
    for firing, saves in seen:
        tags = [save.tag if save.tag in same else _template(save.tag, firing.iteration) for save in saves]
        named = [replace(save, tag=tag) for save, tag in zip(saves, tags, strict=True)]
        slots.append({(save.tag, save.weights_of): save for save in named})
    return slots


def _merged(effects: Iterable[Effect]) -> list[SaveCheckpoint]:
    return [effect for effect in merge(tuple(effects)) if isinstance(effect, SaveCheckpoint)]


def _template(tag: str | None, at: TrainingIteration) -> str | None:
    """Return a tag with `{}` for the iteration or, without it, for each number that is one of its counts.

    Example:
        >>> from noether.core.iteration import TrainingIteration
        >>> at = TrainingIteration(epoch=1, update=20, sample=80)
        >>> _template("E1_U20_S80.ema=0.5", at), _template("epoch-001", at)
        ('{}.ema=0.5', 'epoch-{}')
    """
    if tag is None or str(at) in tag:
        return tag and tag.replace(str(at), "{}")
    counts = {at.epoch, at.update, at.sample}
    return re.sub(r"\d+", lambda match: "{}" if int(match[0]) in counts else match[0], tag)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Readings(NamedTuple):
    losses: Mapping[str, Any]
    outputs: Any


def _nothing_measured(event: type[Event], state: TrainState, run: Run) -> Event:  # noqa: ARG001  # as the other
    """Return an event with losses of zero, no outputs, and datasets without samples."""
    losses = FrozenDict(total=torch.zeros(()))
    return _event(event, run.replace(data={key: _Samples(()) for key in run.data}), _Readings(losses, None))


def _one_sample(event: type[Event], state: TrainState, run: Run) -> Event:
    """Return an event with what the model makes of one sample, and the first sample of each dataset."""
    readings = _Readings(FrozenDict(), None)
    if event is AfterUpdate and "train" in run.data:
        losses, outputs = run.forward(state, next(iter(run.data["train"].batched(1))))
        readings = _Readings(losses, (outputs,))
    return _event(event, run.replace(data={key: _Samples(data.batched(1)) for key, data in run.data.items()}), readings)


def _event(event: type[Event], run: Run, readings: _Readings) -> Event:
    if event is not AfterUpdate:
        return event(run=run)
    size = run.effective_batch_size
    return AfterUpdate(
        run=run,
        samples=size,
        losses=readings.losses,
        outputs=readings.outputs,
        accumulated=(size,),
        lr=FrozenDict(default=0.0),
        weight_decay=FrozenDict(default=0.0),
        grad_norm=torch.zeros(()),
        duration_s=1.0,
    )


@final
class _Samples:
    """At most one batch of a dataset, however it is to be batched."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._batches), 1)

    def batched(self, batch_size: int) -> _Samples:  # noqa: ARG002  # as of any dataset
        return self
