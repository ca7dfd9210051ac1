"""Checkpoints at the end of a run: the trainer saves it unless a callback does, and one iteration is saved once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from noether.core.event import AfterEpoch, AfterTraining
from noether.core.schedules.forecast import Occasions, events_at, fires
from noether.core.schedules.schedule import EveryNEpochs, EveryNUpdates
from noether.core.state import TrainState
from noether.effects.checkpoints.contents import requested_files
from noether.effects.checkpoints.retention import is_resumable
from noether.effects.interpreter import unite_saves
from noether.effects.run_ending import save_at_end
from noether.planning.checkpoint_counts import group_by_slot, requests_at_end
from noether.planning.requests import SaveRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.effect import SaveCheckpoint
    from noether.core.run import Run
    from noether.planning.requests import Probe


def find_end_request(requests: Sequence[SaveRequest], probe: Probe) -> SaveRequest | None:
    """Return the request that the trainer makes at the end; None if callbacks surely save the end.

    Args:
        requests: The requests of the callbacks.
        probe: Knows the run and the sizes of its tensors.
    """
    if _save_end([request for request in requests if request.certain], probe):
        return None
    start = TrainState()
    save = save_at_end(start)
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
    requested; see `covers` in `noether.effects.checkpoints.reuse`.

    Args:
        requests: The requests.
        among: All requests of the run.
        run: The run.
        fewest: Whether to assume that the event before saves enough where a metric decides it.
    """
    all_by_slot = group_by_slot(among)
    moved: list[SaveRequest] = []
    for slot, own in group_by_slot(requests).items():
        at_end, before = requests_at_end(own, run)
        all_at_end, all_before = requests_at_end(all_by_slot[slot], run)
        if not at_end or not before:
            continue
        certain_before = [request for request in all_before if request.certain]
        if all(request.certain for request in (*all_at_end, *all_before)):
            joins = _covers(before, at_end)
        else:
            same_models = len({request.save.models for request in (*all_at_end, *all_before)}) == 1
            joins = same_models and _files(all_at_end) <= _files(certain_before)
            joins = joins or (fewest and _files(at_end) <= _files(all_before))
        moved += at_end if joins else []
    return [replace(each, occasions=_before_end(run), at_end=True) if each in moved else each for each in requests]


def _covers(before: Sequence[SaveRequest], at_end: Sequence[SaveRequest]) -> bool:
    """Return whether a checkpoint made by `before` has all that the requests `at_end` ask for."""
    models = []
    for group in (before, at_end):
        (save,) = unite_saves([request.save for request in group])
        models.append(save.models if save.weights else ())
    return models[0] == models[1] and _files(at_end) <= _files(before)


def _files(requests: Iterable[SaveRequest]) -> set[str]:
    return {name for request in requests for name in requested_files(request.save)}


def _before_end(run: Run) -> Occasions:
    """Return the occasions with only the last event before the end of training."""
    ends_epoch = any(at.event is AfterEpoch for at in events_at(run.final.update, run))
    return Occasions(EveryNEpochs(run.final.epoch) if ends_epoch else EveryNUpdates(max(run.final.update, 1)))
