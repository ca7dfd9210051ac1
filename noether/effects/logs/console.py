"""Console output of a run: aligned lines, and on a terminal a live display below them."""

from __future__ import annotations

import errno
import io
import math
import os
import threading
import weakref
from contextlib import suppress
from itertools import zip_longest
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, Final

import torch
from rich.console import Console as RichConsole
from rich.text import Text

from noether.core.event import AfterTraining, AfterUpdate
from noether.core.text import escape_controls
from noether.effects.logs.progress_bar import LiveProgress, describe_progress, is_live
from noether.effects.logs.run_panels import command_lines, plain_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from noether.core.effect import LogScalars, LogText, ShowProgress
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.logs.run_panels import RunPanel

_UPDATE_INTERVAL_S: Final = 1.0
_HEARTBEAT_S: Final = 300.0
_LABEL_WIDTH: Final = 18
_DEFAULT_WIDTH: Final = 120  # without a terminal


class Console:
    r"""Writes lines for a person: texts at once, metrics in aligned columns; at most one line of metrics a second.

    Control characters in texts and metrics are written as visible escapes, such as `\x1b`; the log has them unchanged.
    The limit applies to metrics of updates. As a heartbeat, the last lines are repeated after 300 s without output,
    until training ends.

    Args:
        console: Where to write; by default the standard output, where long lines are not wrapped.
    """

    def __init__(self, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole(highlight=False, soft_wrap=True)
        self._is_terminal = self._console.is_terminal
        # Without a terminal, rich takes ten times longer to write the same text. A console that the user passes may
        # wrap, record or capture it.
        self._is_plain = console is None and not self._is_terminal and not self._console.is_jupyter
        self._live = LiveProgress(self._console) if is_live(self._console) else None
        self._last_update_s = -math.inf
        self._timer: threading.Timer | None = None
        self._last_lines: tuple[str, float] | None = None  # text and time; None where no heartbeat is needed

    def write_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Write a text: the handler of `LogText`."""
        text = escape_controls(effect.text.replace("\r\n", "\n"), keep="\n\t")
        self._write(_add_label(state, text.splitlines() or [""]), event)

    def write_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Write metrics in aligned columns: a handler of `LogScalars`."""
        # A loop that sets no time on its events gets every line. The difference is negative if the clock was set back.
        is_update = isinstance(event, AfterUpdate)
        if is_update and event.time_s and 0 <= event.time_s - self._last_update_s < _UPDATE_INTERVAL_S:
            return
        metrics = {key: value for key, value in sorted(effect.values.items()) if key not in effect.quiet}
        if not metrics:
            return
        if is_update:
            self._last_update_s = event.time_s
        metrics = {key: value for key, value in metrics.items() if not repeats_single_loss(key, metrics)}
        width = self._console.width if self._is_terminal else _DEFAULT_WIDTH
        self._write(_add_label(state, format_columns(metrics, width - len(_add_label(state, [""])))), event)

    def show_progress(self, effect: ShowProgress, state: TrainState, event: Event) -> None:
        """Show progress on the live display, or as a line where it is due: the handler of `ShowProgress`."""
        if self._live is None:
            if effect.due:
                self._write(_add_label(state, [describe_progress(effect, state)]), event)
        elif isinstance(event, AfterTraining):
            self._live.stop()
        else:
            self._live.show(effect, state)

    def print_above(self, renderable: RenderableType) -> None:
        """Print anything that rich can render, such as a table, above the live display; text is never markup."""
        if self._is_plain and isinstance(renderable, str):
            self._print(renderable)
        else:
            self._console.print(renderable, markup=False, emoji=False, soft_wrap=isinstance(renderable, str))

    @property
    def shows_panels(self) -> bool:
        """Whether panels have a border and colours: on a terminal and in a notebook."""
        return self._console.is_jupyter or (self._is_terminal and not self._console.is_dumb_terminal)

    def write_panel(self, panel: RunPanel) -> None:
        """Write a panel, in place of the live display; its commands are never broken into lines."""
        if self._live is not None:
            self._live.stop()
        if not self.shows_panels:
            self._print("\n".join(plain_lines(panel)))
            return
        self._console.print(panel, soft_wrap=False)
        for line in command_lines(panel):
            self._console.print(line, soft_wrap=True)

    def write_notice(self, text: str) -> None:
        """Write a line at once, from any thread; a terminal may have echoed ^C before it."""
        is_apart = self._is_terminal and (self._live is None or not self._live.is_shown)
        self._print("\n" * is_apart + escape_controls(text))

    def close(self) -> None:
        """Stop the heartbeat, and remove the live display."""
        self._stop_heartbeat()
        if self._live is not None:
            self._live.stop()

    def _write(self, lines: str, event: Event) -> None:
        """Write lines, and start the heartbeat if training continues after the event."""
        self._print(lines)
        if isinstance(event, AfterTraining):
            self._stop_heartbeat()
            return
        self._last_lines = lines, monotonic()
        if self._timer is None:  # a running timer sees the new lines; a new thread per line would take longer
            self._start_timer(_HEARTBEAT_S)

    def _print(self, lines: str) -> None:
        """Print a text unchanged, without interpreting `[bold]` or `:100:` in logged texts as markup."""
        if not self._is_plain:
            self._console.print(lines, markup=False, emoji=False)
            return
        text = Text(lines)
        text.expand_tabs(self._console.tab_size)
        _write_text(self._console.file, f"{text.plain}\n")

    def _start_timer(self, wait_s: float) -> None:
        # A weak reference, so that the heartbeat ends when the loop drops the run. The thread refers to no tensors,
        # because a thread that frees tensors while Python exits aborts the process.
        self._timer = threading.Timer(wait_s, _heartbeat, [weakref.ref(self)])
        self._timer.daemon = True
        self._timer.start()

    def _stop_heartbeat(self) -> None:
        self._last_lines = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _repeat_last_lines(self) -> None:
        """Repeat the last lines if they are old enough, and start the next timer."""
        if self._last_lines is None:
            return
        lines, written_s = self._last_lines
        remaining_s = written_s + _HEARTBEAT_S - monotonic()
        if remaining_s <= 0:
            with suppress(OSError, ValueError):  # such as a closed pipe or file: the next line reports it
                self._print(lines)
            self._last_lines, remaining_s = (lines, monotonic()), _HEARTBEAT_S
        self._start_timer(remaining_s)


def _heartbeat(reference: weakref.ref[Console]) -> None:
    console = reference()
    if console is not None:
        console._repeat_last_lines()  # noqa: SLF001  # the console's own timer


def format_columns(metrics: Mapping[str, Any], width: int) -> list[str]:
    r"""Return metrics as lines of aligned columns, read downwards; as many columns as fit into `width` characters.

    Example:
        >>> print(*format_columns({"loss/val/mse": 0.25, "val/accuracy": 0.5, "optim/lr": 1e-3}, width=60), sep="|\n")
        loss/val/mse  0.25    optim/lr      0.001|
        val/accuracy  0.5
    """
    names, values = [escape_controls(name) for name in metrics], [_format_value(value) for value in metrics.values()]
    name_width, value_width = max(map(len, names)), max(map(len, values))
    cells = [f"{name:<{name_width}}  {value:<{value_width}}" for name, value in zip(names, values, strict=True)]
    column_count = max(1, (width + len(_GAP)) // (len(cells[0]) + len(_GAP)))
    row_count = -(-len(cells) // column_count)
    by_column = (cells[start : start + row_count] for start in range(0, len(cells), row_count))
    return [_GAP.join(row).rstrip() for row in zip_longest(*by_column, fillvalue="")]


_GAP: Final = "    "


def _add_label(state: TrainState, lines: Sequence[str]) -> str:
    """Return lines as one text; the first begins with the counters, the others are indented as far."""
    label = f"{state.iteration!s:<{_LABEL_WIDTH}} "
    return "\n".join(f"{label if number == 0 else ' ' * len(label)}{line}" for number, line in enumerate(lines))


def repeats_single_loss(key: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a metric is the total of one single loss, which is shown already."""
    parts = key.split("/")
    if "total" not in parts:
        return False
    place = parts.index("total")
    others = [name.split("/") for name in metrics if name != key]
    losses = [each for each in others if each[:place] == parts[:place] and each[place + 1 :] == parts[place + 1 :]]
    return len(losses) == 1 and _format_value(metrics["/".join(losses[0])]) == _format_value(metrics[key])


def _format_value(value: Any) -> str:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return f"{value:.5g}" if isinstance(value, float) else escape_controls(str(value))


def _write_text(file: IO[str], text: str) -> None:
    """Write and flush a text.

    The buffers of the standard output get nothing that cannot be written, such as to a closed pipe or a full disk:
    Python would try again when it exits, and end with an error.
    """
    raw = getattr(file.buffer, "raw", file.buffer) if type(file) is io.TextIOWrapper else None
    if not isinstance(file, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        file.write(text)
        file.flush()
        return
    file.flush()  # what others wrote before
    rest = memoryview(text.encode(file.encoding, "backslashreplace"))
    while rest:
        if (size := raw.write(rest)) is None:  # a pipe that does not block
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[size:]
