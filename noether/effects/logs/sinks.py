"""Logs never stop what they log: a sink that fails says so once, and what it lost is counted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, ParamSpec, final

from noether.core.effect import LogScalars, LogText, SaveTensors, SetSummary, ShowProgress

if TYPE_CHECKING:
    from collections.abc import Callable

_LOGGER: Final = logging.getLogger(__name__)
_Arguments = ParamSpec("_Arguments")

LOGGED: Final = (LogScalars, LogText, SetSummary, ShowProgress, SaveTensors)
"""Types of effects that ask for logs; their handlers write to sinks."""


@final
class Sinks:
    """Wherever the logs of a run go, by name.

    Example:
        >>> def full(line):
        ...     raise OSError(28, "No space left on device")
        >>> sinks = Sinks()
        >>> write = sinks.guarded("metrics.jsonl", full)
        >>> write("a line"), write("another")
        (None, None)
        >>> sinks.failures
        {'metrics.jsonl': 2}
    """

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}

    def guarded(self, name: str, write: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        """Return a function that does as `write`, and never raises: the first error is told, the others are counted.

        Args:
            name: What the sink is called where it fails.
            write: Gives something to the sink.
        """

        def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  # whatever a sink meets, training goes on
                self.failures[name] = self.failures.get(name, 0) + 1
                if self.failures[name] == 1:
                    what = f"{type(error).__name__}: {error}"
                    _LOGGER.warning("%s failed, and what it was given is lost; training goes on: %s", name, what)

        return guarded

    def tell(self) -> None:
        """Say how much was lost in all, where it is more than what was told of at once."""
        for name, count in self.failures.items():
            if count > 1:
                _LOGGER.warning("%s failed %d times in all", name, count)
