"""Forecast of the checkpoints that a run writes, keeps and has on the disk at once, without walking the run.

A checkpoint stays because of a retention rule: a callback keeps the newest k that it requested, a pointer names the
newest that it was set to, or it is the newest that the run can resume from. Bisection finds the update at which the
newest k of a rule begin. All later ones stay, and a closed form counts them; the forecast walks only through the
checkpoints of that one update.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, final

from noether.core.event import AfterTraining
from noether.core.schedules.forecast import Occasions, events_at, fires, firings
from noether.effects.checkpoints.file_names import requested_files
from noether.effects.checkpoints.retention import is_kept, is_resumable
from noether.effects.interpreter import unite_saves
from noether.planning.checkpoint_counts import (
    NEWEST,
    WHOLE,
    CheckpointTotal,
    count_checkpoints,
    count_common_events,
    count_moments,
    group_by_slot,
    part_sizes,
    requests_at_end,
    whole_state_requests,
)
from noether.planning.end_checkpoint import RUN_STATE_TAGS, join_end_requests

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from noether.core.run import Run
    from noether.core.schedules.forecast import Firing
    from noether.planning.requests import SaveRequest


class Bounds(NamedTuple):
    """A number that is known only between bounds where metrics decide; both are equal where they do not."""

    at_least: int
    at_most: int


@final
@dataclass(frozen=True)
class CheckpointForecast:
    """The checkpoints that a run writes and keeps if nothing stops it early.

    Bytes are those of tensors. The text beside them (names and shapes of tensors, `state.json`, hashes) is not counted:
    parts of it depend on values of the training.

    Args:
        written: Number of checkpoints that the run writes.
        kept: Number of checkpoints that exist at the end.
        each_bytes: Bytes of one checkpoint, for each different size.
        written_bytes: Bytes of all that the run writes.
        kept_bytes: Bytes of all that exist at the end.
        peak_bytes: Upper bound of the bytes on the disk at any time; a checkpoint is written before another is removed.
    """

    written: Bounds
    kept: Bounds
    each_bytes: tuple[int, ...]
    written_bytes: Bounds
    kept_bytes: Bounds
    peak_bytes: int


def forecast_checkpoints(requests: Sequence[SaveRequest], run: Run) -> CheckpointForecast:
    """Return the forecast for all requests together.

    Args:
        requests: The requests for checkpoints, and when they are made.
        run: The run.
    """
    end = run.final.update
    certain = [request for request in requests if request.certain]
    fewest, most = (join_end_requests(certain, requests, run, fewest=fewest) for fewest in (True, False))
    requests = join_end_requests(requests, requests, run, fewest=False)
    least_written = count_checkpoints(fewest, fewest, end, run, requests)
    most_written = count_checkpoints(requests, requests, end, run, certain)
    least_kept = _count_kept(fewest, fewest, run, requests)
    most_kept = _count_kept(most, requests, run, certain)
    extra = _most_kept_by_metrics(requests, run)
    largest = max((sum(part_sizes(own).values()) for own in group_by_slot(requests).values()), default=0)
    most_kept_bytes = most_kept.size_bytes + extra * largest
    permanent = count_checkpoints(_kept_forever(requests), requests, end, run, certain)
    return CheckpointForecast(
        written=Bounds(least_written.count, most_written.count),
        kept=Bounds(least_kept.count, most_kept.count + extra),
        each_bytes=tuple(sorted({sum(request.sizes.values()) for request in requests})),
        written_bytes=Bounds(least_written.size_bytes, most_written.size_bytes),
        kept_bytes=Bounds(least_kept.size_bytes, most_kept_bytes),
        peak_bytes=max(most_kept_bytes, permanent.size_bytes + _peak_removable_bytes(requests, run)),
    )


def _moment(slot: tuple[str | None, str | None]) -> object:
    """Return a key that slots share if their checkpoints of one iteration count once for an owner."""
    return None if slot[0] in RUN_STATE_TAGS and slot[1] is None else slot


@final
@dataclass(frozen=True, eq=False)
class _RetentionRule:
    """A reason for checkpoints to stay: the rule keeps the newest of those that it counts.

    Args:
        counted: The rule counts a checkpoint if requests of each of these groups make it.
        limits: How many of the newest stay (None: all), and the requests to whose checkpoints this applies.
        keeps_newest: Whether the rule keeps the newest at any time; a pointer that a metric moves may stay behind.
        is_of_pointer: Whether it is that of a pointer.
        counts_copies: Whether copies (`TAG` and `TAG.2` of one iteration) count one by one, and not once.
    """

    counted: tuple[list[SaveRequest], ...]
    limits: Mapping[int | None, list[SaveRequest]]
    keeps_newest: bool = True
    is_of_pointer: bool = False
    counts_copies: bool = True

    @property
    def requests(self) -> list[SaveRequest]:
        """All requests whose checkpoints the rule may keep."""
        return [request for requests in self.limits.values() for request in requests]

    def counts(self, making: Sequence[SaveRequest]) -> bool:
        """Return whether the rule counts the checkpoint that these requests make together."""
        return all(any(request in group for request in making) for group in self.counted)

    def count(self, through: int, run: Run) -> int:
        """Return the number of counted checkpoints up to an update."""
        first, *others = map(group_by_slot, self.counted)
        if not self.counts_copies:
            moments: dict[object, list[SaveRequest]] = {}
            for slot, requests in first.items():
                moments.setdefault(_moment(slot), []).extend(requests)
            return sum(count_moments(requests, through, run) for requests in moments.values())
        return sum(
            count_common_events([requests, *(other[slot] for other in others)], through, run)
            for slot, requests in first.items()
        )

    def first_kept(self, keep: int | None, run: Run) -> int:
        """Return the update at which the newest `keep` checkpoints of the rule begin; -1 if it keeps all."""
        total = self.count(run.final.update, run)
        if keep is None or total < keep:
            return -1
        return bisect_right(range(run.final.update + 1), total - keep, key=lambda update: self.count(update, run))

    def keeps(self, making: Sequence[SaveRequest], newer: int) -> bool:
        """Return whether the rule keeps the checkpoint that these requests make, after which it counts `newer` ones."""
        return self.counts(making) and any(
            is_kept(newer + 1, keep) and any(request in requests for request in making)
            for keep, requests in self.limits.items()
        )

    def most_kept(self, run: Run) -> int:
        """Return the most checkpoints that it keeps at a time, without those that stay forever."""
        most = max(keep or 0 for keep in self.limits)
        if not self.counts_copies:
            most += sum(all(requests_at_end(own, run)) for own in group_by_slot(self.requests).values()) if most else 0
        return min(most, sum(firings(request.occasions, run).count for request in self.requests))


def _retention_rules(requests: Sequence[SaveRequest]) -> Iterator[_RetentionRule]:
    for owner in dict.fromkeys(owner for request in requests for owner in request.save.retention):
        own = [request for request in requests if owner in request.save.retention]
        limits: dict[int | None, list[SaveRequest]] = {}
        for request in own:
            limits.setdefault(request.save.retention[owner], []).append(request)
        yield _RetentionRule((own,), limits, counts_copies=False)
    pointers = dict.fromkeys(pointer for request in requests for pointer in request.save.pointers)
    pointed = [[request for request in requests if pointer in request.save.pointers] for pointer in pointers]
    # A pointer that is only set at the end names a checkpoint that others may name, too: it comes last.
    for own in sorted(pointed, key=_only_at_end):
        yield _RetentionRule((own,), {1: own}, keeps_newest=all(request.certain for request in own), is_of_pointer=True)
    resumable = [request for request in requests if _may_be_resumable(request, requests)]
    if resumable:
        weights = [r for r in requests if r.save.weights and not r.save.models and r.save.weights_of is None]
        optimizer = [request for request in requests if request.save.optimizer]
        yield _RetentionRule((weights, optimizer), {1: resumable})


def _is_resumable(request: SaveRequest) -> bool:
    save = request.save
    return is_resumable(requested_files(save), save.models, save.weights_of)


def _may_be_resumable(request: SaveRequest, requests: Iterable[SaveRequest]) -> bool:
    """Return whether a run can resume from a checkpoint of the request, alone or with others of the same event."""
    if _is_resumable(request):
        return True
    same_slot = [other for other in requests if other.slot == request.slot]
    with_weights = any(other.save.weights for other in same_slot)
    return with_weights and any(other.save.optimizer for other in same_slot) and request.save.weights_of is None


def _count_kept(
    requests: Sequence[SaveRequest], contents: Sequence[SaveRequest], run: Run, deciding: Sequence[SaveRequest]
) -> CheckpointTotal:
    """Return the checkpoints of `requests` that exist at the end of the run.

    Args:
        requests: The requests whose retention and pointers count, each made at all of its occasions.
        contents: The requests that decide what is in a checkpoint.
        run: The run.
        deciding: The requests that decide where `TAG` holds the whole state, and `TAG.latest` is the same checkpoint.
    """
    end = run.final.update
    rules = list(_retention_rules(requests))
    starts = [(rule.first_kept(keep, run), keep, own) for rule in rules for keep, own in rule.limits.items()]
    boundaries = sorted({start for start, _, _ in starts if 0 <= start <= end})
    total = CheckpointTotal()
    for low, high in pairwise([-1, *boundaries, end + 1]):
        if low >= 0:
            total += _count_kept_at(low, requests, contents, rules, run, deciding)
        # After the one checkpoint that a limit of 1 keeps there is no newer one.
        kept = [own for start, keep, own in starts if start <= low and keep != 1]
        staying = [request for request in requests if any(request in own for own in kept)]
        count = partial(count_checkpoints, staying, contents, run=run, deciding=deciding)
        total += count(high - 1) - count(low)
    return total


def _count_kept_at(
    update: int,
    requests: Sequence[SaveRequest],
    contents: Sequence[SaveRequest],
    rules: Iterable[_RetentionRule],
    run: Run,
    deciding: Sequence[SaveRequest],
) -> CheckpointTotal:
    """Return the checkpoints made at one update that exist at the end of the run, tested one by one."""
    checkpoints = []
    for event in events_at(update, run):
        here = group_by_slot(request for request in requests if fires(request.occasions, event, run))
        whole = whole_state_requests(request for request in deciding if fires(request.occasions, event, run))
        if WHOLE in here and NEWEST in here and all(whole):
            here[WHOLE] += here.pop(NEWEST)
        checkpoints += [(event, making) for making in here.values()]
    kept: set[int] = set()
    for rule in rules:
        newer, ages = rule.count(run.final.update, run) - rule.count(update, run), dict[object, int]()
        for index in reversed(_order_by_rule(rule, checkpoints, requests)):
            event, making = checkpoints[index]
            if rule.counts(making):
                slot = making[0].slot
                copy = (slot, event) if rule.counts_copies else (_moment(slot), event.iteration)
                if rule.keeps(making, newer + ages.setdefault(copy, len(ages))):
                    kept.add(index)
    total = CheckpointTotal()
    for event, making in (checkpoints[index] for index in sorted(kept)):
        adding = [each for each in contents if each.slot == making[0].slot and fires(each.occasions, event, run)]
        total += CheckpointTotal(1, sum(part_sizes(adding).values()))
    return total


def _order_by_rule(
    rule: _RetentionRule, checkpoints: Sequence[tuple[Firing, list[SaveRequest]]], requests: Sequence[SaveRequest]
) -> list[int]:
    """Return the indices of checkpoints made at one update, oldest first, or as a pointer comes to name them.

    The store sets pointers at each event in the order of its saves: those to resume from come first.
    """

    def key(index: int) -> tuple[bool, bool, int]:
        event, making = checkpoints[index]
        at_end = [each for each in making if each.at_end or event.event is AfterTraining]
        saves = unite_saves([each.save for each in at_end or making])
        resumable = any(is_resumable(requested_files(save), save.models, save.weights_of) for save in saves)
        return bool(at_end), not resumable, min(requests.index(each) for each in at_end or making)

    indices = list(range(len(checkpoints)))
    return sorted(indices, key=key) if rule.is_of_pointer else indices


def _kept_forever(requests: Iterable[SaveRequest]) -> list[SaveRequest]:
    return [request for request in requests if None in request.save.retention.values()]


def _most_kept_by_metrics(requests: Sequence[SaveRequest], run: Run) -> int:
    """Return the most checkpoints of uncertain requests that exist at the end beside those of certain ones."""
    uncertain = [request for request in requests if not request.certain]
    forever = _kept_forever(uncertain)
    others = [request for request in uncertain if request not in forever]
    pointers = {pointer for request in others for pointer in request.save.pointers}
    limits = {owner: keep or 0 for request in others for owner, keep in request.save.retention.items()}
    # A resumable checkpoint that a pointer names is counted with the pointer.
    resumable = any(
        _may_be_resumable(request, requests) and not (_is_resumable(request) and request.save.pointers)
        for request in others
    )
    forever_count, other_count = (
        count_checkpoints(each, each, run.final.update, run, ()).count for each in (forever, others)
    )
    return forever_count + min(len(pointers) + sum(limits.values()) + resumable, other_count)


def _peak_removable_bytes(requests: Sequence[SaveRequest], run: Run) -> int:
    """Return an upper bound of the bytes of removable checkpoints at any time, the one being written included.

    Each rule counts with the largest checkpoints that it can keep, unless rules counted before keep the same ones.
    """
    if not requests:
        return 0
    counted: list[_RetentionRule] = []
    for rule in _retention_rules(requests):
        if rule.most_kept(run) and not _is_covered(rule, counted):
            counted.append(rule)
    sizes = [max(_largest_size(request, requests) for request in rule.requests) for rule in counted]
    kept = sum(rule.most_kept(run) * size for rule, size in zip(counted, sizes, strict=True))
    return kept + max(_largest_size(request, requests) for request in requests)


def _is_covered(rule: _RetentionRule, counted: Iterable[_RetentionRule]) -> bool:
    """Return whether other rules always keep the newest checkpoint of a rule.

    The newest checkpoint of several requests is the newest of one of them. So it is covered if each request is kept
    forever, or belongs to a rule that keeps the newest of only requests that this rule has, too.
    """
    others = [other for other in counted if other.keeps_newest]
    return rule.keeps_newest and all(
        None in request.save.retention.values() or any(_keeps_newest_of(other, request, rule) for other in others)
        for request in rule.requests
    )


def _keeps_newest_of(other: _RetentionRule, request: SaveRequest, rule: _RetentionRule) -> bool:
    """Return whether `other` also keeps the newest checkpoint of `rule` if `request` made it."""
    if request not in other.requests:
        return False
    if _only_at_end(rule.requests):  # only checkpoints of the same event are newer
        return sum(_is_at_end(each) for each in other.requests) == 1
    return all(each in rule.requests for each in other.requests)


def _only_at_end(requests: Iterable[SaveRequest]) -> bool:
    return all(_is_at_end(request) for request in requests)


def _is_at_end(request: SaveRequest) -> bool:
    return request.at_end or request.occasions == Occasions(None, (AfterTraining,))


def _largest_size(request: SaveRequest, requests: Iterable[SaveRequest]) -> int:
    """Return the bytes of the largest checkpoint that the request is a part of."""
    return sum(part_sizes(other for other in requests if other.slot == request.slot).values())
