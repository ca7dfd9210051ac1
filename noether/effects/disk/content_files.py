"""Files of a run that are named by a hash of their content, so that each content is written once."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from noether.effects.disk.calls import DISK
from noether.effects.disk.files import make_directories, replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from noether.effects.disk.calls import Disk

ARTIFACTS: Final = "artifacts"
_FOLDER_DIGITS: Final = 2


def store_content(run: Path, content: bytes, suffix: str, disk: Disk = DISK) -> str:
    """Write content to `artifacts/<first 2 digits>/<SHA-256><suffix>` of a run unless it is there; return this path.

    Args:
        run: The run directory.
        content: The content.
        suffix: End of the name, such as `.png`.
        disk: The disk.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = store_content(Path(folder), b"text", ".txt")
        ...     path[:20], (Path(folder) / path).read_bytes()
        ('artifacts/98/982d9e3', b'text')
    """
    digest = hashlib.sha256(content).hexdigest()
    name = f"{ARTIFACTS}/{digest[:_FOLDER_DIGITS]}/{digest}{suffix}"
    path = run / name
    if disk.kind(path) is None:
        make_directories(path.parent, disk, within=run)
        replace_file(path, [content], disk)
    return name
