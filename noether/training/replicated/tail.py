"""The tail of the last gradient bucket: numbers that are summed with the gradients, without another exchange."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple, final

import torch
from torch import Tensor

from noether.distributed.exact import AMOUNT_PARTS, PARTS, join_amount, join_numbers, split_amount, split_numbers
from noether.training.replicated.losses import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_LOSSES: Final = 16
"""Most losses that are summed in the tail; more are gathered."""
TIMES: Final = ("time_s", "duration_s", "data_s", "step_s", "forward_s", "backward_s", "optimizer_s")
"""Fields of `AfterUpdate` that are those of rank 0."""
_FLAGS: Final = ("needs_exchange", "is_unknown", "is_interrupted", "is_abandoned")
_BITS: Final = 8 * DIGEST_BYTES


class RankNumbers(NamedTuple):
    """What one rank sends behind its gradients.

    Args:
        present: Whether each trained parameter has a gradient.
        digest: Hash of the names of the losses; None if the rank knows of none.
        samples: Samples of the rank.
        weight: Factor of its gradients.
        needs_exchange: Whether its losses have different weights, or are too many.
        is_interrupted: Whether the rank got a signal, or its time is over.
        is_abandoned: Whether the rank has no data for this update, and leaves.
        is_stopping: Whether the rank makes no update, because a callback stopped the run.
        times: Seconds by name, of `TIMES`.
        losses: Means of its losses, in the order of their names.
        changed: Whether forward changed a buffer that has no place in the tail; a 0-dimensional tensor if the device
            has to say it.
        counters: Counters of batch norms, `(counters,)` of dtype int64.
        statistics: Changes of the statistics of batch norms, `(statistics,)`.
    """

    present: Sequence[bool]
    digest: bytes | None
    samples: int
    weight: float
    needs_exchange: bool
    is_interrupted: bool
    is_abandoned: bool
    is_stopping: bool
    times: Mapping[str, float | None]
    losses: Sequence[Tensor]
    changed: Tensor | bool
    counters: Tensor
    statistics: Tensor


class AllNumbers(NamedTuple):
    """What all ranks know after the reduction.

    Args:
        present: Whether a rank has a gradient, for each trained parameter.
        have_same_losses: Whether all ranks have losses of the same names, as far as they know of any.
        samples: Samples of all ranks.
        weight: Sum of the factors of the gradients.
        needs_exchange: Whether losses have different weights on a rank, or are too many.
        is_unknown: Whether a rank knows of no losses.
        is_interrupted: Whether a rank got a signal, or its time is over.
        is_abandoned: Whether a rank leaves without having made the update.
        stopping: Number of ranks that make no update, because a callback stopped the run.
        is_changed: Whether forward changed, on a rank, a buffer that has no place in the tail.
        times: Seconds of rank 0 by name.
        losses: Sums of means times weights, on the device.
        counters: Counters of batch norms, those of the last rank, on the CPU.
        statistics: Sums of changes times samples, on the device.
    """

    present: list[bool]
    have_same_losses: bool
    samples: int
    weight: float
    needs_exchange: bool
    is_unknown: bool
    is_interrupted: bool
    is_abandoned: bool
    stopping: int
    is_changed: bool
    times: dict[str, float | None]
    losses: Tensor
    counters: Tensor
    statistics: Tensor


@final
class Tail:
    """The layout of the tail: what each rank writes to it, and what the sum over ranks means.

    Args:
        rank: Index of this process.
        world_size: Number of processes.
        trained: Number of trained parameters.
        counters: Number of counters of batch norms.
        statistics: Numbers in the statistics of batch norms.
    """

    def __init__(self, rank: int, world_size: int, *, trained: int, counters: int, statistics: int) -> None:
        self._rank, self._world_size = rank, world_size
        sizes = {
            "present": trained,
            "voters": 1,
            "digest": _BITS,
            "samples": AMOUNT_PARTS,
            "weight": AMOUNT_PARTS,
            "flags": len(_FLAGS),
            "stopping": 1,
            "times": PARTS * len(TIMES),
            "changed": 1,
            "counters": PARTS * counters,
            "losses": MAX_LOSSES,
            "statistics": statistics,
        }
        self._slices: dict[str, slice] = {}
        self.size = 0
        for name, size in sizes.items():
            self._slices[name] = slice(self.size, self.size + size)
            self.size += size
        self._host_size = self._slices["times"].stop

    def write(self, tail: Tensor, own: RankNumbers) -> None:
        """Write what this rank sends to `tail`, `(size,)`; the device need not be waited for."""
        digest = [] if own.digest is None else [(byte >> bit) & 1 for byte in own.digest for bit in range(8)]
        flags = [own.needs_exchange, own.digest is None, own.is_interrupted, own.is_abandoned]
        times = [torch.nan if (value := own.times.get(name)) is None else value for name in TIMES]
        parts = split_numbers(torch.tensor(times, dtype=torch.float64)) if self._rank == 0 else None
        numbers = [
            *own.present,
            bool(digest),
            *(digest or [0] * _BITS),
            *split_amount(own.samples),
            *split_amount(own.weight),
            *flags,
            own.is_stopping,
            *([0] * PARTS * len(TIMES) if parts is None else parts.tolist()),
        ]
        tail.zero_()
        tail[: self._host_size].copy_(torch.tensor(numbers, dtype=tail.dtype), non_blocking=True)
        if own.changed is not False:
            self._part(tail, "changed").copy_(torch.as_tensor(own.changed))
        if self._rank == self._world_size - 1:  # its share is never smaller than that of another rank
            self._part(tail, "counters").copy_(split_numbers(own.counters))
        losses = own.losses[:MAX_LOSSES]
        if losses and own.weight:
            values = torch.stack([loss.to(tail.dtype) for loss in losses]) * own.weight
            self._part(tail, "losses")[: len(losses)].copy_(values)
        self._part(tail, "statistics").copy_(own.statistics)

    def read(self, tail: Tensor) -> AllNumbers:
        """Return what the sum of all tails says; it waits for the device once."""
        on_host = tail[: self._slices["counters"].stop].cpu()
        numbers = {name: on_host[each].tolist() for name, each in self._slices.items() if each.stop <= len(on_host)}
        voters = numbers["voters"][0]
        times = join_numbers(self._part(on_host, "times"), torch.float64).tolist()
        return AllNumbers(
            present=[count > 0 for count in numbers["present"]],
            have_same_losses=all(count in (0, voters) for count in numbers["digest"]),
            samples=int(join_amount(numbers["samples"])),
            weight=join_amount(numbers["weight"]),
            **{name: count > 0 for name, count in zip(_FLAGS, numbers["flags"], strict=True)},
            stopping=int(numbers["stopping"][0]),
            is_changed=numbers["changed"][0] > 0,
            times={name: None if math.isnan(value) else value for name, value in zip(TIMES, times, strict=True)},
            losses=self._part(tail, "losses"),
            counters=join_numbers(self._part(on_host, "counters"), torch.int64),
            statistics=self._part(tail, "statistics"),
        )

    def _part(self, tail: Tensor, name: str) -> Tensor:
        return tail[self._slices[name]]
