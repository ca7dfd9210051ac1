"""Splits an epoch into updates and an update into micro-batches; collates batches and moves them to a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

from torch.utils.data import ConcatDataset, Subset, default_collate

from noether.core.errors import check_whole, raise_problems
from noether.core.shares import share_of
from noether.core.tensors.batch import collated_size, count_samples
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@final
@dataclass(frozen=True)
class Batching:
    """Sizes of epochs and updates, and of the micro-batches of each rank.

    Args:
        length: Samples in the training set, >= 1.
        effective_batch_size: Samples of an update, over all ranks, in [1, length].
        max_batch_size: Largest number of samples of a micro-batch of one rank, or None for no limit.
        drop_last: Whether to leave out the last update of an epoch if it is short.
        is_known: Whether the training set has this length; otherwise it is that of the run, which is one epoch.
        stream_workers: Processes over which a stream is split; None for other datasets.

    Raises:
        SettingsError: If a size is not a whole number >= 1.
        ValueError: If the training set is shorter than a batch.

    Example:
        >>> batching = Batching(length=10, effective_batch_size=4, max_batch_size=3)
        >>> batching.updates_per_epoch, batching.samples_per_epoch
        (3, 10)
        >>> batching.parts(1)
        [slice(4, 7, None), slice(7, 8, None)]
    """

    length: int
    effective_batch_size: int
    max_batch_size: int | None = None
    drop_last: bool = False
    is_known: bool = True
    stream_workers: int | None = None

    def __post_init__(self) -> None:
        sizes = {"effective_batch_size": self.effective_batch_size, "max_batch_size": self.max_batch_size}
        raise_problems(check_whole(name, size) for name, size in sizes.items() if size is not None)
        if self.effective_batch_size > self.length:
            raise ValueError(
                f"{self.effective_batch_size} is larger than the training set, which has {self.length} samples"
            )

    @property
    def updates_per_epoch(self) -> int:
        """Updates in one epoch."""
        whole, rest = divmod(self.length, self.effective_batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that one epoch trains on."""
        return self.updates_per_epoch * self.effective_batch_size if self.drop_last else self.length

    @property
    def lengths(self) -> Mapping[str, int]:
        """The sizes that the order of the batches, the schedules and the end of a run depend on."""
        lengths = {"effective_batch_size": self.effective_batch_size, "drop_last": int(self.drop_last)}
        if self.stream_workers is not None:
            lengths["num_workers"] = self.stream_workers
        if not self.is_known:
            return FrozenDict(lengths)
        return FrozenDict(
            training_samples=self.length,
            updates_per_epoch=self.updates_per_epoch,
            samples_per_epoch=self.samples_per_epoch,
            **lengths,
        )

    def places(self, update: int) -> range:
        """Return the places in the epoch's order of the samples of an update, over all ranks.

        Args:
            update: Number of updates completed before it.
        """
        begin = update % self.updates_per_epoch * self.effective_batch_size
        return range(begin, min(begin + self.effective_batch_size, self.samples_per_epoch))

    def parts(self, update: int, rank: int = 0, world_size: int = 1) -> list[slice]:
        """Return the slices of the epoch's order that are the micro-batches of one rank in an update.

        Args:
            update: Number of updates completed before it.
            rank: Index of the process; the micro-batches of all ranks, in their order, are the update.
            world_size: Number of processes; a rank has no micro-batch if there are fewer samples than ranks.

        Example:
            >>> [Batching(length=10, effective_batch_size=5).parts(0, rank, 2) for rank in range(2)]
            [[slice(0, 2, None)], [slice(2, 5, None)]]
        """
        places = self.places(update)
        share = share_of(rank, world_size, len(places))
        return [slice(part.start, part.stop) for part in self.cut(places[share.start : share.stop])]

    def cut(self, places: range) -> list[range]:
        """Return the places of each micro-batch; a stream cuts those that one rank reads."""
        size = self.max_batch_size or self.effective_batch_size
        return [places[at : at + size] for at in range(0, len(places), size)]


def check_length(dataset: Any, length: int, epoch: int) -> None:
    """Refuse a training set that has another length than when training began.

    Args:
        dataset: The training set.
        length: Its length when training began.
        epoch: The epoch that begins.

    Raises:
        ValueError: If its length changed.
    """
    if (now := len(dataset)) != length:
        raise ValueError(
            f"{type(dataset).__name__} has {now} samples at the start of epoch {epoch}, and had {length} when training "
            "began: return the same __len__ during the whole run, because schedules and the order of samples depend on "
            "it"
        )


@final
@dataclass(frozen=True)
class SampleCounter:
    """Counts the samples of the batches of a dataset.

    The number is that of the samples that were collated. A function of the user wins over it. A `collate` of the
    dataset's own may leave samples out: see `collated_size`.

    Args:
        dataset: The dataset.
        function: `batch -> number of samples`; None to count the samples that were collated.
        setting: Where the function is given, for messages.

    Example:
        >>> SampleCounter([1, 2, 3])("a batch", given=3), SampleCounter([1, 2, 3], len)("ab", given=3)
        (3, 2)
    """

    dataset: Any
    function: Callable[[Any], int] | None = None
    setting: str = ""

    def __call__(self, batch: Any, given: int) -> int:
        """Return the number of samples of a batch of `given` collated samples."""
        if self.function is not None:
            return count_samples(batch, self.function, self.setting)
        return collated_size(batch, given) if self._has_collate else given

    @cached_property
    def _has_collate(self) -> bool:
        return collate_of(self.dataset) is not None


def collate(dataset: Any, samples: list[Any]) -> Any:
    """Return a batch of samples, made by the dataset's own `collate` if it has one."""
    own = collate_of(dataset)
    try:
        return (own or default_collate)(samples)
    except Exception as error:
        note = f"while collating {len(samples)} samples into a batch"
        if own is None:
            note += (
                "; torch collates tensors of one shape, numbers, texts, and tuples and dicts of these: for other "
                f"samples, give {type(dataset).__name__} a method collate(samples) that returns a batch"
            )
        error.add_note(note)
        raise


def collate_of(dataset: Any) -> Callable[[list[Any]], Any] | None:
    """Return the dataset's own `collate`, or None; torch's `Subset` and `ConcatDataset` have that of their datasets.

    Example:
        >>> class Words(list):
        ...     def collate(self, samples):
        ...         return " ".join(samples)
        >>> collate_of(Subset(Words(["a", "b"]), [1, 0]))(["b", "a"])
        'b a'
    """
    parts = [dataset.dataset] if type(dataset) is Subset else dataset.datasets if type(dataset) is ConcatDataset else ()
    if parts and len(set(map(type, parts))) == 1:
        return collate_of(parts[0])
    return getattr(dataset, "collate", None)
