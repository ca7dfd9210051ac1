"""Interruption of a run by SIGINT or SIGTERM: the loop saves at the next update and returns."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any, Final, Self, final

if TYPE_CHECKING:
    from types import FrameType, TracebackType

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@final
class Interruption:
    """Catches the first SIGINT or SIGTERM inside a `with` block; only in the main thread, where Python allows it.

    Args:
        second_kills: Whether a second signal ends the process at once. By default the handlers that were installed
            before the block receive it: usually a second Ctrl-C raises KeyboardInterrupt.

    Example:
        >>> with Interruption() as interruption:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     interruption(), interruption.exit_code
        (True, 143)
    """

    def __init__(self, *, second_kills: bool = False) -> None:
        self._second_kills = second_kills
        self._received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether a signal was received."""
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a process that the signal ends: 130 for SIGINT, 143 for SIGTERM; 0 without a signal."""
        return 0 if self._received is None else 128 + self._received

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # signature of signal handlers
        self._received = number
        if self._second_kills:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        else:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
