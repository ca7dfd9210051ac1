"""Callbacks that are functions, as things to be made of settings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from noether.config.schema import INTERVALS
from noether.config.structure import InvalidValueError, parameters

if TYPE_CHECKING:
    from collections.abc import Callable


@final
@dataclass(frozen=True)
class FunctionCallbackFactory:
    """Makes a callback of a function: an interval becomes its gate, its keyword-only parameters are its settings.

    Args:
        function: `(state, event, *, setting, ...) -> (state, effects)`, decorated or not.

    Raises:
        InvalidValueError: If one of its settings has the name of an interval.

    Example:
        >>> from noether import AfterEpoch, LogText, TrainState
        >>> def greet(state, event, *, greeting: str = "hello"):
        ...     return state, (LogText(greeting),)
        >>> callback = FunctionCallbackFactory(greet)(every_n_epochs=1, greeting="go on")
        >>> callback(TrainState().next_epoch(), AfterEpoch())[1]
        (LogText(text='go on'),)
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        taken = [each.name for each in self._settings if each.name in (*INTERVALS, "at_end")]
        if taken:
            raise InvalidValueError(f"{taken[0]} beside a function is its interval; give its own setting another name")

    @property
    def __signature__(self) -> inspect.Signature:
        """The interval and the function's settings, with their types."""
        gate = inspect.signature(type(self).__call__).parameters
        return inspect.Signature([*(gate[name] for name in (*INTERVALS, "at_end")), *self._settings])

    @property
    def _settings(self) -> list[inspect.Parameter]:
        own = parameters(inspect.unwrap(self.function)).values()
        return [each for each in own if each.kind is each.KEYWORD_ONLY]

    def __call__(
        self,
        *,
        every_n_epochs: int | None = None,
        every_n_updates: int | None = None,
        every_n_samples: int | None = None,
        at_end: bool = False,
        **settings: object,
    ) -> Any:
        """Return the callback with its settings, behind the gate of an interval if there is one."""
        intervals = {
            "every_n_epochs": every_n_epochs,
            "every_n_updates": every_n_updates,
            "every_n_samples": every_n_samples,
        }
        chosen = {name: value for name, value in intervals.items() if value is not None}
        if len(chosen) > 1:
            raise InvalidValueError(f"{' and '.join(chosen)} are given; expected one of them, or none")
        if not chosen and at_end:
            raise InvalidValueError("at_end needs an interval: every_n_epochs, every_n_updates or every_n_samples")
        # Here, because it brings torch, without which a configuration can be read. Intervals have its names.
        from noether.core import combinators

        callback = combinators.bound(self.function, settings) if settings else self.function
        for name, value in chosen.items():
            callback = getattr(combinators, name)(value, at_end=at_end)(callback)
        return callback
