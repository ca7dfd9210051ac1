"""Exchanges small values between the ranks of a run, over one process group on the CPU."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
import torch.distributed as dist

from noether.core.errors import NoetherError
from noether.effects.disk.encoding import decode_tree, encode_tree
from noether.effects.disk.tensor_files import read_tensors, tensor_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Column = np.ndarray[Any, np.dtype[np.float64]]
    Reduction = Callable[[Column], Any]

_FRAME_BYTES: Final = 1024
"""What one collective carries of each rank; longer contents take a second one."""
_TEXT_BYTES: Final = 4096
_HASH_BYTES: Final = 8
_HEADER_BYTES: Final = 2 * _HASH_BYTES


class RankMismatchError(NoetherError, RuntimeError):
    """The ranks of a run exchanged different things at one point, so they no longer make the same steps."""


@final
class Channel:
    """What the ranks of a run exchange over one group, which only one thread of each process may use.

    Every exchange is headed by a hash of what it is: of ranks that exchange different things, each raises an error
    with what all of them do, where a plain collective would give wrong numbers. Sums are computed by each rank in the
    order of ranks, in float64, so all ranks have the same bits.

    Args:
        group: A gloo group of all ranks; None for one process, which exchanges nothing.

    Example:
        >>> Channel().gather("greeting", {"text": "hello"})
        [{'text': 'hello'}]
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._world_size = 1 if group is None else group.size()

    def reduce(
        self,
        what: str,
        *,
        sums: Mapping[str, float] | None = None,
        means: Mapping[str, tuple[float, float]] | None = None,
        largest: Mapping[str, float] | None = None,
        smallest: Mapping[str, float] | None = None,
        of_rank_0: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return numbers reduced over all ranks, in float64, by name; in one collective of up to 126 numbers.

        Args:
            what: Name of the exchange, for errors.
            sums: Numbers to add up.
            means: Value and weight by name; the mean of the values of weight above 0, NaN if there is none.
            largest: Numbers of which the largest is wanted; NaN if one is NaN. A flag is 0 or 1.
            smallest: Numbers of which the smallest is wanted.
            of_rank_0: Numbers of which that of rank 0 is wanted, such as those of its clock.

        Raises:
            RankMismatchError: If the ranks reduce other names.

        Example:
            >>> Channel().reduce("losses", sums={"samples": 4}, means={"mse": (0.5, 4)})
            {'samples': 4.0, 'mse': 0.5}
        """
        plain = {"sums": sums or {}, "largest": largest or {}, "smallest": smallest or {}, "of rank 0": of_rank_0 or {}}
        means = means or {}
        parts = [f"{kind} {', '.join(sorted(each))}" for kind, each in {**plain, "means": means}.items() if each]
        text = f"{what}: {'; '.join(parts)}"
        numbers = [float(each[name]) for each in plain.values() for name in sorted(each)]
        numbers += [float(number) for name in sorted(means) for number in means[name]]
        contents = self.exchange(text, np.asarray(numbers, dtype=np.float64).tobytes())
        table = np.stack([np.frombuffer(content, dtype=np.float64) for content in contents])
        results: dict[str, float] = {}
        reductions: tuple[Reduction, ...] = (_sum_in_order, np.max, np.min, _first)
        start = 0
        for each, reduction in zip(plain.values(), reductions, strict=True):
            for name in sorted(each):
                results[name] = float(reduction(table[:, start]))
                start += 1
        for name in sorted(means):
            results[name] = _weighted_mean(table[:, start], table[:, start + 1])
            start += 2
        return results

    def gather(self, what: str, value: Any) -> list[Any]:
        """Return a value of each rank, in the order of ranks.

        Args:
            what: Name of the exchange, for errors.
            value: A tree of JSON scalars, tuples, mappings and tensors; tensors arrive on the CPU.

        Raises:
            RankMismatchError: If the ranks gather other things.
            TypeError: If the tree has another part.
        """
        if self._group is None:
            return [value]
        tensors: dict[str, torch.Tensor] = {}
        tree = encode_tree(value, tensors)
        contents = self.exchange(what, b"".join(tensor_pieces(tensors, tree=tree)))
        return [_decode(content) for content in contents]

    def exchange(self, what: str, content: bytes) -> list[bytes]:
        """Return the content of each rank, in the order of ranks.

        Raises:
            RankMismatchError: If the ranks exchange other things.
        """
        if self._group is None:
            return [content]
        expected = hashlib.sha256(what.encode()).digest()[:_HASH_BYTES]
        header = expected + len(content).to_bytes(_HASH_BYTES, "little")
        frames = self._gather_bytes((header + content)[:_FRAME_BYTES], _FRAME_BYTES)
        if any(frame[:_HASH_BYTES] != expected for frame in frames):
            raise self._mismatch(what)
        sizes = [int.from_bytes(frame[_HASH_BYTES:_HEADER_BYTES], "little") for frame in frames]
        room = _FRAME_BYTES - _HEADER_BYTES
        contents = [frame[_HEADER_BYTES:] for frame in frames]
        if max(sizes) > room:
            rests = self._gather_bytes(content[room:], max(sizes) - room)
            contents = [first + rest for first, rest in zip(contents, rests, strict=True)]
        return [each[:size] for each, size in zip(contents, sizes, strict=True)]

    def _gather_bytes(self, content: bytes, size: int) -> list[bytes]:
        """Return `size` bytes of each rank; shorter contents are padded."""
        own = torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)
        received = [torch.empty(size, dtype=torch.uint8) for _ in range(self._world_size)]
        dist.all_gather(received, own, group=self._group)
        return [each.numpy().tobytes() for each in received]

    def _mismatch(self, what: str) -> RankMismatchError:
        """Return the error of ranks that exchange different things, with what each of them does."""
        texts = self._gather_bytes(what.encode()[:_TEXT_BYTES], _TEXT_BYTES)
        names = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        listed = "\n".join(f"  rank {rank}: {name}" for rank, name in enumerate(names))
        return RankMismatchError(f"ranks exchange different things, so they no longer make the same steps:\n{listed}")


def _decode(content: bytes) -> Any:
    tensors, facts = read_tensors(content)
    return decode_tree(facts["tree"], tensors)


def _sum_in_order(column: Column) -> float:
    return float(sum(column.tolist()))


def _first(column: Column) -> Any:
    return column[0]


def _weighted_mean(values: Column, weights: Column) -> float:
    """Return the mean of the values that have a weight; a value without one may be anything."""
    present = weights > 0
    total = _sum_in_order(weights[present])
    return _sum_in_order(values[present] * weights[present]) / total if total else float("nan")
