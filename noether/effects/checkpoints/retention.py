"""Retention: which checkpoints a run can resume from, which stay, and which a save removes.

The store applies these rules to the checkpoints on disk, and `noether plan` forecasts them. A checkpoint stays if
- one of its owners (the callbacks that requested it) still keeps it: it is among the owner's newest `keep`, where
  copies (`TAG` and `TAG.2` of one iteration) count once, and so do `TAG` and `TAG.latest`;
- a pointer such as `latest` names it; or
- it is the newest resumable checkpoint known to be intact, or a newer resumable one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.effects.checkpoints.file_names import STATE, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Mapping, Sequence

    from noether.effects.checkpoints.manifest import Manifest

RESUMABLE_FILES: Final = frozenset({WEIGHTS, STATE})
"""The files without which no run can resume from a checkpoint."""


def is_resumable(files: Iterable[str], models: Collection[str], weights_of: str | None) -> bool:
    """Return whether a run can resume from a checkpoint: it holds all training weights, the optimizer and the state.

    Args:
        files: Names of its files; of a request, `requested_files(effect)`.
        models: Names of the sub-modules to which its weights are limited; empty stands for the whole model.
        weights_of: Whose weights it holds, such as `ema=0.999`; None stands for the training weights.

    Example:
        >>> is_resumable([WEIGHTS, STATE], models=(), weights_of=None)
        True
        >>> is_resumable([WEIGHTS], models=(), weights_of=None)
        False
    """
    return RESUMABLE_FILES.issubset(files) and not models and weights_of is None


def is_kept(age: int, keep: int | None) -> bool:
    """Return whether an owner keeps a checkpoint.

    Args:
        age: Its position among the owner's checkpoints, 1 for the newest; copies have the same.
        keep: How many of the newest the owner keeps; None stands for all.
    """
    return keep is None or age <= keep


def unite_limits(a: Mapping[str, int | None], b: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return how many checkpoints each owner keeps after two requests for one: the larger number, where None is all.

    Example:
        >>> unite_limits({"a": 1, "b": None}, {"a": 2, "b": 3, "c": 0})
        {'a': 2, 'b': None, 'c': 0}
    """
    united = {**a, **b}
    for owner in a.keys() & b.keys():
        one, other = a[owner], b[owner]
        united[owner] = None if one is None or other is None else max(one, other)
    return united


def select_prunable(manifests: Iterable[Manifest], pointers: Mapping[str, str], intact: Container[object]) -> list[str]:
    """Return the tags of the checkpoints that no rule of retention keeps, oldest first.

    Args:
        manifests: All checkpoints of the run.
        pointers: Tag by name of pointer.
        intact: Tags of checkpoints known to be intact, because this process wrote or loaded them.

    Example:
        >>> from noether import TrainingIteration
        >>> from noether.effects.checkpoints.manifest import Manifest
        >>> def saved_at(update):
        ...     return Manifest(tag=f"U{update}", run_id="r", segment=1, parent=None, event="AfterUpdate", parts={},
        ...                     iteration=TrainingIteration(update=update), retention={"CheckpointCallback": 1})
        >>> select_prunable([saved_at(1), saved_at(2), saved_at(3)], {"best": "U1"}, intact={"U3"})
        ['U2']
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.order)
    stay = {*pointers.values(), *tags_kept_by_owners(ordered), *tags_kept_for_resume(ordered, intact)}
    return [manifest.tag for manifest in ordered if manifest.tag not in stay]


def tags_kept_by_owners(ordered: Sequence[Manifest]) -> set[str]:
    """Return the tags of the checkpoints, given oldest first, that an owner keeps."""
    tags: set[str] = set()
    ages: dict[str, dict[object, int]] = {}
    for manifest in reversed(ordered):
        for owner, keep in manifest.retention.items():
            own = ages.setdefault(owner, {})
            if is_kept(own.setdefault(manifest.moment, len(own) + 1), keep):
                tags.add(manifest.tag)
    return tags


def tags_kept_for_resume(ordered: Sequence[Manifest], intact: Container[object]) -> list[str]:
    """Return the tags of the checkpoints, given oldest first, from which the run may have to resume.

    Newer ones than the newest intact one may be damaged, and the next process tries them first. If none is known to be
    intact, all resumable ones stay.
    """
    resumable = [manifest.tag for manifest in ordered if manifest.resumable]
    newest_intact = max((index for index, tag in enumerate(resumable) if tag in intact), default=0)
    return resumable[newest_intact:]
