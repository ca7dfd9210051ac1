"""How many checkpoints a run will write and keep, and their bytes, by arithmetic on who asks for what and when."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from noether.core.forecast import ORDER, Firing, Occasions, firings, nth_firing
from noether.effects.contents import STATE, WEIGHTS
from noether.effects.manifest import Manifest, Part
from noether.effects.merging import merge
from noether.effects.plan import pruning
from noether.training.holding import is_resumable, most_held

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.effect import SaveCheckpoint
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.schedule import Schedule
    from noether.training.asking import Ask, Slot


class Bounds(NamedTuple):
    """A number that is not known exactly where metrics decide."""

    at_least: int
    at_most: int


@final
@dataclass(frozen=True)
class Checkpoints:
    """What a run writes and keeps, if nothing stops it early. Bytes are those of tensors.

    Args:
        written: How many checkpoints are written.
        kept: How many are there at the end.
        each_bytes: Bytes of one, for each different size.
        written_bytes: Bytes of all that are written.
        kept_bytes: Bytes of all that are there at the end.
        peak_bytes: The most that can be on the disk at any time: one is written before another one is removed.
    """

    written: Bounds
    kept: Bounds
    each_bytes: tuple[int, ...]
    written_bytes: Bounds
    kept_bytes: Bounds
    peak_bytes: int


def checkpoints(asks: Sequence[Ask], run: Run) -> Checkpoints:
    """Return what comes of all requests together: those of one event for one slot become one checkpoint.

    Args:
        asks: What is asked for, and when.
        run: The run.
    """
    certain = [ask for ask in asks if ask.certain]
    kept, kept_bytes = _kept(certain, certain, run)
    most, most_bytes = _kept(certain, asks, run)
    extra = _kept_by_metrics([ask for ask in asks if not ask.certain], run)
    largest = max((sum(_sizes(own).values()) for own in _by_slot(asks).values()), default=0)
    at_most = most_bytes + extra * largest
    return Checkpoints(
        written=Bounds(_written(certain, run), _written(asks, run)),
        kept=Bounds(kept, most + extra),
        each_bytes=tuple(sorted({sum(ask.sizes.values()) for ask in asks})),
        written_bytes=Bounds(_written_bytes(certain, run), _written_bytes(asks, run)),
        kept_bytes=Bounds(kept_bytes, at_most),
        peak_bytes=max(at_most, _lasting_bytes(asks, asks, run) + most_held(asks, run)),
    )


def _by_slot(asks: Iterable[Ask]) -> dict[Slot, list[Ask]]:
    slots: dict[Slot, list[Ask]] = defaultdict(list)
    for ask in asks:
        slots[ask.slot].append(ask)
    return slots


def _sizes(asks: Iterable[Ask]) -> dict[str, int]:
    """Return the bytes of each part of a checkpoint that is asked for by several."""
    return {part: size for ask in asks for part, size in ask.sizes.items()}


def _times(asks: Iterable[Ask], run: Run) -> int:
    """Return at how many events any of the requests is made."""
    schedule: Schedule | None = None
    once: set[type[Event]] = set()
    for ask in asks:
        once.update(ask.occasions.once)
        if ask.occasions.schedule is not None:
            schedule = ask.occasions.schedule if schedule is None else schedule | ask.occasions.schedule
    return firings(Occasions(schedule, tuple(once)), run).count


def _written(asks: Iterable[Ask], run: Run) -> int:
    return sum(_times(own, run) for own in _by_slot(asks).values())


def _written_bytes(asks: Iterable[Ask], run: Run) -> int:
    """Return the bytes of all that is written: a part is written where anybody asks for it."""
    return sum(size * _times(askers, run) for own in _by_slot(asks).values() for askers, size in _askers_of_parts(own))


def _askers_of_parts(asks: Sequence[Ask]) -> Iterator[tuple[list[Ask], int]]:
    """Yield `(requests, bytes)` of the parts that the same requests ask for."""
    sizes, by_askers = _sizes(asks), defaultdict[tuple[int, ...], int](int)
    for part, size in sizes.items():
        by_askers[tuple(index for index, ask in enumerate(asks) if part in ask.sizes)] += size
    for indices, size in by_askers.items():
        yield [asks[index] for index in indices], size


def _kept(certain: Sequence[Ask], written: Sequence[Ask], run: Run) -> tuple[int, int]:
    """Return number and bytes of the checkpoints that stay of those that `certain` ask for.

    Args:
        certain: The requests whose retention counts.
        written: Those that make a checkpoint larger where they fall together with one of them.
        run: The run.
    """
    passing = [sum(sizes.values()) for sizes in _passing(certain, written, run)]
    lasting = _written(_lasting(certain), run)
    return lasting + len(passing), _lasting_bytes(certain, written, run) + sum(passing)


def _lasting_bytes(asks: Sequence[Ask], written: Sequence[Ask], run: Run) -> int:
    """Return the bytes of the checkpoints that are kept for good."""
    total, together = 0, _by_slot(written)
    for slot, own in _by_slot(_lasting(asks)).items():
        for askers, size in _askers_of_parts(together[slot]):
            # A part is kept where it is asked for and one that is kept for good is, too.
            total += size * (_times(own, run) + _times(askers, run) - _times([*own, *askers], run))
    return total


def _lasting(asks: Iterable[Ask]) -> list[Ask]:
    return [ask for ask in asks if None in ask.save.retention.values()]


def _passing(certain: Sequence[Ask], written: Sequence[Ask], run: Run) -> Iterator[dict[str, int]]:
    """Yield the sizes of each checkpoint that stays though nobody keeps all of its kind: the last ones of a run.

    No earlier one can stay, so only so many are looked at as are kept; what happens to them, the store itself decides.
    """
    drafts = [draft for firing in _last(certain, run) for draft in _drafts(firing, certain, written, run)]
    manifests = [draft.manifest(number) for number, draft in enumerate(drafts)]
    tags = {pointer: m.tag for draft, m in zip(drafts, manifests, strict=True) for pointer in draft.save.pointers}
    keep = set(pruning(manifests, tags, {manifest.tag for manifest in manifests}, parent=None).keep)
    for draft, manifest in zip(drafts, manifests, strict=True):
        if manifest.tag in keep and None not in manifest.retention.values():
            yield draft.sizes


class _Draft(NamedTuple):
    """A checkpoint that will be written."""

    firing: Firing
    save: SaveCheckpoint
    sizes: dict[str, int]

    def manifest(self, number: int) -> Manifest:
        names = [name for name, asked in ((WEIGHTS, self.save.weights), (STATE, self.save.optimizer)) if asked]
        return Manifest(
            tag=str(number),
            run_id="",
            segment=1,
            parent=None,
            iteration=self.firing.iteration,
            event=self.firing.event.__name__,
            number=1 + number,  # of two at one iteration the later one is the newer
            parts=dict.fromkeys(names, Part(size_bytes=0, sha256="")),
            weights_of=self.save.weights_of,
            models=self.save.models,
            retention=dict(self.save.retention),
        )


def _last(asks: Iterable[Ask], run: Run) -> list[Firing]:
    """Return the last events at which each request is made, as many as are kept, in the order of the run."""
    found: set[Firing] = set()
    for ask in asks:
        count = firings(ask.occasions, run).count
        kept = max((keep or 0 for keep in ask.save.retention.values()), default=0)
        found.update(nth_firing(ask.occasions, n, run) for n in range(max(1, count - kept), count + 1))
    return sorted(found, key=lambda each: (each.iteration.update, ORDER.index(each.event)))


def _drafts(firing: Firing, certain: Sequence[Ask], written: Sequence[Ask], run: Run) -> Iterator[_Draft]:
    due = _by_slot(ask for ask in certain if ask.at(firing, run))
    for slot, own in due.items():
        merged: SaveCheckpoint = merge([ask.save for ask in own])[0]  # type: ignore[assignment]  # of its like
        yield _Draft(firing, merged, _sizes(ask for ask in written if ask.slot == slot and ask.at(firing, run)))


def _kept_by_metrics(asks: Sequence[Ask], run: Run) -> int:
    """Return how many checkpoints can stay at most for those who ask where a metric says so."""
    lasting = _lasting(asks)
    others = [ask for ask in asks if ask not in lasting]
    pointers = {pointer for ask in others for pointer in ask.save.pointers}
    owners = {owner: keep or 0 for ask in others for owner, keep in ask.save.retention.items()}
    resumable = any(is_resumable(ask.save) and not ask.save.pointers for ask in others)
    passing = min(len(pointers) + sum(owners.values()) + resumable, _written(others, run))
    return _written(lasting, run) + passing
