"""What a person reads: aligned lines, and on a terminal a live display below them."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from itertools import zip_longest
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console as RichConsole
from rich.text import Text

from noether.core.event import AfterTraining, AfterUpdate
from noether.effects.logs.progress_bar import LiveProgress, describe_progress, is_live

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.effect import LogScalars, LogText, ShowProgress
    from noether.core.event import Event
    from noether.core.state import TrainState

_QUIET_S: Final = 1.0
_SILENCE_S: Final = 300.0
_LABEL: Final = 18
_WIDTH: Final = 120  # where there is no terminal to ask


class Console:
    """Writes lines for a person: texts as they come, metrics aligned; those of updates once a second at most.

    After 300 s of silence the last lines are repeated, so that a watcher knows that the run lives; until training ends.

    Args:
        console: Where to write; by default the standard output, where long lines are not wrapped.
    """

    def __init__(self, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole(highlight=False, soft_wrap=True)
        self._is_terminal = self._console.is_terminal
        # Where there is no terminal, rich takes ten times longer to the very same text. A console of somebody's own may
        # still wrap, record or capture it.
        self._is_plain = console is None and not self._is_terminal and not self._console.is_jupyter
        self._live = LiveProgress(self._console) if is_live(self._console) else None
        self._written_s = -_QUIET_S
        self._timer: threading.Timer | None = None
        self._said: tuple[str, float] | None = None  # the last lines and when, where the run goes on

    def write_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Write a text: the handler of `LogText`."""
        self._write(_labelled(state, effect.text.splitlines() or [""]), watched=_goes_on(event))

    def write_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Write metrics in aligned columns: a handler of `LogScalars`."""
        # A loop that does not read the time has every line written.
        if isinstance(event, AfterUpdate) and event.time_s and event.time_s - self._written_s < _QUIET_S:
            return
        shown = {key: value for key, value in sorted(effect.values.items()) if key not in effect.quiet}
        if not shown:
            return
        if isinstance(event, AfterUpdate):
            self._written_s = event.time_s
        width = self._width - len(_labelled(state, [""]))
        self._write(_labelled(state, columns(_without_repeats(shown), width)), watched=_goes_on(event))

    def show_progress(self, effect: ShowProgress, state: TrainState, event: Event) -> None:
        """Show progress on the live display, or on a line where it is due: the handler of `ShowProgress`."""
        if self._live is None:
            if effect.due:
                self._write(_labelled(state, [describe_progress(effect, state)]), watched=_goes_on(event))
        elif isinstance(event, AfterTraining):
            self._live.stop()
        else:
            self._live.show(effect, state)

    def close(self) -> None:
        """Stop watching for silence, and take the live display away."""
        self._cancel()
        if self._live is not None:
            self._live.stop()

    @property
    def _width(self) -> int:
        return self._console.width if self._is_terminal else _WIDTH

    def _cancel(self) -> None:
        self._said = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write(self, lines: str, *, watched: bool) -> None:
        """Write lines, and have them repeated after a silence where the run goes on."""
        self._print(lines)
        if not watched:
            self._cancel()
            return
        self._said = lines, monotonic()
        if self._timer is None:  # one that runs looks at what was said since; a new thread for each line takes longer
            self._watch(_SILENCE_S)

    def _print(self, lines: str) -> None:
        """Print a text as it is: `[bold]` and `:100:` are what somebody logged."""
        if not self._is_plain:
            self._console.print(lines, markup=False, emoji=False)
            return
        text = Text(lines)  # without bells and the like
        text.expand_tabs(self._console.tab_size)
        self._console.file.write(f"{text.plain}\n")
        self._console.file.flush()

    def _watch(self, wait_s: float) -> None:
        # The timer does not keep the console alive: a loop that let go of its run has ended. And nothing with tensors:
        # a thread that frees them while Python exits aborts the process.
        self._timer = threading.Timer(wait_s, _end_silence, [weakref.ref(self)])
        self._timer.daemon = True
        self._timer.start()

    def _repeat(self) -> None:
        """Repeat the last lines if they are old enough, and watch on."""
        if self._said is None:
            return
        lines, since_s = self._said
        left_s = since_s + _SILENCE_S - monotonic()
        if left_s <= 0:
            with suppress(OSError):  # as of a pipe that nobody reads any more: the next line will tell
                self._print(lines)
            self._said, left_s = (lines, monotonic()), _SILENCE_S
        self._watch(left_s)


def _goes_on(event: Event) -> bool:
    return not isinstance(event, AfterTraining)


def _end_silence(console: weakref.ref[Console]) -> None:
    alive = console()
    if alive is not None:
        alive._repeat()  # noqa: SLF001  # the console's own timer


def columns(metrics: Mapping[str, Any], width: int) -> list[str]:
    r"""Return metrics as lines of aligned columns, read downwards; as many columns as fit into `width` characters.

    Example:
        >>> print(*columns({"loss/val/mse": 0.25, "val/accuracy": 0.5, "optim/lr": 1e-3}, width=60), sep="|\n")
        loss/val/mse  0.25    optim/lr      0.001|
        val/accuracy  0.5
    """
    names, values = list(metrics), [_short(value) for value in metrics.values()]
    name_width, value_width = max(map(len, names)), max(map(len, values))
    cells = [f"{name:<{name_width}}  {value:<{value_width}}" for name, value in zip(names, values, strict=True)]
    count = max(1, (width + len(_GAP)) // (len(cells[0]) + len(_GAP)))
    rows = -(-len(cells) // count)
    by_column = (cells[at : at + rows] for at in range(0, len(cells), rows))
    return [_GAP.join(row).rstrip() for row in zip_longest(*by_column, fillvalue="")]


_GAP: Final = "    "


def _labelled(state: TrainState, lines: Sequence[str]) -> str:
    label = f"{state.iteration!s:<{_LABEL}} "
    return "\n".join(f"{label if number == 0 else ' ' * len(label)}{line}" for number, line in enumerate(lines))


def _without_repeats(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics without the total of a single loss, which is that loss again."""
    return {key: value for key, value in metrics.items() if not _is_repeated(key, metrics)}


def _is_repeated(key: str, metrics: Mapping[str, Any]) -> bool:
    parts = key.split("/")
    if "total" not in parts:
        return False
    place = parts.index("total")
    others = [name.split("/") for name in metrics if name != key]
    losses = [each for each in others if each[:place] == parts[:place] and each[place + 1 :] == parts[place + 1 :]]
    return len(losses) == 1 and _short(metrics["/".join(losses[0])]) == _short(metrics[key])


def _short(value: Any) -> str:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return f"{value:.5g}" if isinstance(value, float) else str(value)
