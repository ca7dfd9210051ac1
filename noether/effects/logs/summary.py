"""`summary.json`: one value per key for the whole run, such as best metrics and how the run ended."""

from __future__ import annotations

import json
import logging
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from noether.core.event import AfterEpoch, AfterUpdate
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import read_file, replace_text
from noether.effects.disk.json_numbers import to_plain
from noether.effects.disk.path_checks import RunMovedError
from noether.effects.logs.buffers import FLUSH_INTERVAL_S, FlushInterval, discard_after_fork
from noether.effects.logs.jsonl import do_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from noether.core.effect import SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

_LOGGER: Final = logging.getLogger(__name__)


class Summary:
    """Writes `summary.json`, the current value of each summary entry.

    Entries set at updates and epochs are buffered and written once a second by the time of their events, because
    replacing a file takes longer than many updates.

    Args:
        path: The file; its entries stay until they are set again.
        disk: The disk.
        check_location: Raises `RunMovedError` if the directory of the run was moved; called before each write.
    """

    def __init__(self, path: Path, disk: Disk = DISK, check_location: Callable[[], None] = do_nothing) -> None:
        self._path = path
        self._disk = disk
        self._check_location = check_location
        self._interval = FlushInterval({AfterUpdate: FLUSH_INTERVAL_S, AfterEpoch: FLUSH_INTERVAL_S})
        self._entries: dict[str, Any] | None = None  # the file's content, read once: the run is locked
        self._buffer: dict[str, Any] = {}
        discard_after_fork(self)

    def set(self, effect: SetSummary, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        """Set entries: the handler of `SetSummary`.

        Raises:
            OSError: As `flush`.
            RunMovedError: As `flush`.
        """
        self._buffer |= {key: to_plain(value) for key, value in effect.values.items()}
        if self._interval.is_due(event):
            self.flush()

    def flush(self) -> None:
        """Write the buffered entries.

        Raises:
            OSError: If the file cannot be written; the entries stay buffered.
            RunMovedError: If the directory of the run was moved; the entries stay buffered.
        """
        entries, self._buffer = self._buffer, {}
        try:
            if entries:
                self._write(entries)
        except (OSError, RunMovedError):
            self._buffer = {**entries, **self._buffer}
            raise

    def _write(self, changes: Mapping[str, Any]) -> None:
        if self._entries is None:
            self._entries = self._read()
        entries = {**self._entries, **changes}
        if entries != self._entries:  # an unchanged best value is set again at every evaluation
            self._check_location()
            replace_text(self._path, json.dumps(entries, indent=1, allow_nan=False) + "\n", self._disk)
            self._entries = entries

    def _read(self) -> dict[str, Any]:
        """Return the entries in the file; a damaged file is renamed, so that the run writes a new one."""
        if self._disk.kind(self._path) is None:
            return {}
        try:
            entries = json.loads(read_file(self._path, self._disk))
            if isinstance(entries, dict):
                return entries
            reason = "it is not an object"
        except (ValueError, RecursionError) as error:
            reason = str(error)
        self._check_location()
        names = (f"{self._path.name}.damaged{number or ''}" for number in count())
        target = next(each for each in map(self._path.with_name, names) if self._disk.kind(each) is None)
        self._disk.rename(self._path, target)
        _LOGGER.warning("%s is damaged (%s): it is %s now, and the run writes a new one", self._path, reason, target)
        return {}

    def close(self) -> None:
        """Flush, and forget the file's content: another process may write to it from now on.

        Raises:
            OSError: As `flush`; the buffered entries are lost.
            RunMovedError: As `flush`; likewise.
        """
        try:
            self.flush()
        finally:
            self.discard_buffer()
            self._entries = None

    def discard_buffer(self) -> None:
        """Discard the buffered entries."""
        self._buffer = {}
