"""Reads the checkpoints of a run: lists, finds and loads them, and verifies every byte; it changes nothing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from noether.effects.checkpoints.contents import ContentError, read_state
from noether.effects.checkpoints.listing import (
    CheckpointError,
    Listing,
    MissingTargetError,
    UnreadableError,
    list_checkpoints,
    pointer_text,
    read_ended,
    read_error,
)
from noether.effects.checkpoints.names import find_tag
from noether.effects.checkpoints.shards import Placement, find_placement
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import read_begin, read_file
from noether.effects.disk.tensor_files import header_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest, Part
    from noether.effects.disk.calls import Disk

_LOGGER: Final = logging.getLogger(__name__)


class _VerifiedFiles(Mapping[str, bytes]):
    """The files of a checkpoint by name; each is read and verified when it is asked for, and not kept."""

    def __init__(self, manifest: Manifest, read: Callable[[str, str, Part], bytes]) -> None:
        self._manifest, self._read = manifest, read

    def __getitem__(self, name: str) -> bytes:
        return self._read(self._manifest.tag, name, self._manifest.parts[name])

    def __contains__(self, name: object) -> bool:
        return name in self._manifest.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.parts)

    def __len__(self) -> int:
        return len(self._manifest.parts)


class CheckpointReader:
    """The checkpoints of one run, for reading.

    Every read is verified: a file is damaged if its size or hash is not the one in the manifest, and so is a manifest
    that is not exactly what was written.

    Args:
        directory: Where the checkpoints are.
        disk: The disk.
    """

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        self._directory = directory
        self._disk = disk

    def manifests(self) -> list[Manifest]:
        """Return the manifests of all checkpoints, oldest first; damaged ones are left out."""
        return self._list().manifests

    def pointers(self) -> dict[str, str]:
        """Return the tag that each pointer names; damaged pointers are left out."""
        return self._list().targets

    def find(self, name: str) -> Manifest:
        """Return the manifest of the checkpoint that a name means: its tag, a part of that, a pointer, or `newest`.

        Args:
            name: As in `find_tag`.

        Raises:
            CheckpointError: If it is damaged or does not exist, or the name means several; the message lists them.
        """
        listing = self._list()
        tag = find_tag(name, listing, self._directory)
        if (error := listing.damaged.get(tag)) is not None:
            raise error
        return next(manifest for manifest in listing.manifests if manifest.tag == tag)

    def newest(self) -> Manifest | None:
        """Return the manifest of the newest resumable checkpoint, or None; its files are not verified."""
        return next((manifest for manifest in reversed(self.manifests()) if manifest.resumable), None)

    def load(self, manifest: Manifest, like: TrainState | None = None) -> TrainState:
        """Return the state in a checkpoint, on the CPU; fields that were not saved have their defaults.

        Args:
            manifest: The checkpoint.
            like: A state with shards on several ranks, which gives the placement of tensors: see `find_placement`. Each
                rank reads only the files that have a part of what it stores. By default all tensors are whole.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        files = _VerifiedFiles(manifest, self._read_verified)
        placement = None if like is None else Placement(find_placement(like), partial(self._read_header, manifest.tag))
        try:
            state = read_state(files, manifest.iteration, placement)
        except ContentError as error:
            unread = error.__cause__
            if isinstance(unread, CheckpointError):  # the file was not read, so its content is unknown
                raise unread from unread.__cause__
            raise CheckpointError(f"{self._directory / manifest.tag} does not hold a state: {error}") from error
        has_ended = pointer_text(manifest) == read_ended(self._directory, self._disk)
        return state.replace(ended=True) if has_ended else state

    def recover(self) -> tuple[TrainState, Manifest] | None:
        """Return the newest intact state from which the run can resume, or None if nothing was ever saved.

        Damaged checkpoints are skipped with a warning.

        Raises:
            CheckpointError: If the run can resume from none of its checkpoints, with a reason for each; or if a
                checkpoint that may be intact cannot be read, for lack of a permission or of memory.
        """
        listing = self._list()
        unreadable = [str(error) for error in listing.damaged.values() if isinstance(error, UnreadableError)]
        if unreadable:
            raise UnreadableError("\n".join(unreadable))
        damaged = list(listing.damaged.values())
        ended = read_ended(self._directory, self._disk)
        for manifest in sorted(listing.manifests, key=lambda each: (each.order, pointer_text(each) == ended))[::-1]:
            if not manifest.resumable:
                continue
            try:
                state = self.load(manifest)
            except UnreadableError:
                raise
            except CheckpointError as error:
                damaged.append(error)
            else:
                for skipped in (*damaged, *listing.broken.values()):
                    _LOGGER.warning("%s; resuming from %s without it", skipped, manifest.tag)
                return state, manifest
        self._refuse_to_start_over(listing, damaged)
        return None

    def _list(self) -> Listing:
        return list_checkpoints(self._directory, self._disk)

    def _read_verified(self, tag: str, name: str, part: Part) -> bytes:
        """Return the content of a file of a checkpoint after comparing it with its size and hash in the manifest."""
        path = self._directory / tag / name
        try:
            content = read_file(path, self._disk, limit=part.size_bytes)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (OSError, MemoryError) as error:
            raise read_error(path, error) from error
        if len(content) != part.size_bytes or hashlib.sha256(content).hexdigest() != part.sha256:
            raise CheckpointError(f"{path} is damaged: its content is not what was written")
        return content

    def _read_header(self, tag: str, name: str) -> bytes:
        """Return the header of a file of tensors, which is not verified."""
        path = self._directory / tag / name
        try:
            begin = read_begin(path, 8, self._disk)
            return read_begin(path, header_bytes(begin), self._disk)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (OSError, MemoryError) as error:
            raise read_error(path, error) from error

    def _refuse_to_start_over(self, listing: Listing, damaged: list[CheckpointError]) -> None:
        """Raise the reasons why the run can resume from none of its checkpoints; do nothing if it has none."""
        partial = [
            f"{self._directory / each.tag} does not hold weights, optimizer and state of the whole model"
            for each in listing.manifests
            if not each.resumable
        ]
        removed = [error for error in listing.broken.values() if isinstance(error, MissingTargetError)]
        reasons = [*map(str, damaged), *partial, *map(str, removed)]
        if reasons:
            total = len(damaged) + len(partial)
            any_of = "the checkpoint" if total == 1 else f"any of the {total} checkpoints"
            headline = f"the run cannot resume from {any_of} in {self._directory}:"
            raise CheckpointError("\n  ".join([headline, *reasons]))
