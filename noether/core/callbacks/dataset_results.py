"""Results of the batches of a dataset, accumulated into sums, means and concatenations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
@dataclass(frozen=True)
class Mean:
    """A result of a batch that becomes the mean over all samples of the dataset.

    Args:
        of_batch: 0-dimensional, the mean over the batch, which is weighted by its number of samples; or `(batch,)`, one
            value per sample, whose mean does not depend on the batch size.
    """

    of_batch: torch.Tensor


@final
class DatasetResults:
    """Accumulates the results of `process_data` for each batch, in one pass over the dataset.

    Example:
        >>> results = DatasetResults()
        >>> results.add({"error": Mean(torch.tensor(3.0)), "correct": torch.tensor(1)}, samples=2)
        >>> results.add({"error": Mean(torch.tensor(0.0)), "correct": torch.tensor(1)}, samples=1)
        >>> results.values()
        FrozenDict({'correct': tensor(2), 'error': tensor(2., dtype=torch.float64), 'samples': 3})
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._means: dict[str, torch.Tensor] = {}
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._samples = 0

    def add(self, results: Mapping[str, torch.Tensor | Mean], samples: int) -> None:
        """Add the results of a batch of `samples` samples.

        Raises:
            ValueError: If a result is named `samples`, or a `Mean` has a shape other than `()` and `(samples,)`.
        """
        self._samples += samples
        for name, value in results.items():
            if name == "samples":
                raise ValueError("process_data returned a result named 'samples', which is the number of samples")
            if isinstance(value, Mean):
                _add(self._means, name, *_term_and_factor(name, value.of_batch, samples))
            elif value.ndim:
                self._parts.setdefault(name, []).append(value)
            else:
                _add(self._sums, name, value)

    def values(self) -> Mapping[str, Any]:
        """Return the results of the whole dataset by name, and their number of samples as `samples`."""
        means = {name: total / self._samples for name, total in self._means.items()}
        parts = {name: torch.cat(values) for name, values in self._parts.items()}
        return FrozenDict({**self._sums, **means, **parts, "samples": self._samples})


def _term_and_factor(name: str, of_batch: torch.Tensor, samples: int) -> tuple[torch.Tensor, int]:
    """Return a tensor and a factor whose product is the sum over the samples of a batch."""
    if not of_batch.ndim:
        return of_batch if of_batch.is_floating_point() else of_batch.double(), samples
    if of_batch.shape != (samples,):
        right = "return one value for each sample, (batch,), or their mean, ()"
        raise ValueError(f"{name!r} has shape {tuple(of_batch.shape)} for {samples} samples; {right}")
    return of_batch.sum(dtype=torch.float64), 1


def _add(sums: dict[str, torch.Tensor], name: str, term: torch.Tensor, factor: int = 1) -> None:
    """Add `term * factor` to a sum, which is in double precision if it is floating point."""
    if name in sums:
        sums[name] = torch.add(sums[name], term, alpha=factor)
    else:
        sums[name] = (term.double() if term.is_floating_point() else term) * factor
