"""Callbacks written as functions: how settings from YAML become their gate and their keyword arguments."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from noether.config.errors import InvalidValueError
from noether.config.structure.signatures import parameters
from noether.core.schedules.schedule import INTERVALS

if TYPE_CHECKING:
    from collections.abc import Callable


@final
@dataclass(frozen=True)
class FunctionCallbackFactory:
    """Makes a callback from a function: an interval becomes its gate, keyword-only parameters are its settings.

    Args:
        function: `(state, event, *, setting, ...) -> (state, effects)`, decorated or not.

    Raises:
        InvalidValueError: If one of its settings has the name of an interval.

    Example:
        >>> from noether import AfterEpoch, LogText, TrainState
        >>> def greet(state, event, *, greeting: str = "hello"):
        ...     return state, (LogText(greeting),)
        >>> callback = FunctionCallbackFactory(greet)(every_n_epochs=1, greeting="good morning")
        >>> callback(TrainState().next_epoch(), AfterEpoch())[1]
        (LogText(text='good morning'),)
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        for each in self._settings:
            if each.name in (*INTERVALS, "at_end"):
                raise InvalidValueError(
                    f"the parameter {each.name} of the function has the name of an interval setting; rename it"
                )

    @property
    def __signature__(self) -> inspect.Signature:
        """The interval and the function's settings, with their types."""
        gate = inspect.signature(type(self).__call__).parameters
        return inspect.Signature([*(gate[name] for name in (*INTERVALS, "at_end")), *self._settings])

    @property
    def _settings(self) -> list[inspect.Parameter]:
        # Decorators of noether pass settings on; one of the user is called with them, so its own signature counts.
        function = inspect.unwrap(self.function, stop=lambda each: isinstance(each, types.FunctionType))
        named = parameters(function).values()
        return [each for each in named if each.kind is each.KEYWORD_ONLY]

    def __call__(
        self,
        *,
        every_n_epochs: int | None = None,
        every_n_updates: int | None = None,
        every_n_samples: int | None = None,
        at_end: bool = False,
        **settings: object,
    ) -> Any:
        """Return the callback with its settings bound, behind the gate of its interval if there is one."""
        intervals = {
            "every_n_epochs": every_n_epochs,
            "every_n_updates": every_n_updates,
            "every_n_samples": every_n_samples,
        }
        chosen = {name: value for name, value in intervals.items() if value is not None}
        if len(chosen) > 1:
            raise InvalidValueError(f"{' and '.join(chosen)} are given; give at most one of them")
        if not chosen and at_end:
            raise InvalidValueError("at_end needs an interval: every_n_epochs, every_n_updates or every_n_samples")
        # Imported here, because it imports torch and a configuration can be read without it.
        from noether.core import combinators
        from noether.core.wrappers import bind_settings

        callback = bind_settings(self.function, settings) if settings else self.function
        for name, value in chosen.items():
            callback = getattr(combinators, name)(value, at_end=at_end)(callback)
        return callback
