"""Results of the batches of a dataset, accumulated into sums, means and concatenations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, final

import torch

from noether.core.tensors.means import Mean, Sum, read_weight
from noether.core.tensors.tree import FrozenDict

_MEAN: Final = "a Mean"
_SUM: Final = "a Sum or a count"
_PER_SAMPLE: Final = "one value per sample"
_CPU: Final = torch.device("cpu")
_SHORT_FLOATS: Final = frozenset({torch.float32, torch.float16, torch.bfloat16})
_NUMBERS: Final = frozenset({int, float, type(None)})
"""Types of a sum that is a Python number, or None before the first term."""
_EXACT_BELOW: Final = 2**29
"""Double precision holds the exact product of a number in single precision and a whole number below this."""


class BatchResult(NamedTuple):
    """What one batch contributes to a result of the dataset.

    Args:
        kind: How it is combined with those of other batches, for messages.
        tensor: Values to concatenate, `(batch, ...)`; or `()`, which is added to a sum.
        factor: The sum grows by `factor * tensor`.
        weight: The total weight of a `Mean` grows by `weight`.
    """

    kind: str
    tensor: torch.Tensor
    factor: float = 1
    weight: float = 0


def source_of(callback: str) -> str:
    """Return what returned a result, for messages."""
    return f"process_data of {callback}"


@final
class DatasetResults:
    """Accumulates the results of `process_data` for each batch, in one pass over the dataset.

    Args:
        callback: Name of the callback, for messages.

    Example:
        >>> results = DatasetResults()
        >>> results.add({"error": Mean(torch.tensor(3.0)), "correct": torch.tensor(1)}, samples=2)
        >>> results.add({"error": Mean(torch.tensor(0.0)), "correct": torch.tensor(1)}, samples=1)
        >>> results.values()
        FrozenDict({'correct': tensor(2), 'error': tensor(2., dtype=torch.float64), 'samples': 3})
    """

    def __init__(self, callback: str = "a callback") -> None:
        self._source = source_of(callback)
        self._sums: dict[str, torch.Tensor | float] = {}
        self._weighted_sums: dict[str, torch.Tensor | float] = {}
        self._total_weights: dict[str, float] = {}
        self._per_sample: dict[str, list[torch.Tensor]] = {}
        self._kinds: dict[str, str] = {}
        self._samples = 0

    def add(self, results: Any, samples: int) -> None:
        """Add the results of a batch of `samples` samples; arguments and errors as for `read_results`.

        Raises:
            ValueError: If a result is combined in another way than in a batch before.
        """
        self.add_batch(read_results(self._source, results, samples), samples)

    def add_batch(self, results: Mapping[str, BatchResult], samples: int) -> None:
        """Add what a batch of `samples` samples contributes.

        Raises:
            ValueError: If a result is combined in another way than in a batch before.
        """
        self._samples += samples
        for name, (kind, tensor, factor, weight) in results.items():
            if self._kinds.get(name) != kind:
                self._check_kind(name, kind)
            if kind == _PER_SAMPLE:
                self._per_sample.setdefault(name, []).append(tensor)
            elif kind == _SUM:
                _add(self._sums, name, tensor)
            else:
                self._total_weights[name] = self._total_weights.get(name, 0) + weight
                if weight:
                    _add(self._weighted_sums, name, tensor, factor)
                else:  # the mean over nothing is NaN, and so is its product with 0
                    self._weighted_sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=tensor.device))

    def values(self) -> Mapping[str, Any]:
        """Return the results of the whole dataset by name, and their number of samples as `samples`.

        The mean of a result covers the batches that have it; it is NaN if all its weights are 0.
        """
        sums = {name: _to_tensor(total) for name, total in self._sums.items()}
        means = {name: _to_tensor(total / self._total_weights[name]) for name, total in self._weighted_sums.items()}
        parts = {name: self._concatenate(name, values) for name, values in self._per_sample.items()}
        return FrozenDict({**sums, **means, **parts, "samples": self._samples})

    def _check_kind(self, name: str, kind: str) -> None:
        """Refuse a result that is combined in another way than in the batches before: only one of them would count."""
        before = self._kinds.setdefault(name, kind)
        if kind != before:
            raise ValueError(
                f"{self._source} returned {name!r} as {kind} for one batch, and as {before} for another: return the "
                "same for every batch"
            )

    def _concatenate(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        shapes = list(dict.fromkeys(tuple(value.shape[1:]) for value in values))
        if len(shapes) > 1:
            raise ValueError(
                f"{self._source} returned {name!r} in shapes that cannot be concatenated, (batch, *{shapes[0]}) and "
                f"(batch, *{shapes[1]}): return the same shape for every batch, or a Mean"
            )
        return torch.cat(values)


def read_results(source: str, results: Any, samples: int) -> dict[str, BatchResult]:
    """Return what a batch contributes to the results of the dataset, by name.

    Args:
        source: What returned the results, for messages; see `source_of`.
        results: What `process_data` returned.
        samples: Samples of the batch.

    Raises:
        TypeError: If `results` is not a mapping, or a result is something else than a tensor, `Mean` or `Sum`.
        ValueError: If a result is named `samples`, is one floating-point number that may be a mean or a sum, or is a
            `Mean` of a shape other than `()` and `(samples,)`.

    Example:
        >>> read_results("process_data", {"correct": 3}, samples=4)
        {'correct': BatchResult(kind='a Sum or a count', tensor=tensor(3), factor=1, weight=0)}
    """
    if not isinstance(results, (dict, Mapping)):  # testing for a dict is faster
        found = "nothing" if results is None else f"a {type(results).__name__}"
        raise TypeError(
            f"{source} returned {found}: return results by name, such as {{'error': noether.Mean(error)}}, or {{}} for "
            "none"
        )
    if "samples" in results:
        raise ValueError("process_data returned a result named 'samples', which is the number of samples")
    return {
        name: _read_mean(source, name, value, samples) if isinstance(value, Mean) else _read_other(source, name, value)
        for name, value in results.items()
    }


def _read_other(source: str, name: str, value: Any) -> BatchResult:
    """Return what a sum, a count or a tensor to concatenate contributes."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return BatchResult(_PER_SAMPLE, value)
    return BatchResult(_SUM, _read_sum(f"{source} returned {name!r}", value))


