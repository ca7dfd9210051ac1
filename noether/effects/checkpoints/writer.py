"""The four steps of a save on disk: write, commit, move pointers, prune; a crash between any two calls does no harm."""

from __future__ import annotations

import errno
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, final

from noether.core.errors import NoetherError
from noether.effects.checkpoints.converter import error_text
from noether.effects.checkpoints.file_names import file_of
from noether.effects.checkpoints.listing import CheckpointError, UnsavableError, pointer_text
from noether.effects.disk.files import TEMPORARY_PREFIX, make_directories, remove_tree, replace_text, write_new_file
from noether.effects.run_files import ENDED, MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from noether.effects.checkpoints.contents import Pieces
    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.disk.calls import Disk


@final
class Writer:
    """Writes to a directory of checkpoints.

    Args:
        directory: The directory; the first write creates it, in an existing one.
        disk: The disk.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk

    def begin(self, tag: str) -> None:
        """Make the temporary directory of a checkpoint, which readers ignore until `commit` renames it."""
        make_directories(self._directory, self._disk, within=self._directory.parent)
        self.remove_leftovers()
        self._disk.make_directory(self._temporary(tag))

    def write(self, tag: str, files: Mapping[str, Pieces]) -> dict[str, tuple[int, str]]:
        """Write and fsync files of a checkpoint in its temporary directory; return size and SHA-256 of each."""
        temporary = self._temporary(tag)
        written = {name: write_new_file(temporary / name, pieces, self._disk) for name, pieces in files.items()}
        return {name: (each.size_bytes, each.sha256) for name, each in written.items()}

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and rename the temporary directory to the tag; the checkpoint is saved on return."""
        temporary = self._temporary(manifest.tag)
        write_new_file(temporary / MANIFEST, [manifest.dumps().encode()], self._disk)
        self._disk.fsync_directory(temporary)
        self._disk.rename(temporary, self._directory / manifest.tag)
        self._disk.fsync_directory(self._directory)

    def move_pointer(self, pointer: str, manifest: Manifest) -> None:
        """Set a pointer to a checkpoint in one step."""
        replace_text(self._directory / pointer, pointer_text(manifest), self._disk)

    def mark_ended(self, manifest: Manifest) -> None:
        """Record that the run ended at a checkpoint, which was saved before the end was reached."""
        replace_text(self._directory / ENDED, pointer_text(manifest), self._disk)

    def prune(self, tags: Iterable[str]) -> None:
        """Remove checkpoints; each is renamed first, so that no reader sees part of one.

        Raises:
            OSError: If a call fails, or if a checkpoint stays because its directory holds files that are not ours.
        """
        foreign = {tag: list(filter(_is_foreign, self._disk.names(self._directory / tag))) for tag in tags}
        removable = [tag for tag, names in foreign.items() if not names]
        for tag in removable:
            self._disk.rename(self._directory / tag, self._temporary(tag))
        self._disk.fsync_directory(self._directory)
        for tag in removable:
            remove_tree(self._temporary(tag), self._disk)
        if lost := [f"{tag}/{name}" for tag, names in foreign.items() for name in names]:
            raise OSError(errno.ENOTEMPTY, f"{', '.join(lost)} would be lost", str(self._directory))

    def remove_leftovers(self) -> None:
        """Remove temporary files and directories of a save that failed or was interrupted."""
        for name in self._disk.names(self._directory):
            if name.startswith(TEMPORARY_PREFIX):
                remove_tree(self._directory / name, self._disk)

    @contextmanager
    def report_errors(self, failure: str) -> Iterator[None]:
        """Raise any error of a write as a `CheckpointError`, and remove temporary files, which may fill the disk."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            with suppress(OSError):  # the next save removes them
                self.remove_leftovers()
            kind = UnsavableError if isinstance(error, TypeError) else CheckpointError
            reason = str(error) if isinstance(error, (OSError, NoetherError, TypeError)) else error_text(error)
            raise kind(f"{failure}: {reason}; earlier checkpoints are intact") from error

    def _temporary(self, tag: str) -> Path:
        return self._directory / f"{TEMPORARY_PREFIX}{tag}"


def _is_foreign(name: str) -> bool:
    return file_of(name) is None and name != MANIFEST
