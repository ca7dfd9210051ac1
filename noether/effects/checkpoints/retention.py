"""What a save does, in which order, as data: write, commit, point, prune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from noether.effects.checkpoints.manifest import Manifest


@frozen
class Write:
    """Write the files of a checkpoint beside the others, under a name that makes it none yet."""

    tag: str


@frozen
class Commit:
    """Give what was written its name: from then on it is a checkpoint."""

    tag: str


@frozen
class Point:
    """Let a pointer name a checkpoint."""

    pointer: str
    tag: str


@frozen
class Prune:
    """Remove checkpoints."""

    tags: tuple[str, ...]


Step = Write | Commit | Point | Prune

ORDER: Final = (Write, Commit, Point, Prune)
"""The kinds of steps in their order; a step that fails cancels those of every later kind."""


class Pruning(NamedTuple):
    """Tags of the checkpoints that stay and of those that go, oldest first."""

    keep: tuple[str, ...]
    delete: tuple[str, ...]


def planned(
    saved: Manifest,
    new: bool,  # noqa: FBT001  # as the others, by position
    pointers: Iterable[str],
    held: Iterable[Manifest],
    pointed: Mapping[str, str],
    whole: Container[object],
    parent: str | None,
) -> tuple[Step, ...]:
    """Return the steps of a save.

    Args:
        saved: The checkpoint that is asked for, as far as its order and its retention are concerned.
        new: Whether it is still to be written.
        pointers: Names that are to point to it.
        held: The checkpoints that there are.
        pointed: Tag by name of pointer, as it is to be.
        whole: Tags of checkpoints that are known to be whole.
        parent: The checkpoint that was resumed from.
    """
    written = (Write(saved.tag), Commit(saved.tag)) if new else ()
    points = tuple(Point(pointer, saved.tag) for pointer in pointers)
    delete = pruning([*held, *([saved] if new else [])], pointed, whole, parent).delete
    return (*written, *points, *([Prune(delete)] if delete else []))


def pruning(
    manifests: Iterable[Manifest], pointers: Mapping[str, str], whole: Container[object], parent: str | None
) -> Pruning:
    """Return which checkpoints stay and which nobody keeps.

    Stay do those that whoever asked for them still keeps, what a pointer names, the one from which the run went on, and
    of those from which it can go on the newest that is known to be whole, with all that are newer.

    Args:
        manifests: All checkpoints of the run.
        pointers: Tag by name of pointer.
        whole: Tags of checkpoints that are known to be whole, because they were written or read.
        parent: The checkpoint that was resumed from.

    Example:
        >>> from noether import TrainingIteration
        >>> from noether.effects.checkpoints.manifest import Manifest
        >>> def taken(update):
        ...     return Manifest(tag=f"U{update}", run_id="r", segment=1, parent=None, event="AfterUpdate", parts={},
        ...                     iteration=TrainingIteration(update=update), retention={"CheckpointCallback": 1})
        >>> pruning([taken(1), taken(2), taken(3)], {"best": "U1"}, {"U3"}, parent=None)
        Pruning(keep=('U1', 'U3'), delete=('U2',))
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.order)
    resumable = [each.tag for each in ordered if each.resumable]
    sure = max((index for index, tag in enumerate(resumable) if tag in whole), default=0)
    kept = {*pointers.values(), parent, *resumable[sure:]}
    newest: dict[str, int] = {}
    for manifest in reversed(ordered):
        for owner, keep in manifest.retention.items():
            newest[owner] = newest.get(owner, 0) + 1
            if keep is None or newest[owner] <= keep:
                kept.add(manifest.tag)
    tags = [manifest.tag for manifest in ordered]
    return Pruning(tuple(tag for tag in tags if tag in kept), tuple(tag for tag in tags if tag not in kept))
