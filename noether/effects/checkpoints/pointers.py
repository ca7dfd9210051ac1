"""Pointers of a running process: which it set, and which it failed to set."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.effects.checkpoints.listing import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping
    from pathlib import Path

    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.checkpoints.writer import Writer


@final
class Pointers:
    """Moves pointers, and remembers those that could not be moved until a later save moves them.

    Attributes:
        failed: Checkpoint by name of the pointers that could not be set to it.

    Args:
        directory: The directory of checkpoints.
        writer: Writes to it.
    """

    def __init__(self, directory: Path, writer: Writer) -> None:
        self.failed: dict[str, Manifest] = {}
        self._moved: dict[str, str] = {}
        self._owners: dict[str, str] = {}
        self._directory = directory
        self._writer = writer

    def recall(self, tags: Mapping[str, str]) -> None:
        """Note what the pointers on the disk name, so that they are not set to the same checkpoint again."""
        self._moved.update(tags)

    def claim(self, saved: Manifest, names: Iterable[str]) -> None:
        """Note that pointers belong to the event of a checkpoint from now on: an earlier event sets them no more."""
        self._owners.update(dict.fromkeys(names, saved.tag))

    def move(self, saved: Manifest, targets: Mapping[str, Manifest]) -> None:
        """Set pointers to checkpoints; if some fail, the others move before the first error is raised.

        Args:
            saved: The checkpoint whose event moves them; a pointer that a later event claimed stays.
            targets: Checkpoint by name of pointer.

        Raises:
            CheckpointError: If a pointer could not be moved.
        """
        own = (None, saved.tag)
        self._set({name: target for name, target in targets.items() if self._owners.get(name) in own})

    def retry(self, existing: Container[str]) -> None:
        """Set the pointers that failed, if their checkpoints still exist.

        Args:
            existing: Tags of all checkpoints.

        Raises:
            CheckpointError: If a pointer could not be moved again.
        """
        self.failed = {name: target for name, target in self.failed.items() if target.tag in existing}
        self._set(dict(self.failed))

    def _set(self, targets: Mapping[str, Manifest]) -> None:
        errors: list[CheckpointError] = []
        for name, target in targets.items():
            if self._moved.get(name) == target.tag:
                self.failed.pop(name, None)
                continue
            self._moved.pop(name, None)
            try:
                with self._writer.report_errors(
                    f"the pointer {self._directory / name} could not be set to {target.tag}"
                ):
                    self._writer.move_pointer(name, target)
            except CheckpointError as error:
                errors.append(error)
                self.failed[name] = target
            else:
                self.failed.pop(name, None)
                self._moved[name] = target.tag
        if errors:
            raise errors[0]
