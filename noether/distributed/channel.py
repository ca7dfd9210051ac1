"""Exchanges small values between the ranks of a run, over one process group on the CPU."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
import torch.distributed as dist

from noether.core.errors import NoetherError
from noether.distributed.failures import Failures
from noether.distributed.reductions import Numbers
from noether.effects.disk.encoding import decode_tree, encode_tree
from noether.effects.disk.tensor_files import read_tensors, tensor_pieces

if TYPE_CHECKING:
    from collections.abc import Mapping

FRAME_BYTES: Final = 1024
"""Bytes of each rank in the first collective of an exchange; longer contents take a second one."""
_RECEIVED_BYTES: Final = 1 << 20
"""Most bytes that a rank receives of all ranks in one collective, once frames have grown."""
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

    The first collective of an exchange carries a frame of each rank, and a second one what did not fit. Frames then
    grow to the longest content so far, up to 1 MiB of all ranks together, so exchanges of equal size take one from then
    on. All ranks see all sizes, so their frames grow alike.

    Args:
        group: A gloo group of all ranks; None for one process, which exchanges nothing.
        failures: Where ranks report failures, and find out why an exchange failed.

    Attributes:
        collectives: Number of collectives so far.
        sent_bytes: Bytes that this rank gave to them.

    Example:
        >>> Channel().gather("greeting", {"text": "hello"})
        [{'text': 'hello'}]
    """

    def __init__(self, group: dist.ProcessGroup | None = None, failures: Failures | None = None) -> None:
        self._group = group
        self._failures = failures or Failures()
        self._thread: threading.Thread | None = None
        self._frame_bytes = FRAME_BYTES
        self.collectives = 0
        self.sent_bytes = 0
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
        """Return numbers reduced over all ranks, in float64, by name; in one collective if it has up to 126 numbers.

        Args:
            what: Name of the exchange, for errors.
            sums: Numbers to add up.
            means: Value and weight by name; the mean of the values of weight above 0, NaN if there is none.
            largest: Numbers of which the largest is wanted; NaN if one is NaN. A flag is 0 or 1.
            smallest: Numbers of which the smallest is wanted; NaN if one is NaN.
            of_rank_0: Numbers of which that of rank 0 is wanted, such as those of its clock.

        Raises:
            RankMismatchError: If the ranks reduce other names.
            RankError: If another rank failed, ended or hangs.
            ValueError: If two numbers have one name, or a weight is below 0 or NaN.

        Example:
            >>> Channel().reduce("losses", sums={"samples": 4}, means={"mse": (0.5, 4)})
            {'samples': 4.0, 'mse': 0.5}
        """
        numbers = Numbers(
            sums=sums or {},
            means=means or {},
            largest=largest or {},
            smallest=smallest or {},
            of_rank_0=of_rank_0 or {},
        )
        contents = self.exchange(what, numbers.pack().tobytes(), kind=numbers.describe())
        return numbers.reduce(np.stack([np.frombuffer(content, dtype=np.float64) for content in contents]))

    def gather(self, what: str, value: Any) -> list[Any]:
        """Return a value of each rank, in the order of ranks.

        Args:
            what: Name of the exchange, for errors.
            value: A tree of JSON scalars, tuples, mappings and dense tensors; tensors arrive on the CPU.

        Raises:
            RankMismatchError: If the ranks gather other things.
            RankError: If another rank failed, ended or hangs.
            TypeError: If the tree has another part.
        """
        if self._group is None:
            return [value]
        tensors: dict[str, torch.Tensor] = {}
        try:
            tree = encode_tree(value, tensors)
        except TypeError as error:
            problem = str(error).replace("which cannot be saved", "which ranks cannot exchange")
            raise TypeError(
                f"{what}: {problem}; gather tensors, numbers, text, None, or tuples and mappings of these, such as "
                "tuple(...) in place of a list"
            ) from None
        contents = self.exchange(what, b"".join(tensor_pieces(tensors, tree=tree)), kind="gather")
        return [_decode(content) for content in contents]

    def exchange(self, what: str, content: bytes, *, kind: str = "bytes") -> list[bytes]:
        """Return the content of each rank, in the order of ranks.

        Args:
            what: Name of the exchange, for errors.
            content: The bytes of this rank.
            kind: What they are, which has to be the same on all ranks.

        Raises:
            RankMismatchError: If the ranks exchange other things.
            RankError: If another rank failed, ended or hangs.
            RuntimeError: If another thread of this process uses the channel.
        """
        if self._group is None:
            return [content]
        self._check_thread(what)
        with self._failures.explain(what):
            return self._exchange(f"{what}: {kind}", content)

    def _check_thread(self, what: str) -> None:
        """Refuse a second thread: the order of its exchanges could differ between ranks."""
        thread = threading.current_thread()
        if self._thread is None or not self._thread.is_alive():
            self._thread = thread
        if self._thread is not thread:
            raise RuntimeError(
                f"{what}: thread {thread.name} uses a channel of thread {self._thread.name}; give each thread its own"
            )

    def _exchange(self, what: str, content: bytes) -> list[bytes]:
        expected = hashlib.sha256(what.encode()).digest()[:_HASH_BYTES]
        header = expected + len(content).to_bytes(_HASH_BYTES, "little")
        size = self._frame_bytes
        frames = self._gather_bytes((header + content)[:size], size)
        if any(frame[:_HASH_BYTES] != expected for frame in frames):
            raise self._mismatch(what)
        sizes = [int.from_bytes(frame[_HASH_BYTES:_HEADER_BYTES], "little") for frame in frames]
        room = size - _HEADER_BYTES
        contents = [frame[_HEADER_BYTES:] for frame in frames]
        if max(sizes) > room:
            rests = self._gather_bytes(content[room:], max(sizes) - room)
            contents = [first + rest for first, rest in zip(contents, rests, strict=True)]
            self._grow(max(sizes) + _HEADER_BYTES)
        return [each[:size] for each, size in zip(contents, sizes, strict=True)]

    def _grow(self, size: int) -> None:
        """Enlarge the frames, so that the next content of this size fits, unless all ranks together send too much."""
        power = 1 << (size - 1).bit_length()
        if power * self._world_size <= _RECEIVED_BYTES:
            self._frame_bytes = power

    def _gather_bytes(self, content: bytes, size: int) -> list[bytes]:
        """Return `size` bytes of each rank; shorter contents are padded."""
        own = torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)
        received = [torch.empty(size, dtype=torch.uint8) for _ in range(self._world_size)]
        self.collectives += 1
        self.sent_bytes += size
        dist.all_gather(received, own, group=self._group)
        return [each.numpy().tobytes() for each in received]

    def _mismatch(self, what: str) -> RankMismatchError:
        """Return the error of ranks that exchange different things, with what each of them does."""
        texts = self._gather_bytes(what.encode()[:_TEXT_BYTES], _TEXT_BYTES)
        names = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        listed = "\n".join(f"  rank {rank}: {name}" for rank, name in enumerate(names))
        return RankMismatchError(
            "ranks exchange different things at one point; all have to make the same calls in one order, so let no "
            f"callback, dataset or loop decide by its rank, clock or own data:\n{listed}"
        )


def _decode(content: bytes) -> Any:
    tensors, facts = read_tensors(content)
    return decode_tree(facts["tree"], tensors)
