"""What lies in a directory of checkpoints, read without believing it: each thing is whole, damaged, or not ours."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Final

from attrs import frozen

from noether.core.errors import NoetherError
from noether.effects.checkpoints.contents import FILES
from noether.effects.checkpoints.manifest import LIMIT_BYTES, MANIFEST, NAME, Manifest, ManifestError
from noether.effects.disk.files import os_error_text, read_file

if TYPE_CHECKING:
    from pathlib import Path

    from noether.effects.disk.calls import Disk, Kind

_POINTER_BYTES: Final = 400
_PASSING: Final = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
_POINTER: Final = re.compile(rf"{NAME.pattern} [0-9a-f]{{64}}\n", re.ASCII)


class CheckpointError(NoetherError):
    """A checkpoint cannot be found, read or written."""


class UnreadableError(CheckpointError):
    """A checkpoint that may well be whole cannot be read by this process: that is no reason to go on without it."""


class _LostError(CheckpointError):
    """A pointer names a checkpoint that is not there."""


@frozen
class Listing:
    """What lies in a directory of checkpoints.

    Args:
        manifests: Of the checkpoints whose manifest can be read, oldest first.
        damaged: What is wrong with the others, by the name of their directory.
        unreadable: Those among them that may be whole, and cannot be read.
        pointers: Tag by name of pointer.
        broken: What is wrong with pointers that name nothing, by name; what they named cannot be told.
        lost: Those among them that were set to a checkpoint which is not there any more.
    """

    manifests: tuple[Manifest, ...]
    damaged: dict[str, str]
    unreadable: dict[str, str]
    pointers: dict[str, str]
    broken: dict[str, str]
    lost: dict[str, str]


def list_checkpoints(directory: Path, disk: Disk) -> Listing:
    """Return what lies in a directory of checkpoints; names that begin with a dot are not looked at.

    Raises:
        CheckpointError: If the directory itself cannot be read.
    """
    try:
        kinds = _kinds(directory, disk)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {os_error_text(error)}") from error
    found: dict[str, Manifest] = {}
    unreadable: dict[str, str] = {}
    damaged = {name: f"{_shown(directory / name)} is damaged: it is a link or a device" for name in _odd(kinds)}
    for name in (name for name, kind in kinds.items() if kind == "directory"):
        try:
            manifest = read_manifest(directory, name, disk)
        except CheckpointError as error:
            damaged[name] = str(error)
            unreadable |= {name: str(error)} if isinstance(error, UnreadableError) else {}
        else:
            found |= {} if manifest is None else {name: manifest}
    pointers: dict[str, str] = {}
    broken: dict[str, str] = {}
    lost: dict[str, str] = {}
    for name in (name for name, kind in kinds.items() if kind == "file"):
        try:
            pointers[name] = _pointed(directory / name, disk, found, damaged)
        except CheckpointError as error:
            broken[name] = str(error)
            lost |= {name: str(error)} if isinstance(error, _LostError) else {}
    ordered = tuple(sorted(found.values(), key=lambda each: each.order))
    return Listing(ordered, damaged, unreadable, pointers, broken, lost)


def read_manifest(directory: Path, name: str, disk: Disk) -> Manifest | None:
    """Return the manifest of a checkpoint; None where there is nothing of a checkpoint: it is not ours.

    Raises:
        CheckpointError: If it is missing or damaged, or that of another checkpoint.
    """
    path = directory / name / MANIFEST
    try:
        if disk.kind(path) is None:
            parts = [part for part in disk.names(path.parent) if part in FILES]
            if not parts:
                return None
            raise CheckpointError(f"{_shown(path)} is missing, beside {', '.join(parts)}")
        manifest = Manifest.loads(read_file(path, disk, limit=LIMIT_BYTES).decode())
    except OSError as error:
        raise refusal(path, error) from error
    except (ManifestError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{_shown(path)} is damaged: {error}") from error
    if manifest.tag != name:
        raise CheckpointError(f"{_shown(path)} is damaged: it is the manifest of {manifest.tag}")
    return manifest


def refusal(path: Path, error: OSError | MemoryError) -> CheckpointError:
    """Return what to raise for a file of a checkpoint that the operating system does not give."""
    if isinstance(error, MemoryError):
        return UnreadableError(f"{_shown(path)} cannot be read: it does not fit into memory")
    if error.errno in _PASSING:
        return UnreadableError(f"{_shown(path)} cannot be read: {os_error_text(error)}; the run goes on once it can be")
    return CheckpointError(f"{_shown(path)} is damaged, or cannot be read: {os_error_text(error)}")


def pointer_text(manifest: Manifest) -> str:
    """Return what is in a pointer: a tag, and the hash of its manifest, by which damage and exchange are seen."""
    return f"{manifest.tag} {manifest.sha256}\n"


def _kinds(directory: Path, disk: Disk) -> dict[str, Kind | None]:
    if disk.kind(directory) is None:
        return {}
    return {name: disk.kind(directory / name) for name in disk.names(directory) if not name.startswith(".")}


def _odd(kinds: dict[str, Kind | None]) -> list[str]:
    return [name for name, kind in kinds.items() if kind in ("link", "other")]


def _pointed(path: Path, disk: Disk, manifests: dict[str, Manifest], damaged: dict[str, str]) -> str:
    """Return the tag that a pointer names."""
    try:
        text = read_file(path, disk, limit=_POINTER_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{_shown(path)} is damaged, or no pointer: {error}") from error
    tag, _, rest = text.partition(" ")
    if _POINTER.fullmatch(text) and tag not in {**manifests, **damaged}:
        raise _LostError(f"{_shown(path)} names {tag}, which is not there")
    if not NAME.fullmatch(tag) or tag not in {**manifests, **damaged}:
        raise CheckpointError(f"{_shown(path)} is damaged, or no pointer: there is no checkpoint {tag[:80]!r}")
    manifest = manifests.get(tag)
    # Before manifests had hashes, a pointer was a tag and nothing else.
    if manifest is not None and text != pointer_text(manifest) and not (manifest.format == 1 and not rest):
        raise CheckpointError(f"{_shown(path)} is damaged: {tag} is not the checkpoint that it was set to")
    return tag


def _shown(path: Path) -> str:
    """Return a path for a message; what a terminal would obey, or no text can hold, is escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)
