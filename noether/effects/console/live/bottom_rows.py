"""The bottom rows of a terminal, reserved for a display; all other output scrolls above them.

The terminal itself reserves them (the margins of VT100, DECSTBM), so the output of C libraries, of worker processes and
of a process that crashes scrolls above them, too. No output is redirected, buffered or lost.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor
_WHOLE_SCREEN: Final = "\x1b[r"
_CLEAR_BELOW: Final = "\x1b[J"
_DOWN: Final = "\x1bD"  # moves the cursor down in its column; scrolls at the last row
_REPAIR: Final = r"\0337\033[r\0338\033[J"


class Rows(Protocol):
    """A place that shows the lines of a display."""

    @property
    def are_shown(self) -> bool:
        """Whether the lines are shown."""

    def draw(self, lines: Sequence[str]) -> None:
        """Draw the lines in place of the previous ones."""

    def remove(self) -> None:
        """Remove the display; `draw` shows it again."""


class BottomRows:
    """The bottom rows of a terminal.

    Args:
        file: The terminal.
        size: Returns its width and height.
    """

    def __init__(self, file: IO[str], size: Callable[[], tuple[int, int]]) -> None:
        self._file, self._size = file, size
        self._layout: tuple[tuple[int, int], int] | None = None  # size of the terminal, and number of rows
        self._repair: subprocess.Popen[bytes] | None = None

    @property
    def are_shown(self) -> bool:
        """Whether the display is on the terminal."""
        return self._layout is not None

    def draw(self, lines: Sequence[str]) -> None:
        """Draw the lines in place of the previous ones; each has to fit into the width of the terminal.

        Raises:
            OSError: If the terminal is closed.
            ValueError: Likewise.
        """
        size, count = self._size(), len(lines)
        last = size[1] - count
        begin = ""
        if self._layout != (size, count):
            begin = f"{_SAVE}{_WHOLE_SCREEN}{_RESTORE}{_CLEAR_BELOW}{_DOWN * count}\x1b[{count}A"
            if self._layout is None:
                self._repair = _start_repair(self._file)
        rows = "".join(f"\x1b[{last + 1 + row};1H\x1b[2K{line}" for row, line in enumerate(lines))
        self._layout = size, count
        # The margins are set each time, because another program may have changed them while this one was stopped.
        self._write(f"{begin}{_SAVE}\x1b[1;{last}r{rows}{_RESTORE}")

    def remove(self) -> None:
        """Return the rows to the terminal, and move the cursor to the start of a line.

        Raises:
            OSError: If the terminal is closed.
            ValueError: Likewise.
        """
        if self._layout is None:
            return
        self._layout = None
        try:
            self._write(f"{_SAVE}{_WHOLE_SCREEN}{_RESTORE}{_CLEAR_BELOW}{self.start_line()}")
        finally:
            _stop_repair(self._repair)

    def start_line(self) -> str:
        """Return characters that move the cursor to the start of an empty line, also behind a `^C` or half a line.

        As many spaces as the terminal has columns wrap into the next line, unless the cursor was at the start of one.
        """
        return f"{' ' * self._size()[0]}\r\x1b[K"

    def _write(self, text: str) -> None:
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        self._file.write(text.encode(encoding, "replace").decode(encoding))  # names may have any characters
        self._file.flush()


def _start_repair(file: IO[str]) -> subprocess.Popen[bytes] | None:
    """Start a shell that waits on a pipe, and resets the margins of the terminal if this process is killed."""
    try:
        return subprocess.Popen(  # noqa: S602  # a constant command
            f'read -r _ || printf "{_REPAIR}"',
            shell=True,
            stdin=subprocess.PIPE,
            stdout=file.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C does not end it
        )
    except (OSError, ValueError):  # the file has no descriptor, or there is no shell
        return None


def _stop_repair(repair: subprocess.Popen[bytes] | None) -> None:
    if repair is not None and repair.stdin is not None:
        with suppress(OSError):
            os.write(repair.stdin.fileno(), b"\n")
            repair.stdin.close()
        repair.wait()
