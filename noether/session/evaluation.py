"""Data that callbacks iterate beside training, without a trace in the random numbers of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from noether.core.callbacks.rank_results import digest_batch
from noether.core.progress import track_progress
from noether.core.shards import check_not_sharded
from noether.core.tensors.batch import batch_size, count_samples
from noether.core.tensors.containers import move_batch
from noether.core.tensors.fully_sharded import is_fully_sharded
from noether.core.tensors.module import device_of
from noether.distributed.ranks import ONE_PROCESS
from noether.session.hidden_state import generators_of
from noether.session.loader import seed_pass
from noether.session.randomness import derive, preserve_generators
from noether.session.whole_loader import WholeLoader, find_whole_loader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from noether.distributed.ranks import Ranks


def evaluation_data(  # every fact about the data
    data: Iterable[Any],
    model: nn.Module,
    seed: int,
    key: str,
    *,
    ranks: Ranks = ONE_PROCESS,
    batch_size: Callable[[Any], int] = batch_size,
) -> Iterable[Any]:
    """Return `data` for callbacks that iterate it beside training; a list of batches stays one, on the model's device.

    On several ranks a `DataLoader` is split into whole batches, of which each rank reads its share. One that another
    library has split is put together again, in the order of its dataset and without what was added to fill up batches.
    If the model has modules of `fully_shard`, all ranks read all batches: each forward pass is a collective.

    Args:
        data: Anything that yields batches.
        model: Its device is that of the batches.
        seed: The run's seed.
        key: The dataset key.
        ranks: This process among those of the run.
        batch_size: `batch -> number of samples`.

    Raises:
        ShardedDataError: If `data` is split over processes, and cannot be put together again.

    Example:
        >>> import torch
        >>> evaluation_data([torch.ones(2)], torch.nn.Linear(2, 1), seed=0, key="val")
        [tensor([1., 1.])]
    """
    whole = find_whole_loader(data) if ranks.are_several else None
    if whole is None:
        check_not_sharded(data, key)
    if isinstance(data, (list, tuple)):
        device = device_of(model.parameters())
        return _ShownBatches([move_batch(batch, device) for batch in data], key)
    seed = derive(seed, f"evaluation of {key}")
    if whole is None or any(map(is_fully_sharded, model.modules())):
        return EvaluationData(data if whole is None else whole, model, seed, key)
    return SharedEvaluationData(whole, model, seed, batch_size, key)


class _ShownBatches(list[Any]):
    """A list of batches whose passes the display of the run shows."""

    def __init__(self, batches: Iterable[Any], key: str) -> None:
        super().__init__(batches)
        self._key = key

    def __iter__(self) -> Iterator[Any]:
        return track_progress(super().__iter__(), f"evaluating {self._key}", len(self))


class EvaluationData:
    """Batches on the device of a model; every pass draws the same random numbers and restores the global generators.

    A loader draws from the global generators, shuffled or not. Without this, callbacks would change the dropout and
    the data order of the loop around them, and a resumed run would evaluate other batches than the uncut one.

    Args:
        data: Anything that yields batches.
        model: The model.
        seed: Seeds torch, numpy, `random` and the loader's own generators at the start of every pass.
        key: The dataset key, for the display of the run.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> data = EvaluationData(DataLoader(torch.arange(3.0), batch_size=2), torch.nn.Linear(2, 1), seed=0)
        >>> before = torch.get_rng_state()
        >>> list(data), torch.equal(torch.get_rng_state(), before)
        ([tensor([0., 1.]), tensor([2.])], True)
    """

    def __init__(self, data: Any, model: nn.Module, seed: int, key: str = "") -> None:
        self._data, self._model, self._seed = data, model, seed
        self._description = f"evaluating {key}".rstrip()

    @property
    def dataset(self) -> Any:
        """The dataset of the loader, whose length is a number of samples."""
        return getattr(self._data, "dataset", self._data)

    def __iter__(self) -> Iterator[Any]:
        return self._iterate(lambda: self._show(self._data))

    def _show(self, batches: Iterable[Any]) -> Iterator[Any]:
        return track_progress(batches, self._description)

    def _iterate(self, batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        """Yield batches on the device of the model, seeded as a pass.

        Args:
            batches: Returns the batches; called after the generators are seeded.
        """
        device = device_of(self._model.parameters())
        with preserve_generators(*generators_of(self._data)):
            seed_pass(self._data, self._seed, 0)  # without set_epoch: the training loader may share the dataset
            for batch in batches():
                yield move_batch(batch, device)


@final
class SharedEvaluationData(EvaluationData):
    """The batches of a `DataLoader`, of which each rank can read its share.

    The batches are those of one process. A dataset that draws random numbers itself draws others than in one process.

    Args:
        loader: The loader, whole.
        model: The model.
        seed: As for `EvaluationData`.
        batch_size: `batch -> number of samples`.
        key: The dataset key, for the display of the run.
    """

    def __init__(
        self, loader: WholeLoader, model: nn.Module, seed: int, batch_size: Callable[[Any], int], key: str = ""
    ) -> None:
        super().__init__(loader, model, seed, key)
        self._count = batch_size

    def describe(self) -> str:
        """Return a text that is the same on all ranks whose loaders read the same dataset in batches of one size."""
        sampler = self._data.batch_sampler
        try:
            ends = [digest_batch(batch) for batch in self._iterate(self._data.load_ends)]
        except Exception:  # noqa: BLE001  # of the user's, which only workers can read; an evaluation raises others
            ends = []
        size = f"{len(self.dataset)} samples in {len(sampler)} batches of {sampler.batch_size}"
        return f"{size}, the first and the last sample {' and '.join(ends)}" if ends else size

    def with_sizes(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Any, int]]:
        """Yield the batches, each with its number of samples: all, or the share of one rank of several.

        Args:
            rank: Index of the process; the batches of all ranks, in their order, are those of one process.
            world_size: Number of processes; a rank has no batch if there are fewer batches than ranks.
        """
        for batch in self._iterate(lambda: self._show(self._data.share(rank, world_size))):
            yield batch, count_samples(batch, self._count)
