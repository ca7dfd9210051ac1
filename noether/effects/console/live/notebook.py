"""The live display in a notebook: one output of a cell, which is updated in place and keeps its last lines."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class NotebookRows:
    """Draws lines in one output of the running cell."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def are_shown(self) -> bool:
        """Whether lines are in the output."""
        return self._handle is not None

    def draw(self, lines: Sequence[str]) -> None:
        """Draw the lines in place of the previous ones."""
        from IPython.display import display  # only notebooks have it

        text = "\n".join(lines).rstrip()
        content = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def remove(self) -> None:
        """Keep the last lines as they are; the next `draw` begins another output."""
        self._handle = None
