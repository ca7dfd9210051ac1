"""The order in which an epoch reads the samples of a dataset: shuffled, as they are, or by a sampler of the user's."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any, Final, final

import torch

from noether.config.objects.kinds import build_nested
from noether.core.errors import NoetherError
from noether.core.object_graph import parts_of_loader
from noether.session.hidden_state import generators_of
from noether.session.randomness import derive, preserve_generators, seed_all, seed_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from noether.config.objects.kinds import Kind

_WHY_FIXED: Final = "the number of samples of an epoch is fixed, because schedules and the end of a run depend on it"


class SamplerError(NoetherError, ValueError):
    """A sampler yielded something else than the indices of one epoch."""


def epoch_order(seed: int, epoch: int, samples: int) -> list[int]:
    """Return the indices of the samples in the order in which a shuffled epoch reads them.

    Args:
        seed: The run's seed.
        epoch: The epoch, counted from 0.
        samples: Number of samples.

    Example:
        >>> epoch_order(0, 0, 4) == epoch_order(0, 0, 4), sorted(epoch_order(0, 1, 4))
        (True, [0, 1, 2, 3])
    """
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    order: list[int] = torch.randperm(samples, generator=generator).tolist()
    return order


@final
class SamplerOrder:
    """The order of a sampler, which is made for each epoch, so that it is a function of `(seed, epoch)`.

    Random numbers that the sampler draws, from the global generators or those that it holds, are seeded for the epoch.

    Args:
        sampler: A class or function. It is called with its settings, and with those of `dataset` (or `data_source`),
            `seed`, `epoch` and `generator` that it has parameters for. Where what it returns has `set_epoch`, that is
            called. It yields the indices of one epoch, or batches of them, each of one update.
        dataset: The training set.
        seed: The run's seed.
        effective_batch_size: The length of each batch but the last, if it yields batches.

    Raises:
        SamplerError: If it yields something else.

    Example:
        >>> from noether.config.objects.kinds import Kind
        >>> def backwards(dataset, epoch):
        ...     return range(len(dataset))[:: -1 if epoch else 1]
        >>> order = SamplerOrder(Kind("mine.backwards", backwards), [10, 20, 30], seed=0, effective_batch_size=1)
        >>> order.length, order(0), order(1)
        (3, [0, 1, 2], [2, 1, 0])
    """

    def __init__(self, sampler: Kind, dataset: Any, *, seed: int, effective_batch_size: int) -> None:
        self._target, self._settings = sampler.target, sampler.settings
        self._name = sampler.path
        self._dataset, self._seed, self._batch_size = dataset, seed, effective_batch_size
        self.length = len(self._draw(0))
        """The number of samples of an epoch."""
        if not self.length:
            raise SamplerError(f"{self._name} yields no index: check its settings")

    def __call__(self, epoch: int) -> list[int]:
        """Return the indices of the samples in the order in which an epoch reads them.

        Raises:
            SamplerError: If they are not as many as in the first epoch.
        """
        order = self._draw(epoch)
        if len(order) != self.length:
            raise SamplerError(
                f"{self._name} yields {len(order)} indices in epoch {epoch}, and {self.length} in epoch 0: {_WHY_FIXED}"
            )
        return order

    @property
    def digest(self) -> str:
        """A hash of the order of the first epoch, which is the same on all ranks."""
        return hashlib.sha256(repr(self(0)).encode()).hexdigest()

    def _draw(self, epoch: int) -> list[int]:
        seed = derive(self._seed, "order", epoch)
        given = {
            "dataset": self._dataset, "data_source": self._dataset, "seed": self._seed, "epoch": epoch,
            "generator": torch.Generator().manual_seed(seed),
        }  # fmt: skip
        with preserve_generators():
            seed_all(seed)
            sampler = self._target(**_accepted_arguments(self._target, given), **build_nested(self._settings))
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            for number, generator in enumerate(generators_of(sampler)):
                seed_generator(generator, derive(seed, "sampler", number))
            _check_whole(sampler, self._name)
            if not hasattr(sampler, "__iter__"):
                raise SamplerError(f"{self._name} returns {sampler!r}: return an iterable of indices, such as a list")
            drawn = sampler.tolist() if hasattr(sampler, "tolist") else list(sampler)
        return self._check(self._flatten(drawn))

    def _flatten(self, drawn: Sequence[Any]) -> Iterable[Any]:
        """Return the indices one by one; refuse batches that are not those of an update."""
        if not drawn or not hasattr(drawn[0], "__len__"):
            return drawn
        for batch in drawn[:-1]:
            if len(batch) != self._batch_size:
                raise SamplerError(
                    f"{self._name} yields a batch of {len(batch)} samples, and trainer.effective_batch_size is "
                    f"{self._batch_size}: yield batches of that size, only the last may be shorter; {_WHY_FIXED}"
                )
        return [index for batch in drawn for index in batch]

    def _check(self, order: Iterable[Any]) -> list[int]:
        samples, indices = len(self._dataset), []
        for each in order:
            try:
                index = each.__index__()
            except (AttributeError, TypeError):
                index = -1
            if not 0 <= index < samples:
                raise SamplerError(
                    f"{self._name} yields {each!r}, which is no index of the training set of {samples} samples: "
                    f"yield whole numbers from 0 to {samples - 1}"
                )
            indices.append(index)
        return indices


def _check_whole(sampler: Any, name: str) -> None:
    """Refuse a sampler that yields the share of one of several processes: the data takes shares of the whole order."""
    for part in parts_of_loader(sampler):
        count = getattr(part, "num_replicas", 1)
        if type(count) is int and count > 1:
            raise SamplerError(
                f"{name} yields one of {count} shares, as its num_replicas says: noether itself splits each update "
                "over the ranks, so give it the order of all samples, with num_replicas: 1 and rank: 0"
            )


def _accepted_arguments(target: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for which a callable has parameters."""
    known = inspect.signature(target).parameters
    return {name: value for name, value in given.items() if name in known}
