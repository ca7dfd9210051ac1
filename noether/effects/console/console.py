"""Where the lines of a run go: to a file; on a terminal, above the live display or the bars of other libraries."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rich.console import Console as RichConsole
from rich.text import Text

from noether.core.estimates import known_end
from noether.core.event import AfterTraining, AfterUpdate, AtEval
from noether.core.text import escape_controls
from noether.effects.console.columns import LABEL_WIDTH, add_label, format_line, repeats_single_loss
from noether.effects.console.live.bottom_rows import BottomRows
from noether.effects.console.live.live_region import LiveRegion, TerminalStyle
from noether.effects.console.live.live_view import RunView, TaskView
from noether.effects.console.live.notebook import NotebookRows
from noether.effects.console.live.other_bars import choose_output, has_other_bar, hide_other_bars
from noether.effects.console.live.progress_lines import describe_progress, is_interactive
from noether.effects.console.run_panels import command_lines, plain_lines
from noether.effects.console.scrolling_lines import ChangedMetrics, wrap_texts
from noether.effects.console.unbuffered import write_unbuffered
from noether.effects.disk.finalizers import finalize

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType

    from noether.core.callback import Callback
    from noether.core.effect import LogScalars, LogText, LogUpdates, ShowProgress
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects.console.run_panels import RunPanel

_UPDATE_INTERVAL_S: Final = 1.0
_HEARTBEAT_S: Final = 300.0
_LIVE_UPDATE_INTERVAL_S: Final = 10.0  # the live display shows the newest values
_NOTEBOOK_SIZE: Final = (100, 40)
_Item = TypeVar("_Item")


class Console:
    r"""Writes lines for a person: texts, and one line of metrics per event; on a terminal, above a live display.

    Control characters in texts and metrics are written as visible escapes, such as `\x1b`; the log has them unchanged.
    Metrics of updates are written at most once a second. The live display shows the newest values, so above it they are
    written at most every ten seconds: those that changed, as many as fit into one line. As a heartbeat, the last lines
    are repeated after 300 s without output, until training ends.

    Attributes:
        view: What the live display shows.

    Args:
        console: Where to write; by default the standard output, where long lines are not wrapped.

    Example:
        >>> from noether import AfterTraining, LogScalars, TrainState
        >>> console = Console()
        >>> state = TrainState().advance(samples=4)
        >>> console.write_scalars(LogScalars({"loss": 0.5}), state, AfterTraining())
        E0_U1_S4           loss  0.5
        >>> console.close()
    """

    def __init__(self, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole(highlight=False, soft_wrap=True)
        self._is_terminal = self._console.is_terminal
        # Without a terminal, rich takes ten times longer to write the same text. A console that the user passes may
        # wrap, record or capture it.
        self._is_plain = console is None and (not self._is_terminal or self._console.is_jupyter)
        self.view = RunView()
        self._measure = partial(_measure, self._console)  # the thread must not keep this object alive
        self._rows = BottomRows(self._console.file, self._measure)
        self._live = self._make_live()
        self._changed = None if self._live is None else ChangedMetrics(self.view, self._live.style)
        self._label_width = LABEL_WIDTH
        if self._live is not None:
            # Without this, a loop that raises without closing its run would leave the rows on the terminal.
            finalize(self, _stop, self._live)
        self._run: Run | None = None
        self._last_update_s = -math.inf
        self._timer: threading.Timer | None = None
        self._last_lines: tuple[str, float] | None = None  # text and time; None where no heartbeat is needed

    def _make_live(self) -> LiveRegion | None:
        if self._console.is_jupyter:
            style = TerminalStyle(has_colors=False, has_unicode=True)
            return LiveRegion(self.view, NotebookRows(), lambda: _NOTEBOOK_SIZE, style)
        if not is_interactive(self._console):
            return None
        has_colors = self._console.color_system is not None and not self._console.no_color
        style = TerminalStyle(has_colors=has_colors, has_unicode=self._console.encoding.startswith("utf"))
        return LiveRegion(self.view, self._rows, self._measure, style)

    @property
    def has_display(self) -> bool:
        """Whether there is a live display: on a terminal or in a notebook."""
        return self._live is not None

    def watch(self, callbacks: Iterable[Callback], state: TrainState) -> None:
        """Show the metrics that callbacks watch on the live display, with their best.

        Args:
            callbacks: The callbacks of the run, without decorators.
            state: The state in which the run begins.
        """
        self.view.watch(callbacks, state)

    def observe(self, state: TrainState, event: Event) -> None:
        """Pass the newest iteration to the live display; called at every event if there is one, so it has to be cheap.

        Without a live display, only events with a line have to be observed, and the console does that itself.
        """
        self.view.newest = state.iteration, state.epoch_start
        if event.run is not self._run or type(event) is AfterTraining:
            self._begin_or_end(event)

    def _begin_or_end(self, event: Event) -> None:
        """Show the live display from the first event of a run to its last."""
        if isinstance(event, AfterTraining):
            self._run = None
            if self._live is not None:
                with suppress(OSError, ValueError):  # the terminal is closed: the next line reports it
                    self._live.stop()
            return
        self._run = event.run
        self.view.begin(event.run)
        self._label_width = max(LABEL_WIDTH, len(str(known_end(self.view.run) or "")))
        if self._live is not None and not isinstance(event, AtEval):
            self._live.start()

    def track(self, iterable: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
        """Yield the items of an iterable; the live display shows their progress if they take more than half a second.

        Args:
            iterable: The items.
            description: What is done with the items, such as `evaluating val`.
            total: The number of items; None takes `len(iterable)` if it has one.
        """
        if self._live is None:
            yield from iterable
            return
        task = TaskView(description, _length_of(iterable) if total is None else total)
        is_first = not self._live.is_running
        self.view.tasks.append(task)
        self._live.start()
        try:
            for item in iterable:
                yield item
                task.done += 1
        finally:
            self.view.tasks.remove(task)
            if is_first and self._run is None:
                self._live.stop()

    def write_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Write a text, unless it is progress that the live display shows: the handler of `LogText`."""
        if effect.is_progress and self._live is not None and self._live.is_shown:
            return
        text = escape_controls(effect.text.replace("\r\n", "\n"), keep="\n\t")
        self._write_lines(text.splitlines() or [""], state, event)

    def write_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Write metrics as one line of columns: a handler of `LogScalars`."""
        has_display = self._live is not None and self._live.is_running
        interval_s = _LIVE_UPDATE_INTERVAL_S if has_display and not has_other_bar() else _UPDATE_INTERVAL_S
        is_early = self._is_early(event, interval_s)
        if is_early and self._live is None:  # the values of most updates go to no line and no display
            return
        loud = {key: value for key, value in sorted(effect.values.items()) if key not in effect.quiet}
        metrics = {key: value for key, value in loud.items() if not repeats_single_loss(key, loud)}
        if self._live is not None:
            self.view.log(metrics, state.iteration)
        if is_early or not metrics:
            return
        if isinstance(event, AfterUpdate):
            self._last_update_s = event.time_s
        if not has_display:
            self._write_lines([format_line(metrics)], state, event)
        elif self._changed is not None and (
            line := self._changed.describe(metrics, self._console.width - self._label_width - 2)
        ):
            self._write_lines([line], state, event)

    def write_updates(self, effect: LogUpdates, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        """Write the metrics of several updates as `write_scalars` at each of them: a handler of `LogUpdates`."""
        for row in effect.rows:
            if self._live is None and self._is_early(row.event, _UPDATE_INTERVAL_S):
                continue  # before objects are made for an update without a line
            self.write_scalars(effect.scalars_of(row), state.replace(iteration=row.iteration), row.event)

    def _is_early(self, event: Event, interval_s: float) -> bool:
        """Return whether the line of an update would follow the one before within an interval."""
        # A loop that sets no time on its events gets every line. The difference is negative if the clock was set back.
        return (
            isinstance(event, AfterUpdate)
            and bool(event.time_s)
            and 0 <= event.time_s - self._last_update_s < interval_s
        )

    def show_progress(self, effect: ShowProgress, state: TrainState, event: Event) -> None:
        """Show progress on the live display, or write a line if the effect is due: the handler of `ShowProgress`."""
        if self._live is None:
            if effect.due:
                self._write_lines([describe_progress(effect, state)], state, event)
            return
        self._live.raise_error()
        self.view.progress = None if isinstance(event, AfterTraining) else effect

    def print_above(self, renderable: RenderableType) -> None:
        """Print anything that rich can render, such as a table, above the live display; text is never markup."""
        if isinstance(renderable, str):
            self._print(renderable)
            return
        with self._at_line_start():
            self._console.print(renderable, markup=False, emoji=False)

    @property
    def shows_panels(self) -> bool:
        """Whether panels have a border and colours: on a terminal and in a notebook."""
        return self._console.is_jupyter or (self._is_terminal and not self._console.is_dumb_terminal)

    def write_panel(self, panel: RunPanel) -> None:
        """Write a panel, and remove the live display until the next event."""
        self._run = None  # the next event shows the display again
        if self._live is not None:
            self._live.stop()
        if not self.shows_panels or self._console.quiet:
            self._print("\n".join(plain_lines(panel)))
            return
        with self._at_line_start():
            if (output := choose_output(self._console.file)) is self._console.file:
                self._print_panel(panel)
                return
            with self._console.capture() as captured:
                self._print_panel(panel)
            output.write(captured.get())  # above a bar of rich

    def _print_panel(self, panel: RunPanel) -> None:
        self._console.print(panel, soft_wrap=False)
        for line in command_lines(panel, self._console.width):
            self._console.print(line, soft_wrap=True)

    def write_notice(self, text: str) -> None:
        """Write a line at once, from any thread; a terminal may have echoed ^C before it."""
        begin = "\n" if self._is_terminal and not self._rows.are_shown else ""
        self._print(begin + escape_controls(text))

    def close(self) -> None:
        """Stop the heartbeat, and remove the live display."""
        self._stop_heartbeat()
        self._run = None
        if self._live is not None:
            self._live.stop()

    def _write_lines(self, lines: Sequence[str], state: TrainState, event: Event) -> None:
        """Write lines with the iteration, and start the heartbeat if training continues after the event."""
        if self._live is None:
            self.observe(state, event)
        text = add_label(state, lines, self._label_width)
        self._print(text)
        if isinstance(event, AfterTraining):
            self._stop_heartbeat()
            return
        self._last_lines = text, monotonic()
        if self._timer is None:  # a running timer sees the new lines; a thread for each line would cost more
            self._start_timer(_HEARTBEAT_S)

    def _print(self, lines: str) -> None:
        """Print a text; markup in it, such as `[bold]` or `:100:`, is not interpreted."""
        if self._console.quiet:  # the proxy of a bar of rich would print the text all the same
            return
        if self._is_plain and self._live is None and not has_other_bar():  # the lines of most jobs
            write_unbuffered(self._console.file, f"{self._expand_tabs(lines)}\n")
            return
        with self._at_line_start():
            output = choose_output(self._console.file)
            if self._live is not None and self._is_terminal:  # the width of a dumb terminal is not known
                lines = wrap_texts(lines, self._console.width, self._label_width + 1)
            if not self._is_plain and output is self._console.file:
                encoding = self._console.encoding
                lines = lines.encode(encoding, "backslashreplace").decode(encoding)
                self._console.print(lines, markup=False, emoji=False)
                return
            write_unbuffered(output, f"{self._expand_tabs(lines)}\n")

    def _expand_tabs(self, lines: str) -> str:
        """Return lines with tabs as spaces and without control characters, as rich writes them."""
        if lines.isprintable():
            return lines
        text = Text(lines)
        text.expand_tabs(self._console.tab_size)
        return text.plain

    @contextmanager
    def _at_line_start(self) -> Iterator[None]:
        """Make the output of the block begin at the start of a line, above the bars of other libraries."""
        if self._live is not None:
            self._live.raise_error()
        with hide_other_bars(sys.stdout):
            if self._rows.are_shown:
                self._console.file.write(self._rows.start_line())
            yield

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


def _length_of(iterable: Any) -> int | None:
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):  # a stream
        return None


def _measure(console: RichConsole) -> tuple[int, int]:
    return console.width, console.height


def _stop(live: LiveRegion) -> None:
    with suppress(OSError, ValueError):  # the terminal is closed
        live.stop()
