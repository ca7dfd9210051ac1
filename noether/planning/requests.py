"""Requests for checkpoints that callbacks will make, found by calling the callbacks: they are pure, so calls are safe.

A probe calls a callback at a few of its firings with a state on the meta device, where tensors have no values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch

from noether.core.callback import declaration_of
from noether.core.errors import NoetherError, WeightsError
from noether.core.event import AfterUpdate, Event
from noether.core.schedules.forecast import EARLY, Occasions, firings, nth_firing, state_at
from noether.core.schedules.gate import Gate
from noether.core.state import Measured
from noether.core.tensors.stored_weights import names_weights
from noether.core.tensors.tree import FrozenDict, tensors
from noether.effects.checkpoints.contents import ModelNamesError, select_weights
from noether.effects.interpreter import unite_saves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect, SaveCheckpoint
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.schedules.forecast import Firing
    from noether.core.state import TrainState

PROBED_FIRINGS: Final = 12
"""A probe calls a callback at this many of its first firings: enough to find one that saves at every tenth."""
_METRIC_VALUES: Final = (0.0, 1e9, -1e9)
"""Values that a probe gives to metrics in turn: a callback may save only where they are large, or small."""
UNSAVABLE_ERRORS: Final = (ModelNamesError, WeightsError)
"""Errors about a requested checkpoint that training could not save either."""


@final
@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """A checkpoint that a callback requests whenever it fires at one kind of event.

    Args:
        occasions: When the request is made: a schedule read at one kind of event, or an event that comes once.
        save: The requested checkpoint; `{}` in its tag stands for the iteration, or a count of it.
        sizes: Bytes of the tensors in the checkpoint, by part; other requests may contain the same parts.
        certain: Whether every firing makes the request; otherwise a metric or the callback's memory decides.
        at_end: Whether it is made after training, but joins the checkpoint of the event before; see
            `join_end_requests`.
    """

    occasions: Occasions
    save: SaveCheckpoint
    sizes: Mapping[str, int]
    certain: bool
    at_end: bool = False

    @property
    def slot(self) -> tuple[str | None, str | None]:
        """Tag and owner of the weights; requests with one slot make one checkpoint at an event."""
        return self.save.tag, self.save.weights_of


@final
@dataclass(frozen=True)
class ProbeResult:
    """What a probe found out about a callback.

    Args:
        requests: The checkpoints that it requested.
        stops: Whether it stopped the run before its end.
        effects: The types of effects that it requested.
    """

    requests: tuple[SaveRequest, ...]
    stops: bool
    effects: tuple[type[Effect], ...] = ()


class ProbeError(NoetherError):
    """A callback failed without the values that exist only in training, so its requests are unknown."""


@final
@dataclass(frozen=True, kw_only=True)
class Probe:
    """Finds the requests of callbacks by calling them.

    Args:
        state: A state on the meta device with the memory of all callbacks, and of the optimizer after an update.
        initial: The same before the first update.
        run: The run; the probe reads at most one sample of each of its datasets.
    """

    state: TrainState
    initial: TrainState
    run: Run

    def find_requests(self, callback: Callback, occasions: Occasions) -> ProbeResult:
        """Return the requests of a callback at its first `PROBED_FIRINGS` firings and its last, for each kind of event.

        Raises:
            ProbeError: If the callback fails.
            ModelNamesError: If it requests weights of sub-modules that do not exist.
            WeightsError: If it requests weights that no callback keeps.
        """
        results = [self._probe_part(callback, part) for part in _parts_by_event(occasions)]
        requests = tuple(request for result in results for request in result.requests)
        effects = dict.fromkeys(kind for result in results for kind in result.effects)
        return ProbeResult(requests, any(result.stops for result in results), tuple(effects))

    def _probe_part(self, callback: Callback, part: Occasions) -> ProbeResult:
        count, state = firings(part, self.run).count, self.state
        reads_metrics = any(not names_weights(key) for key in declaration_of(callback).required)
        saves: list[tuple[Firing, list[SaveCheckpoint]]] = []
        stops = False
        kinds: dict[type[Effect], None] = {}
        # The callback's memory may make the first firing differ from the next; the last may differ as the run ends.
        for n in sorted({*range(1, min(count, PROBED_FIRINGS) + 1), count} - {0}):
            firing = nth_firing(part, n, self.run)
            for value in _METRIC_VALUES if reads_metrics else _METRIC_VALUES[:1]:
                state, effects = self._call(callback, firing, self._state_at(firing, callback, state, value))
                saves.append((firing, unite_saves(effects)))
                kinds |= dict.fromkeys(map(type, effects))
                stops = stops or (state.stop is not None and firing.iteration.update < self.run.final.update)
        requests = tuple(self._unite_saves(part, _saves_by_slot(saves), reads_metrics=reads_metrics))
        return ProbeResult(requests, stops, tuple(kinds))

    def _state_at(self, firing: Firing, callback: Callback, memory: TrainState, value: float) -> TrainState:
        """Return the state at a firing, in which each metric that the callback consumes has the value."""
        at = state_at(firing, self.run)
        keys = [key for key in declaration_of(callback).required if "*" not in key]
        metrics = FrozenDict({key: Measured(value, at.iteration) for key in keys})
        return memory.replace(iteration=at.iteration, previous=at.previous, ended=at.ended, metrics=metrics, stop=None)

    def _call(self, callback: Callback, firing: Firing, state: TrainState) -> tuple[TrainState, Effects]:
        """Call the callback with an event without measurements or, if that fails, with one of a single sample."""
        reasons: list[str] = []
        for make_event in (_empty_event, _one_sample_event):
            try:
                after, effects = callback(state, make_event(firing.event, state, self.run))
            except Exception as error:  # noqa: BLE001  # a callback may raise anything where tensors have no values
                reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            else:
                return after, effects
        raise ProbeError(reasons[0])

    def _unite_saves(
        self,
        part: Occasions,
        saves_by_firing: list[dict[tuple[str | None, str | None], SaveCheckpoint]],
        *,
        reads_metrics: bool,
    ) -> Iterator[SaveRequest]:
        """Yield one request per slot, which unites the requests that all firings made for it."""
        for slot in dict.fromkeys(slot for saves in saves_by_firing for slot in saves):
            slot_saves = [saves[slot] for saves in saves_by_firing if slot in saves]
            (save,) = unite_saves(slot_saves)
            always = len(slot_saves) == len(saves_by_firing) and all(each == save for each in slot_saves)
            certain = always and not reads_metrics
            yield SaveRequest(occasions=part, save=save, sizes=self.part_sizes(save, part), certain=certain)

    def part_sizes(self, save: SaveCheckpoint, part: Occasions) -> Mapping[str, int]:
        """Return the bytes of the tensors in a requested checkpoint, by part.

        Args:
            save: The request.
            part: When it is made: before the first update, most optimizers have no memory.
        """
        state = self.initial if set(part.once) & set(EARLY) else self.state
        weights = select_weights(save, state) if save.weights else {}
        sizes = {f"weights/{name}": tensor.nbytes for name, tensor in weights.items()}
        if save.optimizer:
            remembered = (state.opt_state, state.callback_states, state.hyperparams)
            sizes["state"] = sum(tensor.nbytes for _, tensor in tensors(remembered))
        return sizes


def _parts_by_event(occasions: Occasions) -> Iterator[Occasions]:
    """Yield the occasions of each kind of event separately."""
    for kind in occasions.once:
        yield Occasions(None, (kind,))
    if occasions.schedule is not None:
        yield from map(Occasions, Gate(occasions.schedule).parts.values())


def _saves_by_slot(
    probed: list[tuple[Firing, list[SaveCheckpoint]]],
) -> list[dict[tuple[str | None, str | None], SaveCheckpoint]]:
    """Return the requests of each firing by slot, with templates for tags, except for a tag that all firings share."""
    shared = set.intersection(*({save.tag for save in saves} for _, saves in probed)) if len(probed) > 1 else set()
    by_slot: list[dict[tuple[str | None, str | None], SaveCheckpoint]] = []
    for firing, saves in probed:
        tags = [save.tag if save.tag in shared else _tag_template(save.tag, firing.iteration) for save in saves]
        templated = [replace(save, tag=tag) for save, tag in zip(saves, tags, strict=True)]
        by_slot.append({(save.tag, save.weights_of): save for save in templated})
    return by_slot


def _tag_template(tag: str | None, at: TrainingIteration) -> str | None:
    """Return a tag with `{}` for the iteration or, without it, for each number that is one of its counts.

    Example:
        >>> from noether.core.iteration import TrainingIteration
        >>> at = TrainingIteration(epoch=1, update=20, sample=80)
        >>> _tag_template("E1_U20_S80.ema=0.5", at), _tag_template("epoch-001", at)
        ('{}.ema=0.5', 'epoch-{}')
    """
    if tag is None:
        return None
    if str(at) in tag:
        return tag.replace(str(at), "{}")
    counts = {at.epoch, at.update, at.sample}
    return re.sub(r"\d+", lambda match: "{}" if int(match[0]) in counts else match[0], tag)


class _Measurements(NamedTuple):
    losses: Mapping[str, Any]
    outputs: Any


def _empty_event(event: type[Event], state: TrainState, run: Run) -> Event:
    """Return an event with losses of zero, without outputs, and with datasets without samples."""
    losses = FrozenDict(total=torch.zeros(()))
    run = run.replace(data={key: _OneBatch(()) for key in run.data})
    return _make_event(event, state, run, _Measurements(losses, None))


def _one_sample_event(event: type[Event], state: TrainState, run: Run) -> Event:
    """Return an event with the model's results for one sample, and the first sample of each dataset."""
    measured = _Measurements(FrozenDict(), None)
    if event is AfterUpdate and "train" in run.data:
        losses, outputs = run.forward(state, next(iter(run.data["train"].batched(1))))
        measured = _Measurements(losses, (outputs,))
    data = {key: _OneBatch(dataset.batched(1).with_sizes()) for key, dataset in run.data.items()}
    return _make_event(event, state, run.replace(data=data), measured)


def _make_event(event: type[Event], state: TrainState, run: Run, measured: _Measurements) -> Event:
    if event is not AfterUpdate:
        return event(run=run)
    size = run.effective_batch_size
    return AfterUpdate(
        run=run,
        samples=size,
        losses=measured.losses,
        outputs=measured.outputs,
        accumulated=(size,),
        lr=FrozenDict(default=0.0),
        weight_decay=FrozenDict(default=0.0),
        grad_norm=torch.zeros(()),
        gradients=FrozenDict({name: param.new_zeros(()).expand(param.shape) for name, param in state.params.items()}),
        duration_s=1.0,
    )


@final
class _OneBatch:
    """At most one batch of a dataset, whatever the batch size.

    Args:
        batches: Batches and their numbers of samples.
    """

    def __init__(self, batches: Iterable[tuple[Any, int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _ in self.with_sizes())

    def with_sizes(self) -> Iterator[tuple[Any, int]]:
        """Yield the batch and its number of samples."""
        return islice(iter(self._batches), 1)

    def batched(self, batch_size: int) -> _OneBatch:  # noqa: ARG002  # the signature of every dataset
        return self
