"""What happens where a run is closed: loops record how they ended, and then the panel of the end is written."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.effects.console.run_panels import RunPanel

    Leave = Callable[[BaseException | None], None]


@final
class RunExit:
    """Calls loops as a run is closed, and keeps the panel of its end until then.

    Inside of a `with` block, only the end of the block tells whether an exception ended the loop, and only there are
    the bars of other libraries complete.

    Args:
        write_panel: Writes a panel.

    Example:
        >>> from noether.effects.console.run_panels import RunPanel
        >>> run_exit = RunExit(lambda panel: print(panel.title))
        >>> run_exit.show(lambda: RunPanel(title="now"))
        now
        >>> run_exit.is_awaited = True
        >>> for title in ("replaced", "at the end"):
        ...     run_exit.show(lambda: RunPanel(title=title), at_exit=True)
        >>> run_exit(None)
        at the end
    """

    def __init__(self, write_panel: Callable[[RunPanel], None]) -> None:
        self._write_panel = write_panel
        self._functions: list[weakref.WeakMethod[Leave]] = []
        self._panel: RunPanel | None = None
        self.is_awaited = False
        """Whether a `with` block certainly closes the run."""

    def add(self, function: Leave) -> None:
        """Call a method as the run is closed, with the exception that leaves the `with` block, or None.

        Args:
            function: A bound method; its object is referenced weakly, because it may refer to the run.
        """
        reference = weakref.WeakMethod(function)
        if reference not in self._functions:
            self._functions.append(reference)

    def show(self, describe: Callable[[], RunPanel], *, at_exit: bool = False) -> None:
        """Write a panel, after the one that waits.

        Args:
            describe: Returns the panel; called now.
            at_exit: Whether the panel replaces the one that waits, and is written as the run is closed; without a
                `with` block it is written now.
        """
        panel = describe()
        if not at_exit:
            self.write()
        self._panel = panel
        if not (at_exit and self.is_awaited):
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
