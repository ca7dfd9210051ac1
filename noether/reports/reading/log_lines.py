"""The lines of a log file of a run, also while it is being written; damaged lines are named and left out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Final, final

import orjson

from noether.core.text import count_of, escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BLOCK_BYTES: Final = 1 << 17  # the objects of larger blocks do not fit into the cache of a CPU
_MAX_SHOWN: Final = 3
_LOGGER: Final = logging.getLogger(__name__)


@final
@dataclass(kw_only=True)
class LogLines:
    r"""Reads the whole lines of a log file in blocks; a line without a line end is still being written, and left out.

    Args:
        path: The file; it may not exist.
        block_bytes: About how many bytes are parsed at once.
        count: Lines read so far.
        damaged: Number, from 1, and reason of each line that was left out.
        size: Bytes of the lines read so far.
        last: The last line read.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"update": 1}\n{"upd\n{"update": 3}\n{"upda')
        >>> lines = LogLines(path=path)
        >>> [line for block in lines.blocks() for line in block]
        [{'update': 1}, None, {'update': 3}]
        >>> list(lines.damaged)
        [2]
    """

    path: Path
    block_bytes: int = _BLOCK_BYTES
    count: int = 0
    damaged: dict[int, str] = field(default_factory=dict)
    size: int = 0
    last: bytes = b""

    def blocks(self) -> Iterator[list[Any]]:
        """Yield the lines of each block as objects, None for one that is not JSON.

        `count` is the number of lines before the block until the next one is taken.
        """
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from self.blocks_of(file)

    def blocks_of(self, file: BinaryIO) -> Iterator[list[Any]]:
        """Yield the lines of each block from the position of an open file on, as `blocks` does."""
        while content := file.read(self.block_bytes):
            content += file.readline()
            end = content.rfind(b"\n") + 1
            if end:
                block = self._parse(content[:end])
                yield block
                self.count += len(block)
                self.size += end
                self.last = content[content.rfind(b"\n", 0, end - 1) + 1 : end]
            if end < len(content):
                return

    def add_damage(self, line: int, reason: object) -> None:
        """Record that a line, from 1, was left out, and why."""
        self.damaged[line] = str(reason)

    def report_damage(self) -> None:
        """Log a warning that names the lines that were left out, if there are any."""
        if self.damaged:
            shown = "; ".join(f"line {line}: {reason}" for line, reason in list(self.damaged.items())[:_MAX_SHOWN])
            more = "" if len(self.damaged) <= _MAX_SHOWN else "; ..."
            lines = count_of(len(self.damaged), "damaged line")
            _LOGGER.warning("%s: left out %s (%s)", self.path, lines, escape_controls(shown + more))

    def _parse(self, content: bytes) -> list[Any]:
        try:  # one array of all lines takes less time than each line alone
            block: list[Any] = orjson.loads(b"[" + content[:-1].replace(b"\n", b",") + b"]")
        except ValueError:
            pass
        else:
            if len(block) == content.count(b"\n"):
                return block
        lines = content[:-1].split(b"\n")
        return [self._parse_line(line, number) for number, line in enumerate(lines, self.count + 1)]

    def _parse_line(self, line: bytes, number: int) -> Any:
        try:
            return orjson.loads(line)
        except ValueError as error:
            self.add_damage(number, f"it is not JSON: {error}")
            return None
