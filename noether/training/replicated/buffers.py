"""Buffers that forward changes on each rank, and what all ranks have after an update."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from noether.core.tensors.live.buffers import describe_values
from noether.core.tensors.module import named_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Buffers = Mapping[str, Tensor]

_LOGGER: Final = logging.getLogger(__name__)
_NORMS: Final = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_STATISTICS: Final = ("running_mean", "running_var")
_COUNTER: Final = "num_batches_tracked"


@final
class NormBuffers:
    """Buffers of batch and instance norms: statistics are averaged over ranks, counters are those of the last rank.

    Averages are of changes, so statistics that no rank changes keep their bits.

    Args:
        model: The model.
        buffers: Its buffers by name.
    """

    def __init__(self, model: nn.Module, buffers: Buffers) -> None:
        paths = [f"{path}." if path else "" for path, module in named_modules(model) if isinstance(module, _NORMS)]
        self._statistics = [name for path in paths for key in _STATISTICS if (name := path + key) in buffers]
        self._counters = [name for path in paths if (name := path + _COUNTER) in buffers]
        self.names = {*self._statistics, *self._counters}
        self.size = sum(buffers[name].numel() for name in self._statistics)
        self.counters = len(self._counters)
        self.is_double = any(buffers[name].dtype is torch.float64 for name in self._statistics)

    def changes(self, before: Buffers, after: Buffers, samples: int) -> Tensor:
        """Return the changes of the statistics times samples, `(size,)`."""
        if not self._statistics:
            return torch.zeros(0)
        old, new = ([each[name].flatten() for name in self._statistics] for each in (before, after))
        if not samples:
            return torch.zeros_like(torch.cat(old))
        return (torch.cat(new) - torch.cat(old)) * samples

    def read_counters(self, buffers: Buffers) -> Tensor:
        """Return the counters, `(counters,)` of dtype int64."""
        if not self._counters:
            return torch.zeros(0, dtype=torch.int64)
        return torch.stack([buffers[name] for name in self._counters])

    def combine(self, before: Buffers, changes: Tensor, counters: Tensor, samples: int) -> dict[str, Tensor]:
        """Return the buffers that all ranks have after an update.

        Args:
            before: The buffers before it.
            changes: Sum of the changes over all ranks, times their samples.
            counters: Counters after it.
            samples: Samples of all ranks, > 0.
        """
        olds = [before[name] for name in self._statistics]
        means = torch.split(changes / samples, [old.numel() for old in olds]) if olds else ()
        combined = {
            name: old + mean.view(old.shape).to(old.dtype)
            for name, old, mean in zip(self._statistics, olds, means, strict=True)
        }
        for name, counter in zip(self._counters, counters, strict=True):
            combined[name] = counter.to(before[name].device, copy=True)
        return combined


def find_changes(before: Buffers, after: Buffers, names: set[str]) -> dict[str, Tensor | bool]:
    """Return whether each buffer has other values after a call; a 0-dimensional tensor where the device must say it.

    Args:
        before: The buffers before the call.
        after: The buffers after it.
        names: Those to leave out.
    """
    return {name: _differs(before.get(name), buffer) for name, buffer in after.items() if name not in names}


def _differs(old: Tensor | None, new: Tensor) -> Tensor | bool:
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return True
    if old.data_ptr() == new.data_ptr() and old.numel():
        return False
    if old.layout is not torch.strided or old.is_quantized or old.is_nested:
        return describe_values(old) != describe_values(new)
    return ((old != new) & ((old == old) | (new == new))).any()  # noqa: PLR0124  # NaN stays NaN


def any_change(changes: Mapping[str, Tensor | bool]) -> Tensor | bool:
    """Return whether a buffer changed, without waiting for the device."""
    if any(each is True for each in changes.values()):
        return True
    tensors = [each for each in changes.values() if isinstance(each, Tensor)]
    return torch.stack(tensors).any() if tensors else False


@final
class OtherBuffers:
    """Buffers that no norm has and that forward changes; all ranks take the same after an update.

    Of floating point it is the mean over ranks by samples; of another dtype, or if shapes differ, that of the last rank
    that has samples. A warning names once those in which ranks differed.

    Args:
        gather: Gathers a tree over all ranks.
        warns: Whether this rank logs warnings.
    """

    def __init__(self, gather: Callable[[str, Any], Sequence[Any]], *, warns: bool) -> None:
        self._gather, self._warns = gather, warns
        self._named: set[str] = set()

    def combine(
        self, before: Buffers, after: Buffers, changes: Mapping[str, Tensor | bool], samples: int
    ) -> dict[str, Tensor]:
        """Return the buffers that a rank changed, as all ranks have them after an update.

        Args:
            before: The buffers before it.
            after: Those of this rank.
            changes: Result of `find_changes`.
            samples: Samples of this rank.
        """
        own = {name: after[name] for name, changed in changes.items() if samples and bool(changed)}
        ranks = self._gather("buffers that forward changed", {"samples": samples, "buffers": own})
        ranks = [each for each in ranks if each["samples"]]
        names = dict.fromkeys(name for each in ranks for name in each["buffers"])
        device = next((each.device for each in after.values()), torch.device("cpu"))
        combined, differing = {}, []
        for name in names:
            old = before.get(name)
            values = [each["buffers"].get(name, None if old is None else old.cpu()) for each in ranks]
            present = [(each["samples"], v) for each, v in zip(ranks, values, strict=True) if v is not None]
            combined[name] = _mean(present).to(device)
            if not all(_is_same(present[0][1], value) for _, value in present):
                differing.append(name)
        self._warn(differing)
        return combined

    def _warn(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._named]
        self._named.update(new)
        if new and self._warns:
            _LOGGER.warning(
                "forward changes the buffers %s differently on each rank: all ranks continue with their mean by "
                "samples, or with the value of the last rank where there is no mean; each update gathers them",
                ", ".join(map(repr, new)),
            )


def _mean(values: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return the mean of the values of ranks, weighted by samples, or the last where there is none."""
    last = values[-1][1]
    has_mean = last.is_floating_point() or last.is_complex()
    same_form = all(value.shape == last.shape and value.dtype == last.dtype for _, value in values)
    if not has_mean or not same_form or all(_is_same(last, value) for _, value in values):
        return last
    double = torch.complex128 if last.is_complex() else torch.float64
    total = sum((value.to(double) * samples for samples, value in values), start=torch.zeros((), dtype=double))
    return (total / sum(samples for samples, _ in values)).to(last.dtype)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