def _read_mean(source: str, name: str, mean: Mean, samples: int) -> BatchResult:
    """Return what a mean contributes: a tensor and a factor whose product is a sum, and the weight of that sum."""
    weight = samples if mean.weight is None else read_weight(name, mean.weight)
    of_batch: Any = mean.of_batch
    of_batch = torch.as_tensor(of_batch) if isinstance(of_batch, (int, float)) else of_batch
    if not isinstance(of_batch, torch.Tensor) or of_batch.is_complex():
        found = "None" if of_batch is None else f"a {getattr(of_batch, 'dtype', type(of_batch).__name__)}"
        raise TypeError(
            f"{source}: {name!r} is a Mean of {found}: return one number for the batch, or one value for each sample; "
            "for a batch that does not count, noether.Mean(0.0, weight=0)"
        )
    if not of_batch.ndim:
        return BatchResult(_MEAN, of_batch if of_batch.is_floating_point() else of_batch.double(), weight, weight)
    if of_batch.shape != (samples,) or mean.weight is not None:
        given = f"for {samples} samples" if mean.weight is None else "and a weight"
        right = (
            "return one value for each sample, (batch,), or their mean, (); if only n samples count, "
            "noether.Mean(mean, weight=n)"
        )
        raise ValueError(f"{source}: {name!r} has shape {tuple(of_batch.shape)} {given}; {right}")
    return BatchResult(_MEAN, of_batch.sum(dtype=torch.float64), 1, weight)


def _read_sum(source: str, value: Any) -> torch.Tensor:
    """Return the sum over a batch: a `Sum`, or a count, which can be nothing else."""
    number = value.of_batch if isinstance(value, Sum) else value
    if isinstance(number, (int, float)):
        number = torch.as_tensor(number)
    right = "return noether.Mean(value), noether.Sum(value) or a tensor (batch, ...)"
    if not isinstance(number, torch.Tensor):
        raise TypeError(f"{source} as {'None' if number is None else f'a {type(number).__name__}'}: {right}")
    if number.ndim:
        raise ValueError(f"{source} as a Sum of shape {tuple(number.shape)}: pass one number, Sum(tensor.sum())")
    if number.is_floating_point() or number.is_complex():
        if not isinstance(value, Sum):
            raise ValueError(f"{source} as one number, which may be the mean or the sum of the batch: {right}")
        return number
    return number.long()


def _add(sums: dict[str, torch.Tensor | float], name: str, term: torch.Tensor, factor: float = 1) -> None:
    """Add `term * factor` to a sum, which is in double precision if it is floating point."""
    before = sums.get(name)
    if type(before) in _NUMBERS and _is_exact(term, factor):
        product = term.item() * factor
        sums[name] = product if before is None else before + product
    elif before is None:
        sums[name] = (term.double() if term.is_floating_point() else term) * factor
    else:
        sums[name] = torch.add(_to_tensor(before), term, alpha=factor)


def _is_exact(term: torch.Tensor, factor: float) -> bool:
    """Return whether Python numbers, which are faster, give a sum of the same bits as tensors on the CPU.

    They do if the product is exact in double precision, as torch rounds product and sum together.
    """
    if type(term) is not torch.Tensor or not term.is_cpu:
        return False
    is_exact = factor == 1 or (factor < _EXACT_BELOW and not factor % 1 and term.dtype in _SHORT_FLOATS)
    return is_exact and (term.is_floating_point() or term.dtype is torch.int64)


def _to_tensor(total: torch.Tensor | float) -> torch.Tensor:
    if isinstance(total, (int, float)):  # asking whether a number is a tensor takes longer
        return torch.full((), total, dtype=torch.int64 if type(total) is int else torch.float64, device=_CPU)
    return total
