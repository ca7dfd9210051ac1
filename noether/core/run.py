"""The constants of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Self

from noether.core.errors import Problem, check_whole, raise_problems
from noether.core.iteration import TrainingIteration
from noether.core.run_lengths import RunLengths
from noether.core.tensors.batch import batch_size, count_samples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

_NOT_GIVEN: Final[Any] = object()
_LONG_FIELDS: Final = ("data", "forward", "frozen", "gather")  # `repr` leaves them out


def _gather_one(what: str, value: Any) -> Sequence[Any]:  # noqa: ARG001  # the name is for errors of several ranks
    return (value,)


def _refuse_gather(what: str, value: Any) -> Sequence[Any]:  # noqa: ARG001  # the signature of `Run.gather`
    raise RuntimeError(
        f"{what}: this run has several ranks, and cannot gather from them: pass Run(gather=...), a function (name, "
        "value) -> values of all ranks, such as noether.distributed.ranks.join().control.gather"
    )


def _optional() -> Any:
    # A default would be a class attribute; with a factory, reading a field that was not given calls `__getattr__`.
    return field(default_factory=lambda: _NOT_GIVEN)


_LEAST: Final = {"updates_per_epoch": 1, "samples_per_epoch": 1, "effective_batch_size": 1, "rank": 0, "world_size": 1}
_NEVER_NONE: Final = ("rank", "world_size", "gather", "batch_size")
_TYPES: Final[dict[str, tuple[Any, str]]] = {
    "end": (TrainingIteration, "a point of the run; write e.g. TrainingIteration(epoch=10)"),
    "run_id": (str, "text"),
    "config": (Mapping, "a mapping"),
    "data": (Mapping, "a mapping from key to dataset; write e.g. {'val': loader}"),
    "forward": (Callable, "a function (state, batch) -> (losses, outputs)"),
    "gather": (Callable, "a function (name, value) -> values of all ranks"),
    "frozen": (AbstractSet, "a set of names of params; write e.g. frozenset({'head.weight'})"),
    "batch_size": (Callable, "a function batch -> number of samples"),
}


def _find_problems(given: Mapping[str, Any]) -> Iterator[Problem | None]:
    """Yield the problem of each field of a run that is neither None nor what `Run` documents."""
    given = {name: value for name, value in given.items() if value is not None or name in _NEVER_NONE}
    for name in _LEAST.keys() & given.keys():
        yield check_whole(f"Run.{name}", given[name], at_least=_LEAST[name])
    for name, (kind, expected) in _TYPES.items():
        if name in given and not isinstance(given[name], kind):
            yield Problem(f"Run.{name}", f"{given[name]!r:.80} is not {expected}")
    if type(given["rank"]) is type(given["world_size"]) is int and given["rank"] >= given["world_size"]:
        yield Problem("Run.rank", f"{given['rank']} is not less than world_size, which is {given['world_size']}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Run(RunLengths):
    """The constants of a run; every event carries them as `event.run`.

    Every field may be left out. Reading one that was not given raises an error that names it.

    Args:
        end: The end of the run, a point on one counter such as `TrainingIteration(epoch=10)`.
        updates_per_epoch: Optimizer updates in one epoch, >= 1.
        samples_per_epoch: Training samples in one epoch, >= 1, including those that the dataset's `collate` leaves
            out, although `iteration.sample` counts only samples that were trained on.
        effective_batch_size: Samples of every update, >= 1; the last one of an epoch may have fewer.
        run_id: Name of this run, unique among the runs of one output directory.
        rank: Index of this process, `0 <= rank < world_size`.
        world_size: Number of processes.
        config: The resolved configuration as plain values.
        data: Datasets for data-iterating callbacks by key; each is an iterable of batches. On several ranks, one that
            has a method `with_sizes(rank, world_size)` yields from it the share of a rank, `(batch, samples)`; of any
            other, every rank iterates all batches.
        forward: `(state, batch) -> (losses, outputs)`, in evaluation mode and without gradients.
        frozen: Names of the params that the optimizer does not update.
        gather: `(name of the exchange, value) -> the values of all ranks`, in their order; every rank calls it at the
            same point. By default there is one rank; with several, a run without it raises an error where it is called.
        batch_size: `batch -> number of samples`; by default the first dimension of all tensors, see
            `noether.core.tensors.batch.batch_size`. The trainer's own data knows the sizes of its batches.

    Raises:
        SettingsError: If a field is not what is documented here, with its value.

    Example:
        >>> run = Run(end=TrainingIteration(epoch=2), updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4)
        >>> str(run.final)
        'E2_U6_S20'
        >>> run.run_id
        Traceback (most recent call last):
        AttributeError: this run was not given 'run_id': build it as Run(run_id=..., ...)
    """

    end: TrainingIteration = _optional()
    updates_per_epoch: int = _optional()
    samples_per_epoch: int = _optional()
    effective_batch_size: int = _optional()
    run_id: str = _optional()
    rank: int = 0
    world_size: int = 1
    config: Mapping[str, Any] = _optional()
    data: Mapping[str, Any] = _optional()
    forward: Callable[..., tuple[Mapping[str, torch.Tensor], Any]] = _optional()
    frozen: frozenset[str] = _optional()
    gather: Callable[[str, Any], Sequence[Any]] = _gather_one
    batch_size: Callable[[Any], int] = batch_size

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if value is _NOT_GIVEN:
                object.__delattr__(self, name)
        raise_problems(_find_problems(vars(self)))
        if self.gather in (_gather_one, _refuse_gather):
            object.__setattr__(self, "gather", _gather_one if self.world_size == 1 else _refuse_gather)

    if not TYPE_CHECKING:  # a type checker would otherwise accept any name

        def __getattr__(self, name: str) -> Any:
            own = getattr(type(self), name, None)
            if isinstance(own, property):  # it read a field that was not given: call it again for that field's error
                return own.fget(self)
            if name in {f.name for f in fields(self)}:
                raise AttributeError(f"this run was not given {name!r}: build it as Run({name}=..., ...)")
            raise AttributeError(f"Run has no field {name!r}")

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name not in _LONG_FIELDS)
        return f"Run({given})"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # noqa: FBT001  # IPython's and hypothesis' hook
        printer.text(repr(self))

    def replace(self, **changes: Any) -> Self:
        """Return the run with some fields changed."""
        return type(self)(**{**vars(self), **changes})

    def count_samples(self, batch: Any) -> int:
        """Return the number of samples of a batch, as `batch_size` says.

        Raises:
            ValueError: If that is not a whole number >= 0.
        """
        return count_samples(batch, self.batch_size)

    def sized_batches(self, data: Iterable[Any]) -> Iterable[tuple[Any, int]]:
        """Yield all batches of a dataset and their numbers of samples; noether's own data knows them.

        Example:
            >>> import torch
            >>> list(Run().sized_batches([torch.ones(2)]))
            [(tensor([1., 1.]), 2)]
        """
        if hasattr(data, "with_sizes"):
            yield from data.with_sizes()
            return
        for batch in data:
            yield batch, count_samples(batch, self.batch_size)
