"""Checkpoints at the end of a run: the trainer saves it unless a callback does, and one iteration is saved once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from noether.core.event import AfterEpoch, AfterTraining
from noether.core.schedules.forecast import Occasions, events_at, fires
from noether.core.schedules.schedule import EveryNEpochs, EveryNUpdates
from noether.core.state import TrainState
from noether.effects.checkpoints.file_names import requested_files
from noether.effects.checkpoints.retention import is_resumable
from noether.effects.checkpoints.reuse import contains_models
from noether.effects.interpreter import unite_saves
from noether.effects.run_ending import request_end_checkpoint
from noether.planning.checkpoint_counts import NEWEST, WHOLE, group_by_slot, requests_at_end, whole_state_requests
from noether.planning.requests import SaveRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.effect import SaveCheckpoint
    from noether.core.run import Run
    from noether.planning.requests import Probe

RUN_STATE_TAGS: Final = (WHOLE[0], NEWEST[0])
"""Tags under which callbacks request checkpoints of the run's state; `TAG.end` is not requested by a callback."""


def find_end_request(requests: Sequence[SaveRequest], probe: Probe) -> SaveRequest | None:
    """Return the request that the trainer makes at the end; None if callbacks surely save the end.

    Args:
        requests: The requests of the callbacks.
        probe: Knows the run and the sizes of its tensors.
    """
    if _save_end([request for request in requests if request.certain], probe):
        return None
    start = TrainState()
    save = request_end_checkpoint(start)
    save = replace(save, tag=(save.tag or "").replace(str(start.iteration), "{}"))
    part = Occasions(None, (AfterTraining,))
    return SaveRequest(
        occasions=part, save=save, sizes=probe.part_sizes(save, part), certain=not _save_end(requests, probe)
    )


def _save_end(requests: Iterable[SaveRequest], probe: Probe) -> bool:
    """Return whether the requests, if all are made, make a checkpoint of the end from which a run can resume."""
    return any(
        is_resumable(requested_files(save), save.models, save.weights_of) for save in _saves_at_end(requests, probe)
    )


def _saves_at_end(requests: Iterable[SaveRequest], probe: Probe) -> Iterator[SaveCheckpoint]:
    run, requests = probe.run, list(requests)
    for event in events_at(run.final.update, run):
        if event.iteration == run.final:
            yield from unite_saves(each.save for each in requests if fires(each.occasions, event, run))


def join_end_requests(
    requests: Sequence[SaveRequest], among: Sequence[SaveRequest], run: Run, *, fewest: bool
) -> list[SaveRequest]:
    """Return the requests with those after training moved to the event before it, where the store saves only there.

    After training the store moves only pointers if the event before, which has the same iteration, saved all that is
    requested, under any of the tags of the run's state; see `covers_end` in `noether.effects.checkpoints.reuse`.

    Args:
        requests: The requests.
        among: All requests of the run.
        run: The run.
        fewest: Whether to assume that the event before saves enough where a metric decides it.
    """
    own_by_slot, all_by_slot = group_by_slot(requests), group_by_slot(among)
    targets: dict[int, str | None] = {}  # tag of the checkpoint before, by index of the request
    for slot, own in own_by_slot.items():
        at_end, _ = requests_at_end(own, run)
        all_at_end, _ = requests_at_end(all_by_slot[slot], run)
        for tag in (slot[0], *(tag for tag in RUN_STATE_TAGS if slot[0] in RUN_STATE_TAGS and slot[1] is None)):
            _, before = requests_at_end(own_by_slot.get((tag, slot[1]), ()), run)
            _, all_before = requests_at_end(all_by_slot.get((tag, slot[1]), ()), run)
            if at_end and before and _join((before, at_end), (all_before, all_at_end), fewest=fewest):
                targets |= {index: tag for index, each in enumerate(requests) if any(each is one for one in at_end)}
                break
    moved = [_move(each, targets[index], run) if index in targets else each for index, each in enumerate(requests)]
    _, before_whole = requests_at_end(all_by_slot.get(WHOLE, ()), run)
    if fewest and all(whole_state_requests(before_whole)):  # one checkpoint of the event before may replace both
        once = Occasions(None, (AfterTraining,))
        return [_retag(each, None) if each.slot == NEWEST and each.occasions == once else each for each in moved]
    return moved


def _join(
    own: tuple[Sequence[SaveRequest], Sequence[SaveRequest]],
    among: tuple[Sequence[SaveRequest], Sequence[SaveRequest]],
    *,
    fewest: bool,
) -> bool:
    """Return whether requests after training join the checkpoint of requests before it; both are pairs of these."""
    (before, at_end), (all_before, all_at_end) = own, among
    certain_before = [request for request in all_before if request.certain]
    if all(request.certain for request in (*all_at_end, *all_before)):
        return _covers(before, at_end)
    surely = bool(certain_before) and _covers(certain_before, all_at_end)
    return surely or (fewest and _files(at_end) <= _files(all_before))


def _move(request: SaveRequest, tag: str | None, run: Run) -> SaveRequest:
    """Return a request after training as one that the event before makes, for the checkpoint with a tag."""
    return replace(_retag(request, tag), occasions=_before_end(run), at_end=True)


def _retag(request: SaveRequest, tag: str | None) -> SaveRequest:
    return replace(request, save=replace(request.save, tag=tag))


def _covers(before: Sequence[SaveRequest], at_end: Sequence[SaveRequest]) -> bool:
    """Return whether a checkpoint made by `before` has all that the requests `at_end` ask for."""
    (saved,), (asked,) = (unite_saves([each.save for each in group]) for group in (before, at_end))
    models = not asked.weights or contains_models(saved.models if saved.weights else (), asked.models)
    return models and _files(at_end) <= _files(before)


def _files(requests: Iterable[SaveRequest]) -> set[str]:
    return {name for request in requests for name in requested_files(request.save)}


def _before_end(run: Run) -> Occasions:
    """Return the occasions with only the last event before the end of training."""
    ends_epoch = any(at.event is AfterEpoch for at in events_at(run.final.update, run))
    return Occasions(EveryNEpochs(run.final.epoch) if ends_epoch else EveryNUpdates(max(run.final.update, 1)))
