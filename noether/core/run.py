"""What is fixed for a whole run, and the arithmetic of where its epochs lie."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Self

from noether.core.iteration import COUNTERS, Counter, TrainingIteration
from noether.core.tensors.batch import batch_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

_NOT_GIVEN: Final[Any] = object()
_UNSHOWN: Final = ("data", "forward", "frozen")  # too long for a message


def _optional() -> Any:  # stands for a value of the field's type
    # A factory leaves no class attribute behind, so that reading a field that was not given reaches `__getattr__`.
    return field(default_factory=lambda: _NOT_GIVEN)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Run:
    """What is fixed for a whole run; every event carries it as `event.run`.

    Every field may be left out; reading one that was not given is an error that names it.

    Args:
        end: Where the run ends, a point on one counter such as `TrainingIteration(epoch=10)`.
        updates_per_epoch: Optimizer updates in one epoch, >= 1.
        samples_per_epoch: Training samples in one epoch, >= 1.
        effective_batch_size: Samples of every update but an epoch's last, >= 1.
        run_id: Name of this run, unique among the runs of one output directory.
        rank: Index of this process, `0 <= rank < world_size`.
        world_size: Number of processes.
        config: The resolved configuration as plain values.
        data: What a data-iterating callback iterates, by dataset key: anything that yields batches.
        forward: `(state, batch) -> (losses, outputs)` in evaluation mode, without gradients.
        frozen: Names of the params that the optimizer leaves as they are.
        batch_size: `batch -> number of samples`; by default the first dimension of the first tensor.

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
    batch_size: Callable[[Any], int] = batch_size

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if value is _NOT_GIVEN:
                object.__delattr__(self, name)

    if not TYPE_CHECKING:  # a type checker would otherwise accept any name

        def __getattr__(self, name: str) -> Any:
            own = getattr(type(self), name, None)
            if isinstance(own, property):  # it failed for a field that it reads, which is what there is to say
                return own.fget(self)
            if name in {f.name for f in fields(self)}:
                raise AttributeError(f"this run was not given {name!r}: build it as Run({name}=..., ...)")
            raise AttributeError(f"Run has no field {name!r}")

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name not in _UNSHOWN)
        return f"Run({given})"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # noqa: FBT001  # IPython's and hypothesis' hook
        printer.text(repr(self))

    def replace(self, **changes: Any) -> Self:
        """Return the run with some fields changed."""
        return type(self)(**{**vars(self), **changes})

    def iteration_after(self, update: int) -> TrainingIteration:
        """Return the iteration once `update` updates, and the epochs that they fill, are completed."""
        epoch, rest = divmod(update, self.updates_per_epoch)
        sample = epoch * self.samples_per_epoch
        if rest:
            sample += min(rest * self.effective_batch_size, self.samples_per_epoch)
        return TrainingIteration(epoch, update, sample)

    def updates_until(self, sample: int) -> int:
        """Return the number of updates after which at least `sample` samples are completed.

        Example:
            >>> Run(updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4).updates_until(11)
            4
        """
        epoch, rest = divmod(sample, self.samples_per_epoch)
        return epoch * self.updates_per_epoch + -(-rest // self.effective_batch_size)

    def updates_to(self, counter: Counter, count: int) -> int:
        """Return the number of updates after which `count` of `counter` are completed."""
        if counter == "epoch":
            return count * self.updates_per_epoch
        return count if counter == "update" else self.updates_until(count)

    @property
    def final(self) -> TrainingIteration:
        """The last iteration of a run that nothing stops early."""
        return self.iteration_after(max(self.updates_to(name, getattr(self.end, name)) for name in COUNTERS))
