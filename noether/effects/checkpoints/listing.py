"""Lists a directory of checkpoints: every entry is an intact or damaged checkpoint or pointer, or not ours."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from noether.core.errors import NoetherError
from noether.effects.checkpoints.file_names import file_of
from noether.effects.checkpoints.manifest import MAX_BYTES, NAME, Manifest, ManifestError
from noether.effects.disk.files import os_error_text, read_file
from noether.effects.run_files import ENDED, MANIFEST

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from noether.effects.disk.calls import Disk

MAX_POINTER_BYTES: Final = 400
_POINTER: Final = re.compile(rf"{NAME.pattern} [0-9a-f]{{64}}\n", re.ASCII)
_TEMPORARY_ERRORS: Final = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class CheckpointError(NoetherError):
    """A checkpoint cannot be found, read or written."""


class UnreadableError(CheckpointError):
    """This process cannot read a checkpoint that may be intact, so the run must not resume from an older one."""


class UnsavableError(CheckpointError, TypeError):
    """A state holds a value that cannot be saved; the message has the part of the state and the path in it."""


class MissingTargetError(CheckpointError):
    """A pointer names a checkpoint that does not exist."""


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint in a directory.

    Args:
        tag: Name of its directory.
        manifest: Its manifest, or None if it cannot be read.
        error: Why the manifest cannot be read, or None.
    """

    tag: str
    manifest: Manifest | None
    error: CheckpointError | None


@dataclass(frozen=True)
class PointerEntry:
    """One pointer in a directory.

    Args:
        name: Name of its file.
        tag: Tag of the checkpoint that it names, or None if it is broken.
        error: Why the pointer is broken, or None.
    """

    name: str
    tag: str | None
    error: CheckpointError | None


@dataclass(frozen=True)
class Listing:
    """The checkpoints and pointers in a directory."""

    checkpoints: tuple[CheckpointEntry, ...]
    pointers: tuple[PointerEntry, ...]

    @property
    def manifests(self) -> list[Manifest]:
        """The manifests that can be read, oldest first."""
        manifests = [entry.manifest for entry in self.checkpoints if entry.manifest is not None]
        return sorted(manifests, key=lambda manifest: manifest.order)

    @property
    def targets(self) -> dict[str, str]:
        """Tag by name of pointer; broken pointers are left out."""
        return {entry.name: entry.tag for entry in self.pointers if entry.tag is not None}

    @property
    def damaged(self) -> dict[str, CheckpointError]:
        """Why the manifest of a checkpoint cannot be read, by tag."""
        return {entry.tag: entry.error for entry in self.checkpoints if entry.error is not None}

    @property
    def broken(self) -> dict[str, CheckpointError]:
        """Why a pointer names no checkpoint, by name; what it named is unknown."""
        return {entry.name: entry.error for entry in self.pointers if entry.error is not None}


def list_checkpoints(directory: Path, disk: Disk) -> Listing:
    """Return the checkpoints and pointers in a directory; names that begin with a dot are ignored.

    Raises:
        CheckpointError: If the directory itself cannot be read.
    """
    try:
        names = disk.names(directory) if disk.kind(directory) is not None else []
        kinds = {name: disk.kind(directory / name) for name in names if not name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {os_error_text(error)}") from error
    checkpoints: list[CheckpointEntry] = []
    for name, kind in kinds.items():
        if kind in {"link", "other"}:
            link = CheckpointError(f"{_printable(directory / name)} is damaged: it is a link or a device")
            checkpoints.append(CheckpointEntry(name, None, link))
        elif kind == "directory":
            try:
                manifest = read_manifest(directory, name, disk)
            except CheckpointError as error:
                checkpoints.append(CheckpointEntry(name, None, error))
            else:
                checkpoints += [] if manifest is None else [CheckpointEntry(name, manifest, None)]
    manifests = {entry.tag: entry.manifest for entry in checkpoints}
    pointers: list[PointerEntry] = []
    for name in (name for name, kind in kinds.items() if kind == "file"):
        try:
            pointers.append(PointerEntry(name, _pointer_target(directory / name, disk, manifests), None))
        except CheckpointError as error:
            pointers.append(PointerEntry(name, None, error))
    return Listing(tuple(checkpoints), tuple(pointers))


def read_manifest(directory: Path, name: str, disk: Disk) -> Manifest | None:
    """Return the manifest of a checkpoint, or None for a directory that holds no file of a checkpoint.

    Raises:
        CheckpointError: If the manifest is missing, damaged, or that of another checkpoint.
    """
    path = directory / name / MANIFEST
    try:
        if disk.kind(path) is None:
            parts = [part for part in disk.names(path.parent) if file_of(part) is not None]
            if not parts:
                return None
            raise CheckpointError(f"{_printable(path)} is missing, beside {', '.join(parts)}")
        manifest = Manifest.loads(read_file(path, disk, limit=MAX_BYTES).decode())
    except OSError as error:
        raise read_error(path, error) from error
    except (ManifestError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{_printable(path)} is damaged: {error}") from error
    if manifest.tag != name:
        raise CheckpointError(f"{_printable(path)} is damaged: it is the manifest of {manifest.tag}")
    return manifest


def read_error(path: Path, error: OSError | MemoryError) -> CheckpointError:
    """Return the error to raise for a file of a checkpoint that the operating system cannot read."""
    if isinstance(error, MemoryError):
        return UnreadableError(f"{_printable(path)} cannot be read: it does not fit into memory")
    text = os_error_text(error)
    if error.errno in _TEMPORARY_ERRORS:
        return UnreadableError(f"{_printable(path)} cannot be read: {text}; make it readable, then resume")
    return CheckpointError(f"{_printable(path)} is damaged, or cannot be read: {text}")


def pointer_text(manifest: Manifest) -> str:
    """Return the content of a pointer: a tag, and the hash of its manifest, which reveals a replaced checkpoint."""
    return f"{manifest.tag} {manifest.sha256}\n"


def read_ended(directory: Path, disk: Disk) -> str | None:
    """Return the text of a pointer to the checkpoint at which the run ended, if `Writer.mark_ended` recorded one.

    An end that is not recorded, or cannot be read, does no harm: a resumed run dispatches `AfterTraining` again.
    """
    try:
        if disk.kind(directory / ENDED) is None:
            return None
        return read_file(directory / ENDED, disk, limit=MAX_POINTER_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return None


def _pointer_target(path: Path, disk: Disk, manifests: Mapping[str, Manifest | None]) -> str:
    """Return the tag that a pointer names.

    Args:
        path: The pointer's file.
        disk: The disk.
        manifests: Manifest by tag of all checkpoints; None for a damaged one.
    """
    try:
        text = read_file(path, disk, limit=MAX_POINTER_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{_printable(path)} is damaged, or not a pointer: {error}") from error
    tag, _, rest = text.partition(" ")
    if _POINTER.fullmatch(text) and tag not in manifests:
        raise MissingTargetError(f"{_printable(path)} names {tag}, which does not exist")
    if not NAME.fullmatch(tag) or tag not in manifests:
        raise CheckpointError(f"{_printable(path)} is damaged, or not a pointer: there is no checkpoint {tag[:80]!r}")
    manifest = manifests[tag]
    # In format 1, manifests had no hash and a pointer was only a tag.
    if manifest is not None and text != pointer_text(manifest) and not (manifest.format == 1 and not rest):
        raise CheckpointError(f"{_printable(path)} is damaged: {tag} is not the checkpoint that it was set to")
    return tag


def _printable(path: Path) -> str:
    """Return a path for a message; if it has unprintable characters, such as terminal commands, they are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)
