"""Data that callbacks iterate beside a loop that is not ours, which must not notice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.tensors.tree import map_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of `model`, the CPU if it has none.

    Example:
        >>> device_of(torch.nn.Linear(2, 1))
        device(type='cpu')
    """
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def beside_training(data: Iterable[Any], model: nn.Module) -> Iterable[Any]:
    """Return `data` for callbacks that iterate it beside training; a list of batches stays one, on the model's device.

    Example:
        >>> beside_training([torch.ones(2)], torch.nn.Linear(2, 1))
        [tensor([1., 1.])]
    """
    if isinstance(data, (list, tuple)):
        device = device_of(model)
        return [_on(device, batch) for batch in data]
    return BesideTraining(data, model)


def _on(device: torch.device, batch: Any) -> Any:
    return batch if device.type == "cpu" else map_tensors(lambda tensor: tensor.to(device), batch)


@final
class BesideTraining:
    """Batches on the device of a model; reading them leaves torch's generator on the CPU as it was.

    A loader draws from that generator, be it shuffled or not. In noether's own trainer that does not matter, for there
    every update is seeded anew; here the loop around would shuffle and drop out otherwise than without callbacks.

    Args:
        data: Anything that yields batches.
        model: The model.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> data = BesideTraining(DataLoader(torch.arange(3.0), batch_size=2), torch.nn.Linear(2, 1))
        >>> before = torch.get_rng_state()
        >>> list(data), torch.equal(torch.get_rng_state(), before)
        ([tensor([0., 1.]), tensor([2.])], True)
    """

    def __init__(self, data: Iterable[Any], model: nn.Module) -> None:
        self._data, self._model = data, model

    @property
    def dataset(self) -> Any:
        """What the length in samples is that of."""
        return getattr(self._data, "dataset", self._data)

    def __iter__(self) -> Iterator[Any]:
        generator = torch.get_rng_state()
        device = device_of(self._model)
        try:
            for batch in self._data:
                yield _on(device, batch)
        finally:
            torch.set_rng_state(generator)
