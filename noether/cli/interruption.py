"""A signal asks the loop to save and leave; a second one ends the process at once."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Final, Self, final

if TYPE_CHECKING:
    from types import FrameType, TracebackType

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@final
class Interruption:
    """Catches the first SIGINT or SIGTERM while it is entered.

    Example:
        >>> with Interruption() as interruption:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     interruption(), interruption.exit_code
        (True, 143)
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether a signal came."""
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """What a process that a signal ended exits with: 130 for SIGINT, 143 for SIGTERM, 0 without one."""
        return 0 if self._received is None else 128 + self._received

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # a signal handler takes both
        self._received = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
