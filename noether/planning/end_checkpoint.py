"""The checkpoint of the end of a run, which the trainer saves unless a callback does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from noether.core.event import AfterTraining
from noether.core.schedules.forecast import Occasions, events_at, fires
from noether.core.state import TrainState
from noether.effects.checkpoints.contents import requested_files
from noether.effects.checkpoints.retention import is_resumable
from noether.effects.interpreter import unite_saves
from noether.effects.run_ending import save_at_end
from noether.planning.requests import SaveRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.effect import SaveCheckpoint
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
