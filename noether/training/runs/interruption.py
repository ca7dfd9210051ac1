"""Interruption by a signal or a time limit: the loop saves at the next update, or in an evaluation at the next batch.

A signal while the run waits for a process that loads samples ends the wait.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, Self, final

from noether.session.timing import Clock
from noether.training.data.interruptible import WAITING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType, TracebackType

SIGNALS: Final[tuple[signal.Signals, ...]] = tuple(
    each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")
)
TIME_LIMIT_CODE: Final = 75
"""Exit code of a process that a time limit ended: EX_TEMPFAIL, at which job scripts start it again."""
_HOUR_S: Final = 3600.0
_CLOCK: Final = Clock()


@final
class Interruption:
    """Catches the first SIGINT, SIGTERM or SIGHUP in a `with` block, and knows whether a time limit has passed.

    It catches signals only in the main thread, where Python allows it. A SIGHUP that the process ignores, as under
    `nohup`, stays ignored. Processes that are forked inside the block have the handlers from before it.

    Args:
        second_kills: Whether a second signal ends the process at once. By default the handlers that were installed
            before the block receive it: usually a second Ctrl-C raises KeyboardInterrupt, also if it was ignored.
        clock: Reads the time, which counts from here.

    Example:
        >>> with Interruption() as interruption:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     interruption(), interruption.exit_code
        (True, 143)
    """

    def __init__(self, *, second_kills: bool = False, clock: Clock = _CLOCK) -> None:
        self._second_kills = second_kills
        self._received: int | None = None
        self._elapsed_s, self._began_s = clock.elapsed_s, clock.elapsed_s()
        self._max_hours: float | None = None
        self._counts_time = True
        self._is_time_over = False
        self.is_restarted = False
        """Whether the time counts from the start of an earlier process."""
        self.announce: Callable[[str], None] = lambda text: None  # noqa: ARG005  # names the argument
        """Says once what the interruption does; called in another thread after a signal."""
        self._outer = WAITING.interrupted  # of an enclosing block
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether a signal was received or the time is over."""
        if self._received is None and self._max_hours is not None and self._counts_time:
            was_over = self._is_time_over
            self._is_time_over = was_over or self._elapsed_s() - self._began_s >= self._max_hours * _HOUR_S
            if self._is_time_over and not was_over:
                self.announce(f"{self.reason}: stopping, and saving the run")
        return self._received is not None or self._is_time_over

    def limit_time(self, hours: float | None, *, counts: bool = True) -> None:
        """Interrupt once the hours since this object was made have passed; None sets no limit.

        Args:
            hours: The hours.
            counts: Whether this process decides; of several ranks only rank 0 does, because their clocks differ.

        Example:
            >>> seconds = iter([0.0, 1799.0, 1800.0])
            >>> interruption = Interruption(clock=Clock(elapsed_s=lambda: next(seconds)))
            >>> interruption.limit_time(0.5)
            >>> interruption(), interruption(), interruption.exit_code, interruption.reason
            (False, True, 75, 'trainer.max_hours (0.5) has passed')
        """
        self._max_hours, self._counts_time = hours, counts

    def count_from(self, passed_s: float) -> None:
        """Count the time from the start of a process that this one replaces, after a restart by torchrun.

        Args:
            passed_s: Seconds since that start; 0 if this process replaces none.

        Example:
            >>> interruption = Interruption(clock=Clock(elapsed_s=lambda: 10.0))
            >>> interruption.count_from(3600.0)
            >>> interruption.limit_time(1)
            >>> interruption()
            True
        """
        self._began_s = min(self._began_s, self._elapsed_s() - passed_s)
        self.is_restarted = self.is_restarted or passed_s > 0

    def agree_on_reason(self, gather: Callable[[str, Any], Sequence[Any]]) -> None:
        """Take the reason of the first rank that has one, so that all ranks end with the same exit code.

        Args:
            gather: As `Run.gather`; all ranks call this at the same point.
        """
        reasons = gather("reasons of the interruption", (self._received, self._is_time_over))
        self._received, self._is_time_over = next((each for each in reasons if any(each)), (None, False))

    @property
    def is_signal(self) -> bool:
        """Whether a signal was received."""
        return self._received is not None

    @property
    def is_time_over(self) -> bool:
        """Whether the time was over before a signal was received."""
        return self._is_time_over

    @property
    def reason(self) -> str:
        """Why the run is interrupted, if it is not for a signal; empty for a signal."""
        return f"trainer.max_hours ({self._max_hours:g}) has passed" if self._is_time_over else ""

    @property
    def exit_code(self) -> int:
        """The exit code: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP, 75 if the time is over, or 0."""
        if self._is_time_over:
            return TIME_LIMIT_CODE
        return 0 if self._received is None else 128 + self._received

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._catch)
            _ACTIVE.add(self)
            self._outer, WAITING.interrupted = WAITING.interrupted, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self in _ACTIVE:
            _ACTIVE.discard(self)
            WAITING.interrupted = self._outer
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Install the handlers from before the block."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # signature of signal handlers
        self._received = number
        if self._second_kills:
            for each in self._previous:
                signal.signal(each, signal.SIG_DFL)
        else:
            self.restore_handlers()
            if signal.getsignal(number) is signal.SIG_IGN:  # as SIGINT is where a script starts the process with `&`
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        # In another thread, because this one may hold the locks of the stream.
        _thread.start_new_thread(self.announce, (self._describe_signal(number),))
        WAITING.leave()

    def _describe_signal(self, number: int) -> str:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return f"{name}: stopping after this update and saving; again: end now without saving"


_ACTIVE: Final[weakref.WeakSet[Interruption]] = weakref.WeakSet()


def _restore_in_child() -> None:
    for interruption in _ACTIVE:
        interruption.restore_handlers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_in_child)
