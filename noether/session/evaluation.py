"""Data that callbacks iterate beside training, without a trace in the random numbers of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from noether.core.shards import check_not_sharded
from noether.core.tensors.containers import move_batch
from noether.core.tensors.module import device_of
from noether.session.hidden_state import generators_of
from noether.session.loader import seed_pass
from noether.session.randomness import derive, preserve_generators

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn


def evaluation_data(data: Iterable[Any], model: nn.Module, seed: int, key: str) -> Iterable[Any]:
    """Return `data` for callbacks that iterate it beside training; a list of batches stays one, on the model's device.

    Args:
        data: Anything that yields batches.
        model: Its device is that of the batches.
        seed: The run's seed.
        key: The dataset key.

    Raises:
        ShardedDataError: If `data` is split over processes.

    Example:
        >>> import torch
        >>> evaluation_data([torch.ones(2)], torch.nn.Linear(2, 1), seed=0, key="val")
        [tensor([1., 1.])]
    """
    check_not_sharded(data, key)
    if isinstance(data, (list, tuple)):
        device = device_of(model.parameters())
        return [move_batch(batch, device) for batch in data]
    return EvaluationData(data, model, derive(seed, f"evaluation of {key}"))


@final
class EvaluationData:
    """Batches on the device of a model; every pass draws the same random numbers and restores the global generators.

    A loader draws from the global generators, shuffled or not. Without this, callbacks would change the dropout and
    the data order of the loop around them, and a resumed run would evaluate other batches than the uncut one.

    Args:
        data: Anything that yields batches.
        model: The model.
        seed: Seeds torch, numpy, `random` and the loader's own generators at the start of every pass.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> data = EvaluationData(DataLoader(torch.arange(3.0), batch_size=2), torch.nn.Linear(2, 1), seed=0)
        >>> before = torch.get_rng_state()
        >>> list(data), torch.equal(torch.get_rng_state(), before)
        ([tensor([0., 1.]), tensor([2.])], True)
    """

    def __init__(self, data: Iterable[Any], model: nn.Module, seed: int) -> None:
        self._data, self._model, self._seed = data, model, seed

    @property
    def dataset(self) -> Any:
        """The dataset of the loader, whose length is a number of samples."""
        return getattr(self._data, "dataset", self._data)

    def __iter__(self) -> Iterator[Any]:
        device = device_of(self._model.parameters())
        with preserve_generators(*generators_of(self._data)):
            seed_pass(self._data, self._seed, 0)  # without set_epoch: the training loader may share the dataset
            for batch in self._data:
                yield move_batch(batch, device)
