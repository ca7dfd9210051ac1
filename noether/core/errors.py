"""The base of noether's exceptions, and problems of settings as data.

A `Problem` is raised in Python as a `SettingsError`; for a YAML file, file and line are added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterable


class NoetherError(Exception):
    """The base class of every exception that noether defines.

    Each one also derives from the builtin exception that fits, such as `ValueError`.

    Example:
        >>> from noether import EveryNEpochs, NoetherError
        >>> try:
        ...     EveryNEpochs(0)
        ... except NoetherError as error:
        ...     print(error)
        every_n_epochs: 0 is not a whole number of at least 1
    """


@dataclass(frozen=True)
class Problem:
    """Why one setting is refused.

    Args:
        setting: Name of the setting, dotted if nested; empty if the problem concerns the whole object.
        message: The value, and what to write instead.

    Example:
        >>> print(Problem("tolerance", "0 is not a whole number of at least 1"))
        tolerance: 0 is not a whole number of at least 1
    """

    setting: str
    message: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.message}" if self.setting else self.message


class SettingsError(NoetherError, ValueError):
    """One or more settings are invalid; `problems` lists each of them.

    Example:
        >>> raise SettingsError([Problem("keep", "-1 is not a whole number of at least 1")])
        Traceback (most recent call last):
        noether.core.errors.SettingsError: keep: -1 is not a whole number of at least 1
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,), vars(self)


class CallbackError(NoetherError, TypeError):
    """An object cannot be used as a callback, or a callback returned something else than a state and its effects."""


class OutputError(NoetherError, LookupError):
    """The model does not return an output that a callback reads."""


class WeightsError(NoetherError, LookupError):
    """A callback or command names weights that no callback stores."""


class StateWarning(UserWarning):
    """A state lacks something that the live model or optimizer has, or a model lacks something that was saved."""


def raise_problems(problems: Iterable[Problem | None]) -> None:
    """Raise all problems as one error; do nothing if every entry is None.

    Raises:
        SettingsError: If any of `problems` is not None.
    """
    found = [problem for problem in problems if problem is not None]
    if found:
        raise SettingsError(found)


def check_whole(setting: str, value: object, *, at_least: int = 1) -> Problem | None:
    """Return the problem if `value` is not a whole number, else None; True and 2.0 are not whole numbers.

    Example:
        >>> print(check_whole("every_n_epochs", 2.7))
        every_n_epochs: 2.7 is not a whole number of at least 1
        >>> check_whole("every_n_epochs", 2)
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return None
    return Problem(setting, f"{value!r} is not a whole number of at least {at_least}")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is an int or a float; True and False are not numbers.

    Example:
        >>> is_number(0.5), is_number(True), is_number("0.5")
        (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_choice(setting: str, value: object, choices: Iterable[str]) -> Problem | None:
    """Return the problem if `value` is not one of `choices`, naming the nearest choice, else None.

    Example:
        >>> print(check_choice("mode", "hihger", ["higher", "lower"]))
        mode: 'hihger' is not one of 'higher', 'lower'; did you mean 'higher'?
    """
    names = list(choices)
    if value in names:
        return None
    return Problem(setting, f"{value!r} is not one of {', '.join(map(repr, names))}{suggest(str(value), names)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the nearest known name, or an empty string if none is near.

    Example:
        >>> suggest("toleranse", ["tolerance", "mode"])
        "; did you mean 'tolerance'?"
    """
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class CallNote(str):
    """A note on an error of the user's model, loss or metric, which says what failed."""

    __slots__ = ()
