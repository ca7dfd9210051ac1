"""Counts of checkpoints and of their bytes up to an update, in closed form from the requests' schedules.

Everywhere `through` is the number of an update: all events up to it count, those that come right after it included (the
end of an epoch, the end of training). 0 stands for the events before the first update, -1 for none.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TYPE_CHECKING, Final, final

from noether.core.schedules.forecast import Occasions, count_until, events_at, fires

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.schedules.base import Schedule
    from noether.planning.requests import SaveRequest

Slot = tuple[str | None, str | None]
WHOLE: Final[Slot] = (None, None)
"""The slot of `TAG`."""
NEWEST: Final[Slot] = ("{}.latest", None)
"""The slot of `TAG.latest`."""


@final
@dataclass(frozen=True)
class CheckpointTotal:
    """A number of checkpoints and the bytes of their tensors.

    Example:
        >>> CheckpointTotal(3, 300) - CheckpointTotal(1, 100)
        CheckpointTotal(count=2, size_bytes=200)
    """

    count: int = 0
    size_bytes: int = 0

    def __add__(self, other: CheckpointTotal) -> CheckpointTotal:
        return CheckpointTotal(self.count + other.count, self.size_bytes + other.size_bytes)

    def __sub__(self, other: CheckpointTotal) -> CheckpointTotal:
        return CheckpointTotal(self.count - other.count, self.size_bytes - other.size_bytes)


def count_checkpoints(
    requests: Iterable[SaveRequest],
    contents: Iterable[SaveRequest],
    through: int,
    run: Run,
    deciding: Iterable[SaveRequest],
) -> CheckpointTotal:
    """Return the checkpoints that requests make; requests with one slot at one event make one checkpoint.

    So do those for `TAG` and for `TAG.latest` where `TAG` holds the whole state; see `merge_effects`.

    Args:
        requests: The requests whose checkpoints count.
        contents: The requests that decide what is in a checkpoint: at one event each of them adds its parts.
        through: The last update that counts.
        run: The run.
        deciding: The requests that decide where `TAG` holds the whole state.
    """
    count = size_bytes = 0
    contents_by_slot, by_slot = group_by_slot(contents), group_by_slot(requests)
    for slot, own in by_slot.items():
        count += count_events(own, through, run)
        for adding, part_bytes in _parts_by_requests(contents_by_slot[slot]):
            size_bytes += part_bytes * count_common_events([own, adding], through, run)
    both = [by_slot.get(WHOLE, []), by_slot.get(NEWEST, [])]
    united = count_common_events([*both, *whole_state_requests(deciding)], through, run) if all(both) else 0
    return CheckpointTotal(count - united, size_bytes - united * sum(part_sizes(both[1]).values()))


def whole_state_requests(requests: Iterable[SaveRequest]) -> tuple[list[SaveRequest], list[SaveRequest]]:
    """Return the requests that give `TAG` all weights, and those that give it optimizer and state."""
    own = [request for request in requests if request.slot == WHOLE]
    weights = [request for request in own if request.save.weights and not request.save.models]
    return weights, [request for request in own if request.save.optimizer]


def group_by_slot(requests: Iterable[SaveRequest]) -> dict[Slot, list[SaveRequest]]:
    """Return the requests by slot: those of one slot make one checkpoint where they are made at the same event."""
    slots: dict[Slot, list[SaveRequest]] = defaultdict(list)
    for request in requests:
        slots[request.slot].append(request)
    return slots


def part_sizes(requests: Iterable[SaveRequest]) -> dict[str, int]:
    """Return the bytes of each part of the checkpoint that requests of one slot make together."""
    return {part: size for request in requests for part, size in request.sizes.items()}


def count_events(requests: Iterable[SaveRequest], through: int, run: Run) -> int:
    """Return the number of events at which at least one of the requests is made."""
    if through < 0:
        return 0
    schedule: Schedule | None = None
    once: set[type[Event]] = set()
    for request in requests:
        once.update(request.occasions.once)
        if request.occasions.schedule is not None:
            schedule = request.occasions.schedule if schedule is None else schedule | request.occasions.schedule
    return count_until(Occasions(schedule, tuple(once)), run.iteration_after(through), run)


def count_moments(requests: Sequence[SaveRequest], through: int, run: Run) -> int:
    """Return the number of iterations at which at least one of the requests is made.

    The end of training has the iteration of the event before it; all other events have different ones.
    """
    at_end, before = requests_at_end(requests, run)
    return count_events(requests, through, run) - bool(at_end and before and through >= run.final.update)


def requests_at_end(requests: Iterable[SaveRequest], run: Run) -> tuple[list[SaveRequest], list[SaveRequest]]:
    """Return the requests made after training, and those made at the event before it, which has the same iteration."""
    events = events_at(run.final.update, run)
    before, end = events[-2:] if run.final.update else (None, None)
    groups = [[each for each in requests if at is not None and fires(each.occasions, at, run)] for at in (end, before)]
    return groups[0], groups[1]


def count_common_events(groups: Sequence[Sequence[SaveRequest]], through: int, run: Run) -> int:
    """Return the number of events at which at least one request of every group is made.

    They are counted by inclusion and exclusion, from the events of unions of the groups.

    Args:
        groups: One or more groups of requests.
        through: The last update that counts.
        run: The run.
    """
    if not all(groups):
        return 0
    by_ids = {frozenset(map(id, requests)): requests for requests in groups}
    smallest = [requests for ids, requests in by_ids.items() if not any(other < ids for other in by_ids)]
    return sum(
        (-1) ** (size + 1) * count_events(chain.from_iterable(chosen), through, run)
        for size in range(1, len(smallest) + 1)
        for chosen in combinations(smallest, size)
    )


def _parts_by_requests(requests: Sequence[SaveRequest]) -> Iterator[tuple[list[SaveRequest], int]]:
    """Yield `(requests, bytes)` for all parts of a checkpoint that the same requests contain."""
    bytes_by_indices: dict[tuple[int, ...], int] = defaultdict(int)
    for part, size in part_sizes(requests).items():
        bytes_by_indices[tuple(i for i, request in enumerate(requests) if part in request.sizes)] += size
    for indices, size in bytes_by_indices.items():
        yield [requests[index] for index in indices], size
