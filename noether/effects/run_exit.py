"""Actions as a run is closed: its loops record how they ended, and then the panel of the end is written."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.effects.console.run_panels import RunPanel

    OnExit = Callable[[BaseException | None], None]


@final
class RunExit:
    """Calls methods of loops as a run is closed, and writes the panel of the end after them.

    The panel waits for the end of the `with` block of a run, because only there it is known whether an exception ended
    the loop, and bars of other libraries are complete.

    Args:
        write_panel: Writes a panel.

    Example:
        >>> from noether.effects.console.run_panels import RunPanel
        >>> run_exit = RunExit(lambda panel: print(panel.title))
        >>> run_exit.show(lambda: RunPanel(title="now"))
        now
        >>> run_exit.has_with_block = True
        >>> for title in ("replaced", "at the end"):
        ...     run_exit.show(lambda: RunPanel(title=title), at_exit=True)
        >>> run_exit(None)
        at the end
    """

    def __init__(self, write_panel: Callable[[RunPanel], None]) -> None:
        self._write_panel = write_panel
        self._functions: list[weakref.WeakMethod[OnExit]] = []
        self._panel: RunPanel | None = None
        self.has_with_block = False
        """Whether the run is open in a `with` block, whose end closes it."""

    def add(self, function: OnExit) -> None:
        """Call a method as the run is closed, with the exception that leaves the `with` block, or None.

        Args:
            function: A bound method; its object is referenced weakly, because it may refer to the run.
        """
        reference = weakref.WeakMethod(function)
        if reference not in self._functions:
            self._functions.append(reference)

    def show(self, describe: Callable[[], RunPanel], *, at_exit: bool = False) -> None:
        """Write a panel now, or keep it until the run is closed.

        Args:
            describe: Returns the panel; it is called at once.
            at_exit: Whether the panel is written as the run is closed, in place of one that waits already. Without a
                `with` block it is written now. A panel that is not `at_exit` comes after one that waits.
        """
        panel = describe()
        if not at_exit:
            self.write()
        self._panel = panel
        if not (at_exit and self.has_with_block):
            self.write()

    def write(self) -> None:
        """Write the panel that waits, if there is one."""
        panel, self._panel = self._panel, None
        if panel is not None:
            self._write_panel(panel)

    def __call__(self, error: BaseException | None) -> None:
        """Call the methods, and write the panel that waits."""
        functions, self._functions = self._functions, []
        try:
            for reference in functions:
                if (function := reference()) is not None:
                    function(error)
        finally:
            self.write()
