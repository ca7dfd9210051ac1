"""Where what is logged goes: the console, `metrics.jsonl`, `summary.json`."""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console as RichConsole

from noether.core.event import AfterTraining, AfterUpdate
from noether.core.iteration import TrainingIteration
from noether.effects.encoding import number
from noether.effects.files import replace_text

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.effect import LogScalars, LogText, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState

_QUIET_S: Final = 1.0
_SILENCE_S: Final = 300.0


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


class Console:
    """Writes lines for a person: texts as they come, metrics aligned; those of updates once a second at most.

    After 300 s of silence the last line is repeated, so that a watcher knows that the run lives; until training ends.

    Args:
        console: Where to write.
    """

    def __init__(self, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole(highlight=False, soft_wrap=True)
        self._written_s = -_QUIET_S
        self._timer: threading.Timer | None = None

    def text(self, effect: LogText, state: TrainState, event: Event) -> None:  # a handler
        """Write a text: the handler of `LogText`."""
        self._write(f"{state.iteration!s:<18} {effect.text}", event)

    def scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Write metrics on one line: a handler of `LogScalars`."""
        if isinstance(event, AfterUpdate):
            # A loop that does not read the time has every line written.
            if event.time_s and event.time_s - self._written_s < _QUIET_S:
                return
            self._written_s = event.time_s
        metrics = "  ".join(f"{key} {_short(value)}" for key, value in effect.values.items())
        self._write(f"{state.iteration!s:<18} {metrics}", event)

    def close(self) -> None:
        """Stop watching for silence."""
        if self._timer is not None:
            self._timer.cancel()

    def _write(self, line: str, event: Event) -> None:
        self._console.print(line, markup=False)
        self.close()
        if not isinstance(event, AfterTraining):
            # The timer does not keep the console alive: a loop that let go of its run has ended.
            self._timer = threading.Timer(_SILENCE_S, _repeat, [weakref.ref(self), line, event])
            self._timer.daemon = True
            self._timer.start()


def _repeat(console: weakref.ref[Console], line: str, event: Event) -> None:
    alive = console()
    if alive is not None:
        alive._write(line, event)  # noqa: SLF001  # the console's own timer


def _short(value: Any) -> str:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)
