"""Removes the checkpoints of a run that no rule of retention keeps."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final, final

from noether.effects.checkpoints.retention import select_prunable, unite_limits
from noether.effects.checkpoints.reuse import covers

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

    from noether.core.effect import SaveCheckpoint
    from noether.core.iteration import TrainingIteration
    from noether.effects.checkpoints.listing import Listing
    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.checkpoints.writer import Writer

_LOGGER: Final = logging.getLogger(__name__)


@final
class Pruner:
    """Removes checkpoints by the rules of retention, and remembers requests that an existing checkpoint met.

    Args:
        directory: The directory of checkpoints.
        writer: Writes to it.
    """

    def __init__(self, directory: Path, writer: Writer) -> None:
        self._directory = directory
        self._writer = writer
        self._later_owners: dict[str, dict[str, int | None]] = {}

    def add_owners(self, tag: str, retention: Mapping[str, int | None]) -> None:
        """Note that a later request was met by the existing checkpoint `tag`: its owners keep the checkpoint, too."""
        self._later_owners[tag] = unite_limits(retention, self._later_owners.get(tag, {}))

    def prune(
        self,
        existing: dict[str, Manifest],
        listing: Listing,
        *,
        targets: Mapping[str, Manifest],
        failed: Mapping[str, Manifest],
        intact: Container[object],
        later: Sequence[SaveCheckpoint],
        at: TrainingIteration,
    ) -> None:
        """Remove the checkpoints that no rule of retention keeps; a failure is only a warning.

        Args:
            existing: All checkpoints by tag; those that are removed are removed here, too.
            listing: The directory before the save.
            targets: The pointers that the event has set, and to what.
            failed: The pointers that could not be set, and to what: they name another checkpoint until they are set.
            intact: Tags of checkpoints known to be intact.
            later: Requests of the event that are still to be met; checkpoints that meet them stay.
            at: The iteration of the event.
        """
        named = {**listing.targets, **{pointer: each.tag for pointer, each in targets.items()}}
        named |= {f"{pointer} (failed)": each.tag for pointer, each in failed.items()}
        manifests = [
            replace(each, retention=unite_limits(each.retention, self._later_owners.get(each.tag, {})))
            for each in existing.values()
        ]
        tags = [
            tag
            for tag in select_prunable(manifests, named, intact)
            if not any(covers(existing[tag], request, at) for request in later)
        ]
        # The checkpoint that a broken pointer named is unknown, and must not be removed.
        reasons = "; ".join(str(error) for name, error in listing.broken.items() if name not in targets)
        if tags and not reasons:
            try:
                self._writer.prune(tags)
                for tag in tags:
                    del existing[tag]
            except OSError as error:
                reasons = str(error)
        if tags and reasons:
            _LOGGER.warning("checkpoints that retention would remove stay in %s: %s", self._directory, reasons)
