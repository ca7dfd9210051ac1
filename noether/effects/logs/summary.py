"""The logs on disk: `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from noether.core.event import AfterEpoch, AfterUpdate
from noether.effects.disk.calls import DISK
from noether.effects.disk.encoding import NUMBER_TYPES, to_plain
from noether.effects.disk.files import read_file, replace_text
from noether.effects.logs.flushing import Pace, forget_in_children
from noether.effects.logs.jsonl import LinesFile, LogError, place

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from noether.core.effect import LogScalars, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk


def metrics_file(path: Path, run_id: str = "", disk: Disk = DISK) -> LinesFile:
    """Return the file of a run's metrics: its `write` handles `LogScalars`, one line for each event that logged.

    Args:
        path: The file; made at the first line.
        run_id: Name of the run, on every line.
        disk: The disk.
    """
    return LinesFile(path, partial(_metrics_line, run_id), disk)


def _metrics_line(run_id: str, effect: LogScalars, state: TrainState, event: Event) -> dict[str, Any]:
    # A copy, and no tensors: the line may wait.
    values = dict(effect.values)
    if not NUMBER_TYPES.issuperset(map(type, values.values())):
        values = to_plain(values)
    return {"run": run_id, **place(state, event), "metrics": values}


class Summary:
    """Keeps `summary.json`: what is to be known of a run at a glance.

    What is set at updates and epochs waits, and is written once a second by the time of their events: a file that is
    replaced and flushed takes longer than many an update.

    Args:
        path: The file; what it holds already stays until it is set anew.
        disk: The disk.
    """

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._path = path
        self._disk = disk
        self._pace = Pace(AfterUpdate, AfterEpoch)
        self._held: dict[str, Any] | None = None  # what the file holds, once it was read: the run is locked
        self._waiting: dict[str, Any] = {}
        forget_in_children(self)

    def set(self, effect: SetSummary, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        """Set entries: the handler of `SetSummary`.

        Raises:
            LogError: As `hand_over`.
            OSError: As `hand_over`.
        """
        self._waiting |= {key: to_plain(value) for key, value in effect.values.items()}
        if self._pace.is_due(event):
            self.hand_over()

    def hand_over(self) -> None:
        """Write what waits.

        Raises:
            LogError: If what the file holds is damaged.
            OSError: If it cannot be written; it then waits on.
        """
        waiting, self._waiting = self._waiting, {}
        try:
            if waiting:
                self._write(waiting)
        except OSError:
            self._waiting = {**waiting, **self._waiting}
            raise

    def _write(self, waiting: Mapping[str, Any]) -> None:
        if self._held is None:
            self._held = self._read()
        entries = {**self._held, **waiting}
        if entries != self._held:  # a best value that stays is told of at every evaluation
            replace_text(self._path, json.dumps(entries, indent=1, allow_nan=False) + "\n", self._disk)
            self._held = entries

    def close(self) -> None:
        """Write what waits, and know nothing of the file any more: another run may write to it.

        Raises:
            LogError: As `hand_over`.
            OSError: As `hand_over`; what waits is lost.
        """
        try:
            self.hand_over()
        finally:
            self.forget()
            self._held = None

    def forget(self) -> None:
        """Drop what waits."""
        self._waiting = {}

    def _read(self) -> dict[str, Any]:
        if self._disk.kind(self._path) is None:
            return {}
        try:
            return dict(json.loads(read_file(self._path, self._disk)))
        except (ValueError, TypeError) as error:
            raise LogError(f"{self._path} is damaged: {error}; remove it, and it is written anew") from error
