"""Results of a dataset whose batches several ranks process: after one exchange, every rank adds up all, in order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from noether.core.callbacks.dataset_results import BatchResult, DatasetResults, read_results, source_of
from noether.core.shards import ShardedDataError
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.tree import FrozenDict, move_to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from noether.core.callbacks.metric_states import Accumulator
    from noether.core.run import Run

    Batch = tuple[int, Mapping[str, BatchResult]]
    """Samples of a batch, and what it contributes by name."""


def results_over_ranks(
    run: Run,
    key: str,
    data: Iterable[Any],
    process: Callable[[Any], Any],
    callback: str,
    device: torch.device,
    accumulators: Mapping[str, Accumulator],
) -> DatasetResults:
    """Return the results of a dataset, bit for bit those of one process.

    Each rank processes its share of the batches if the data splits them, by a method `with_sizes(rank, world_size)`.
    Otherwise each rank processes all batches, the results of rank 0 count, and other batches on a rank are an error.

    Args:
        run: Its `gather` exchanges what the batches contribute; all ranks call it once.
        key: Key of the dataset, for messages.
        data: Batches.
        process: Returns the results of a batch, as `process_data`.
        callback: Name of the callback, for messages.
        device: Device for results that another rank has computed on a device of the same type, and for all that
            accumulators merge.
        accumulators: To which `process` adds its batches, by name; they merge those of all ranks.

    Raises:
        ShardedDataError: On all ranks, if they iterate different batches of data that does not split them.
        TypeError: As for `read_results`, which reads only the results of this rank.
        ValueError: As `TypeError`; and on all ranks, if batches cannot be combined.
    """
    is_split = hasattr(data, "with_sizes")
    own = data.with_sizes(run.rank, run.world_size) if is_split else run.sized_batches(data)  # type: ignore[attr-defined]  # it has
    first, count, batches = "", 0, list[Any]()
    for batch, size in own:
        if not is_split and not count:
            first = digest_batch(batch)
        count += 1
        if size:
            batches.append((size, read_results(source_of(callback), process(batch), size)))
    iterated = "" if is_split else f"{count} batches with {sum(size for size, _ in batches)} samples, the first {first}"
    parts = {name: each.parts() for name, each in accumulators.items()}
    content = {"iterated": iterated, "batches": pack_batches(batches), "accumulated": parts}
    contents = run.gather(f"{callback}: results of {key}", content)
    if not is_split:
        _check_same_batches(key, [content["iterated"] for content in contents])
    contents = contents if is_split else contents[:1]
    for name, each in accumulators.items():
        each.merge(move_to_device(device, [part for content in contents for part in content["accumulated"][name]]))
    results = DatasetResults(callback)
    for content in contents:
        for samples, result in unpack_batches(content["batches"], device):
            results.add_batch(result, samples)
    return results


def _check_same_batches(key: str, iterated: Sequence[str]) -> None:
    for rank, each in enumerate(iterated):
        if each != iterated[0]:
            raise ShardedDataError(
                f"the ranks iterate different batches of data[{key!r}]: rank 0 {iterated[0]}, rank {rank} {each}; "
                "noether does not split this data, so give every rank the whole data set in one order"
            )


def digest_batch(batch: Any) -> str:
    """Return a text that depends on all values in the tensors of a batch."""
    content = hashlib.sha256()

    def add(tensor: torch.Tensor) -> torch.Tensor:
        content.update(f"{tensor.dtype} {tensor.layout}".encode())
        if tensor.layout is torch.strided and not tensor.is_nested:
            values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            content.update(str(tuple(tensor.shape)).encode())
            content.update(values.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    map_tensors(add, batch)
    return content.hexdigest()[:12]


def pack_batches(batches: Sequence[Batch]) -> Mapping[str, Any]:
    """Return batches as a tree of few tensors, one for each dtype and type of device, however many batches there are.

    Example:
        >>> batches = [(2, {"error": BatchResult("a Mean", torch.tensor(0.5), 2, 2)}), (1, {})]
        >>> list(unpack_batches(pack_batches(batches), torch.device("cpu"))) == batches
        True
    """
    layouts: dict[Any, int] = {}
    values: dict[str, list[torch.Tensor]] = {}
    numbers = list[Any]()
    rows, layout_of = list[int](), list[int]()
    for _, results in batches:
        layout = tuple((name, each.kind, *_describe(each.tensor)) for name, each in results.items())
        layout_of.append(layouts.setdefault(layout, len(layouts)))
        for result in results.values():
            tensor = result.tensor.detach()
            rows.append(len(tensor) if tensor.ndim else 1)
            numbers.append((result.factor, result.weight))
            values.setdefault(_column(tensor), []).append(tensor.flatten())
    return FrozenDict(
        samples=torch.tensor([samples for samples, _ in batches], dtype=torch.int64),
        layouts=tuple(layouts),
        layout_of=torch.tensor(layout_of, dtype=torch.int64),
        rows=torch.tensor(rows, dtype=torch.int64),
        numbers=torch.tensor(numbers, dtype=torch.float64).reshape(-1, 2),
        values=FrozenDict({column: torch.cat(tensors) for column, tensors in values.items()}),
    )


def unpack_batches(packed: Mapping[str, Any], device: torch.device) -> Iterator[Batch]:
    """Yield the batches of `pack_batches`.

    Args:
        packed: What it returned.
        device: Device of tensors that were on a device of its type; others get a device of the type that they had.
    """
    values: dict[str, _Reader] = {}
    for column, tensor in packed["values"].items():
        device_type = column.partition(" ")[0]
        values[column] = _Reader(tensor.to(device if device.type == device_type else torch.device(device_type)))
    rows, numbers = iter(packed["rows"].tolist()), iter(packed["numbers"].tolist())
    for samples, number in zip(packed["samples"].tolist(), packed["layout_of"].tolist(), strict=True):
        results: dict[str, BatchResult] = {}
        for name, kind, column, shape in packed["layouts"][number]:
            length, (factor, weight) = next(rows), next(numbers)
            tensor = values[column].read((length, *shape[1:]) if shape else ())
            results[name] = BatchResult(kind, tensor, factor, weight)
        yield samples, results


class _Reader:
    """Reads tensors one after the other out of one that has all their values."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._at = values, 0

    def read(self, shape: Sequence[int]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        self._at += size
        return self._values[self._at - size : self._at].reshape(shape)


def _describe(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Return the column and the shape of a tensor; the number of its rows differs between batches."""
    return _column(tensor), (0, *tensor.shape[1:]) if tensor.ndim else ()


def _column(tensor: torch.Tensor) -> str:
    return f"{tensor.device.type} {tensor.dtype}"
