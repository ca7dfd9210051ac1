"""The readings of one update, or of one micro-batch, over all ranks of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from noether.core.tensors.losses import WeightedLosses, loss_weights, with_total
from noether.core.tensors.tree import FrozenDict
from noether.session.errors import SessionError
from noether.session.losses import MicroBatch, mean_losses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.session.losses import Losses


def encode_micro_batches(micro_batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
    """Return samples, losses and weights of micro-batches, as ranks exchange them."""
    return [
        {"samples": each.samples, "losses": dict(each.losses), "weights": dict(loss_weights(each.losses))}
        for each in micro_batches
    ]


def decode_micro_batches(parts: Sequence[Mapping[str, Any]]) -> list[MicroBatch]:
    """Return the micro-batches of all ranks that have samples, without outputs, in the order of ranks.

    Args:
        parts: The readings of each rank, with the result of `encode_micro_batches` as `micro_batches`.
    """
    encoded = [each for part in parts for each in part["micro_batches"]]
    return [
        MicroBatch(samples=each["samples"], losses=_decode_losses(each), outputs=None)
        for each in encoded
        if each["samples"]
    ]


def combine_updates(what: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of `AfterUpdate` from the readings of each rank.

    Losses are means over the micro-batches of all ranks that have them; `mean` is a plain mean over ranks, as gradients
    are averaged. `finite` is whether all ranks are finite. Norm, time and durations are those of rank 0; `outputs` and
    `accumulated` stay those of each rank.

    Args:
        what: Name of the update, for errors.
        parts: `micro_batches`, `mean`, `finite`, `grad_norm`, `times`, `time_s` and `skipped` of each rank; the last is
            None for a rank without samples.

    Raises:
        SessionError: If some ranks skipped the update and others did not.
    """
    micro_batches = decode_micro_batches(parts)
    votes = [part["skipped"] for part in parts]
    if len(set(votes) - {None}) > 1:
        skipped = [rank for rank, vote in enumerate(votes) if vote]
        raise SessionError(
            f"{what} was skipped on ranks {skipped} of {len(parts)}, so their parameters differ: step the optimizer on "
            "all ranks or on none; DistributedDataParallel gives all ranks the same gradients"
        )
    means = [part["mean"] for part in parts if part["mean"]]
    losses = _plain_mean(means) if means else mean_losses(micro_batches) if micro_batches else FrozenDict()
    is_skipped = not losses or True in votes
    finite = [bool(part["finite"]) for part in parts if part["finite"] is not None]
    norms = [part["grad_norm"] for part in parts if part["grad_norm"] is not None]
    known = {
        **parts[0]["times"],
        "time_s": parts[0]["time_s"],
        "samples": sum(each.samples for each in micro_batches),
        "losses": losses,
        "skipped": is_skipped,
        "finite": not is_skipped and all(finite) if finite else None,
        "grad_norm": norms[0] if norms else None,
    }
    weights = loss_weights(losses)
    return known | {"loss_weights": weights} if weights else known


def _decode_losses(encoded: Mapping[str, Any]) -> Losses:
    losses, weights = encoded["losses"], encoded["weights"]
    return WeightedLosses(losses, weights) if weights else FrozenDict(losses)


def _plain_mean(parts: Sequence[Mapping[str, float]]) -> Losses:
    """Return the mean of each loss over the ranks that have it, with their sum as `total`."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    values = {name: [part[name] for part in parts if name in part] for name in names}
    means = {name: sum(each) / len(each) for name, each in values.items()}
    return FrozenDict(means) if list(means) == ["total"] else with_total(_without_total(means), {})


def _without_total(losses: Mapping[str, float]) -> dict[str, float]:
    return {name: loss for name, loss in losses.items() if name != "total"}
