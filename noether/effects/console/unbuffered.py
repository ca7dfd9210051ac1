"""Writing to the standard output so that its buffers stay empty."""

from __future__ import annotations

import errno
import io
import os
from typing import IO


def write_unbuffered(file: IO[str], text: str) -> None:
    """Write and flush a text.

    If a write fails, such as to a closed pipe or a full disk, the text is not left in a buffer: Python would write it
    again when it exits, and end with an error.

    Args:
        file: Where to write.
        text: The text; characters that the encoding of the standard output lacks are written as escapes.

    Raises:
        OSError: If the file cannot be written.
    """
    raw = getattr(file.buffer, "raw", file.buffer) if type(file) is io.TextIOWrapper else None
    if not isinstance(file, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        file.write(text)
        file.flush()
        return
    file.flush()  # output of other code, which comes first
    rest = text.encode(file.encoding, "backslashreplace")
    while rest:
        if (size := raw.write(rest)) is None:  # a pipe that does not block
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[size:]
