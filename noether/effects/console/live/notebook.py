"""A live display in a notebook: one output that is updated, and stays as it is at the end."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class NotebookRows:
    """Lines in one output of the cell that runs."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def are_shown(self) -> bool:
        """Whether lines are in the output."""
        return self._handle is not None

    def draw(self, lines: Sequence[str]) -> None:
        """Draw the lines in place of those before."""
        from IPython.display import display  # only notebooks have it

        text = "\n".join(lines).rstrip()
        content = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def remove(self) -> None:
        """Leave the last lines readable; the next `draw` begins another output."""
        self._handle = None
