"""The steps of a save as calls on the disk, in the one order in which a crash between any two of them does no harm."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

from attrs import evolve

from noether.effects.checkpoints.contents import FILES
from noether.effects.checkpoints.listing import pointer_text
from noether.effects.checkpoints.manifest import MANIFEST, Manifest, Part
from noether.effects.disk.files import TEMPORARY, make_directories, remove_all, replace_text, write_new

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from noether.effects.checkpoints.contents import Pieces
    from noether.effects.disk.calls import Disk


_OWN: Final = FILES | {MANIFEST}


@final
class Writer:
    """Writes into a directory of checkpoints.

    Args:
        directory: Made at the first write.
        disk: The disk.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk

    def write(self, draft: Manifest, files: Mapping[str, Pieces]) -> Manifest:
        """Write the files of a checkpoint beside the others, flushed, and return its manifest with their hashes."""
        make_directories(self._directory, self._disk)
        self._clear()
        temporary = self._temporary(draft.tag)
        self._disk.make_directory(temporary)
        written = {name: write_new(temporary / name, pieces, self._disk) for name, pieces in files.items()}
        parts = {name: Part(size_bytes=each.size_bytes, sha256=each.sha256) for name, each in written.items()}
        return evolve(draft, parts=parts)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, and give the directory its name; when this returns, the checkpoint is saved."""
        temporary = self._temporary(manifest.tag)
        write_new(temporary / MANIFEST, [manifest.dumps().encode()], self._disk)
        self._disk.flush_directory(temporary)
        self._disk.rename(temporary, self._directory / manifest.tag)
        self._disk.flush_directory(self._directory)

    def point(self, pointer: str, manifest: Manifest) -> None:
        """Let a pointer name a checkpoint."""
        replace_text(self._directory / pointer, pointer_text(manifest), self._disk)

    def prune(self, tags: Iterable[str]) -> None:
        """Remove checkpoints; each loses its name first, so that nobody ever sees half of one.

        Raises:
            OSError: If it fails, or if one stays because somebody put files of their own into it.
        """
        foreign = {tag: set(self._disk.names(self._directory / tag)) - _OWN for tag in tags}
        going = [tag for tag, names in foreign.items() if not names]
        for tag in going:
            self._disk.rename(self._directory / tag, self._temporary(tag))
        self._disk.flush_directory(self._directory)
        for tag in going:
            remove_all(self._temporary(tag), self._disk)
        if staying := [f"{tag}/{name}" for tag, names in foreign.items() for name in sorted(names)]:
            raise OSError(errno.ENOTEMPTY, f"{', '.join(staying)} would be lost", str(self._directory))

    def give_up(self) -> None:
        """Remove what a failed save left, so that it does not fill the disk; what resists, the next save removes."""
        with suppress(OSError):
            self._clear()

    def _clear(self) -> None:
        for name in self._disk.names(self._directory):
            if name.startswith(TEMPORARY):
                remove_all(self._directory / name, self._disk)

    def _temporary(self, tag: str) -> Path:
        return self._directory / f"{TEMPORARY}{tag}"
