"""The logs on disk: `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from noether.core.iteration import TrainingIteration
from noether.effects.encoding import number
from noether.effects.files import replace_text

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.effect import LogScalars, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState


class LogError(Exception):
    """A log cannot be read."""


def event_name(event: Event) -> str:
    """Return the name of an event in logs, such as `after_update`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def plain(value: Any) -> Any:
    """Return a logged value as strict JSON can hold it; this is where a tensor is read from its device."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return number(value) if isinstance(value, float) else value


class MetricsFile:
    """Appends one line per event that logged, flushed: `{"event":, "epoch":, "update":, "sample":, ...}`.

    Args:
        path: The file; made at the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Append a line: a handler of `LogScalars`."""
        line = {
            "event": event_name(event),
            "epoch": state.iteration.epoch,
            "update": state.iteration.update,
            "sample": state.iteration.sample,
            "time_s": event.time_s,
            "metrics": {key: plain(value) for key, value in effect.values.items()},
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def cut(self, state: TrainState | None) -> int:
        """Drop the lines beyond `state`, which a resumed run will write again, and a torn one; return how many.

        Args:
            state: Where the run goes on, or None if it starts anew.

        Raises:
            LogError: If a line before the last is not one of ours.
        """
        if not self._path.exists():
            return 0
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if self._belongs(line, number, len(lines), state)]
        if len(kept) < len(lines):
            replace_text(self._path, "".join(kept))
        return len(lines) - len(kept)

    def _belongs(self, line: str, number: int, last: int, state: TrainState | None) -> bool:
        try:
            read = json.loads(line)
            measured = TrainingIteration(read["epoch"], read["update"], read["sample"])
        except (ValueError, KeyError, TypeError):
            if number == last:
                return False
            raise LogError(f"{self._path}:{number}: not a line of metrics: {line[:80]!r}") from None
        if state is None or not line.endswith("\n") or not state.iteration.reached(measured):
            return False
        # The end of training is dispatched where the last update or epoch was: the counters do not tell it from them.
        return state.ended or read["event"] != "after_training" or measured != state.iteration


class Summary:
    """Keeps `summary.json`: what is to be known of a run at a glance.

    Args:
        path: The file; what it holds already stays until it is set anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def set(self, effect: SetSummary, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        """Set entries: the handler of `SetSummary`."""
        held: Mapping[str, Any] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        entries = {**held, **{key: plain(value) for key, value in effect.values.items()}}
        replace_text(self._path, json.dumps(entries, indent=1, allow_nan=False) + "\n")
