"""Names that a user may give to a checkpoint: its tag, a part of that, a pointer, `newest` or `best`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from noether.core.errors import suggest
from noether.core.file_names import describe_name, find_name
from noether.effects.checkpoints.file_names import WEIGHTS
from noether.effects.checkpoints.listing import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection

    from noether.effects.checkpoints.listing import Listing
    from noether.effects.checkpoints.manifest import Manifest

NEWEST: Final = "newest"
BEST: Final = "best"
_BEST_POINTERS: Final = "best_model."
_TOLERANCE: Final = ".tolerance="
_PART: Final = re.compile(r"(?P<counts>[EUS]\d+(?:_[EUS]\d+)*)(?P<suffix>\..+)?", re.ASCII)


def find_tag(name: str, listing: Listing, directory: Path) -> str:
    """Return the tag of the checkpoint that a name means.

    A name is a tag; a pointer, such as `latest` or `best_model.val.accuracy`, or with the metric key as it was logged,
    such as `best_model.val/recall@10` for `best_model.val.recall%4010`;
    a part of a tag's iteration that only one saved iteration has, such as `E30`, `U300` or `E30.ema=0.999`; `newest`,
    the newest checkpoint with all training weights; or `best`, if only one checkpoint is the best of a metric. It may
    be a path to the checkpoint or the pointer in `directory`.

    Args:
        name: The name.
        listing: The checkpoints and pointers.
        directory: Their directory, for messages.

    Raises:
        CheckpointError: If the name means none of them, or several; the message lists them.
    """
    manifests = listing.manifests
    # No path has a null character; `resolve` raises for it.
    if "\0" not in name and Path(name).resolve().parent == directory.resolve():
        name = Path(name).name
    name = find_name(name, [entry.name for entry in listing.pointers])
    if name in listing.broken:
        raise listing.broken[name]
    if (tag := listing.targets.get(name)) is not None:
        return tag
    if name in listing.damaged or any(manifest.tag == name for manifest in manifests):
        return name
    if name == BEST:
        return _find_best(listing, directory)
    found = _select_newest(manifests) if name == NEWEST else _select_by_counts(name, manifests)
    if len(found) == 1:
        return found[0].tag
    if found:
        tags = ", ".join(manifest.tag for manifest in found)
        raise CheckpointError(
            f"{name!r} may be any of {len(found)} checkpoints in {directory}: {tags}; give one of them"
        )
    known = [*listing.targets, *(manifest.tag for manifest in manifests)]
    names = ", ".join(map(describe_name, known)) or "none"
    raise CheckpointError(f"no checkpoint {name!r} in {directory}; there are: {names}{suggest(name, known)}")


def _find_best(listing: Listing, directory: Path) -> str:
    pointers = {
        pointer: tag
        for pointer, tag in listing.targets.items()
        if pointer.startswith(_BEST_POINTERS) and _TOLERANCE not in pointer
    }
    if not pointers:
        raise CheckpointError(
            f"no checkpoint in {directory} is the best of a metric: a BestCheckpointCallback saves it; there are: "
            f"{', '.join([*listing.targets, *(manifest.tag for manifest in listing.manifests)]) or 'none'}"
        )
    if len(set(pointers.values())) > 1:
        names = ", ".join(f"{pointer} ({tag})" for pointer, tag in pointers.items())
        raise CheckpointError(f"{BEST!r} may be any of {len(pointers)} checkpoints in {directory}: {names}; give one")
    return next(iter(pointers.values()))


def _select_newest(manifests: Collection[Manifest]) -> list[Manifest]:
    """Return the newest checkpoint with all training weights, as a list; it is empty if there is none."""
    return sorted(filter(_has_training_weights, manifests), key=_rank)[-1:]


def _select_by_counts(name: str, manifests: Collection[Manifest]) -> list[Manifest]:
    """Return the checkpoints of a part of a tag, one for each iteration: the one that holds most."""
    match = _PART.fullmatch(name)
    if match is None:
        return []
    counts, suffix = set(match["counts"].split("_")), match["suffix"] or ""
    fitting = [manifest for manifest in manifests if counts <= set(str(manifest.iteration).split("_"))]
    if suffix:
        fitting = [manifest for manifest in fitting if manifest.tag == f"{manifest.iteration}{suffix}"]
    else:
        fitting = [each for each in fitting if _has_training_weights(each)] or fitting
    return list({manifest.iteration: manifest for manifest in sorted(fitting, key=_rank)}.values())


def _rank(manifest: Manifest) -> tuple[object, ...]:
    segment, update, epoch, number = manifest.order
    return segment, update, epoch, manifest.resumable, number


def _has_training_weights(manifest: Manifest) -> bool:
    return WEIGHTS in manifest.files and not manifest.models and manifest.weights_of is None
