"""Which checkpoints stay when a run ends, and their bytes, without a look at each of them.

A checkpoint stays because of a claim: whoever asked for it keeps its newest k, a pointer names the newest that it was
set to, or it is the newest that the run could go on from. The newest k of a claim begin at an update that bisection
finds. Past it all of them stay, and are counted by arithmetic; only at that update itself some may stay and others not.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, final

from noether.core.schedules.forecast import events_at
from noether.planning.amounts import Amount, Span, by_slot, made, made_at, meetings, sizes_of, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.run import Run
    from noether.planning.requests import Ask


@final
@dataclass(frozen=True)
class _Claim:
    """What lets checkpoints stay.

    Args:
        keep: How many of the newest; None stands for all.
        askers: What is counted: checkpoints that some of each of these requests make.
        holds: The requests to whose checkpoints `keep` applies.
    """

    keep: int | None
    askers: tuple[list[Ask], ...]
    holds: list[Ask]

    def counts(self, made_by: Sequence[Ask]) -> bool:
        """Return whether the checkpoint that these requests make together is counted."""
        return all(any(ask in some for ask in made_by) for some in self.askers)

    def count(self, span: Span, run: Run) -> int:
        """Return how many checkpoints are counted in a part of the run."""
        first, *others = map(by_slot, self.askers)
        return sum(meetings([asks, *(each[slot] for each in others)], span, run) for slot, asks in first.items())

    def begins(self, run: Run) -> int:
        """Return the update past which all that it holds stay, and before which none; -1 if all do."""
        total = self.count(whole(run), run)
        if self.keep is None or total < self.keep:
            return -1
        updates = range(run.final.update + 1)
        return bisect_right(updates, total - self.keep, key=lambda update: self.count(Span(-1, update), run))


def kept(asks: Sequence[Ask], written: Sequence[Ask], run: Run) -> Amount:
    """Return the checkpoints that stay of those that `asks` ask for.

    Args:
        asks: The requests whose retention and pointers count, each made at every one of its occasions.
        written: Those that say what is in a checkpoint.
        run: The run.
    """
    begun = [(claim, claim.begins(run)) for claim in _claims(asks)]
    looked_at = sorted({update for _, update in begun if 0 <= update <= run.final.update})
    amounts = [Amount(0, 0)]
    for low, high in pairwise([-1, *looked_at, run.final.update + 1]):
        amounts += _staying_at(low, asks, written, [claim for claim, _ in begun], run) if low >= 0 else ()
        # Of what a claim holds only one of, nothing is newer.
        passed = [claim for claim, begins in begun if begins <= low and claim.keep != 1]
        staying = [ask for ask in asks if any(ask in claim.holds for claim in passed)]
        amounts.append(made(staying, written, Span(low, high - 1), run))
    return Amount(*map(sum, zip(*amounts, strict=True)))


def _claims(asks: Sequence[Ask]) -> Iterator[_Claim]:
    for owner in dict.fromkeys(owner for ask in asks for owner in ask.save.retention):
        own = [ask for ask in asks if owner in ask.save.retention]
        for keep in dict.fromkeys(ask.save.retention[owner] for ask in own):
            yield _Claim(keep, (own,), [ask for ask in own if ask.save.retention[owner] == keep])
    for pointer in dict.fromkeys(pointer for ask in asks for pointer in ask.save.pointers):
        own = [ask for ask in asks if pointer in ask.save.pointers]
        yield _Claim(1, (own,), own)
    # The newest that the run could go on from.
    weights = [ask for ask in asks if ask.save.weights and not ask.save.models and ask.save.weights_of is None]
    optimizer = [ask for ask in asks if ask.save.optimizer]
    yield _Claim(1, (weights, optimizer), weights)


def _staying_at(
    update: int, asks: Sequence[Ask], written: Sequence[Ask], claims: Iterable[_Claim], run: Run
) -> Iterator[Amount]:
    """Yield what stays of the checkpoints that are made at one update."""
    events = events_at(update, run)
    drafts = [(at, own) for at in events for own in by_slot(made_at(asks, at, run)).values()]
    later = Span(update, run.final.update)
    for index, (at, own) in enumerate(drafts):
        newer = [other for _, other in drafts[index + 1 :]]
        if any(_is_held(claim, own, newer, claim.count(later, run)) for claim in claims):
            yield Amount(1, sum(sizes_of(by_slot(made_at(written, at, run))[own[0].slot]).values()))


def _is_held(claim: _Claim, made_by: Sequence[Ask], newer: Sequence[Sequence[Ask]], later: int) -> bool:
    """Return whether a checkpoint is among the newest of a claim.

    Args:
        claim: The claim.
        made_by: The requests that make it.
        newer: Those of each checkpoint that is made after it at the same update.
        later: How many the claim counts after that update.
    """
    rank = 1 + sum(map(claim.counts, newer)) + later
    held = claim.counts(made_by) and any(ask in claim.holds for ask in made_by)
    return held and (claim.keep is None or rank <= claim.keep)
