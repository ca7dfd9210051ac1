"""Errors of a configuration: every problem at once, each with the place where the setting was written."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from cattrs import IterableValidationNote
from cattrs.errors import BaseValidationError, ClassValidationError, StructureHandlerNotFoundError

from noether.core.errors import NoetherError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SettingPath: TypeAlias = tuple[str | int, ...]
"""Keys of mappings and indices of lists, from the top of a document to a value."""


@dataclass(frozen=True)
class Place:
    """The file and line where a setting was written.

    Args:
        origin: The file as the user named it, or the text of a `--set`.
        line: Line in that file, counted from 1; None for a `--set`.

    Example:
        >>> print(Place("configs/digits.yaml", 12))
        configs/digits.yaml:12
    """

    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return self.origin if self.line is None else f"{self.origin}:{self.line}"


@dataclass(frozen=True)
class LocatedProblem:
    """A problem of one setting: where the setting was written, what is wrong and what to write instead.

    Example:
        >>> print(LocatedProblem(Place("a.yaml", 3), ("callbacks", 2, "every_n_epochs"), "0 is not a whole number"))
        a.yaml:3: callbacks[2].every_n_epochs: 0 is not a whole number
    """

    place: Place
    path: SettingPath
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, [str(self.place), format_path(self.path), self.message]))


class ConfigError(NoetherError):
    """A configuration is invalid; `problems` lists every problem in the order of their lines.

    Example:
        >>> early = LocatedProblem(Place("a.yaml", 2), ("a",), "early")
        >>> late = LocatedProblem(Place("a.yaml", 7), ("b",), "late")
        >>> raise ConfigError([late, early])
        Traceback (most recent call last):
        noether.config.errors.ConfigError: a.yaml:2: a: early
        a.yaml:7: b: late
    """

    def __init__(self, problems: Iterable[LocatedProblem]) -> None:
        # Overrides on the command line have no line; they come after the settings of the file.
        self.problems = tuple(sorted(problems, key=lambda each: (each.place.line is None, each.place.line or 0)))
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,), vars(self)


def error_at(place: str, message: str) -> ConfigError:
    """Return the error of one problem outside of a configuration file, such as one of a command-line option.

    Args:
        place: Where the problem is: an option with its value, or a path.
        message: What is wrong, and what to write instead.

    Example:
        >>> print(error_at("--to model.pt", "the name must end in .safetensors; write model.safetensors"))
        --to model.pt: the name must end in .safetensors; write model.safetensors
    """
    return ConfigError([LocatedProblem(Place(place), (), message)])


def format_path(path: SettingPath) -> str:
    """Return `path` as messages show it.

    Example:
        >>> format_path(("callbacks", 2, "every_n_epochs"))
        'callbacks[2].every_n_epochs'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


class InvalidValueError(NoetherError, ValueError):
    """A value does not fit its setting; the message quotes the value and says what to write instead."""


class NamedObjectError(InvalidValueError):
    """The object at a dotted path cannot be used; reported even if a constructor refuses the path as a value, too."""


@contextmanager
def collect_errors(errors: list[Exception], part: str | int | None = None) -> Iterator[None]:
    """Append an exception of the body to `errors`, located in `part`: a key of a mapping or an index of a list."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a constructor raises is a problem of its settings
        if part is not None:
            error.add_note(IterableValidationNote(f"in {part!r}", part, Any))
        errors.append(error)


def raise_together(errors: Sequence[Exception], target: object) -> None:
    """Raise all errors in the settings of `target` as one error; return if there are no errors."""
    if errors:
        raise ClassValidationError("settings", errors, target if isinstance(target, type) else type(target))


def location(error: BaseException) -> SettingPath:
    """Return the path at which `collect_errors` located an error."""
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, IterableValidationNote)]
    return tuple(note.index for note in reversed(notes))


def problems_in(error: BaseException) -> Iterator[tuple[SettingPath, str]]:
    """Yield the path and the message of every problem in a tree of errors."""
    path = location(error)
    problems: Iterable[tuple[SettingPath, str]]
    if isinstance(error, BaseValidationError):
        problems = (problem for each in error.exceptions for problem in problems_in(each))
    elif isinstance(error, SettingsError):
        problems = [(parse_path(each.setting), each.message) for each in error.problems]
    elif isinstance(error, StructureHandlerNotFoundError):
        problems = [((), f"a {type_name(error.type_)} cannot be written in YAML")]
    elif isinstance(error, ValueError | TypeError) and str(error):
        problems = [((), str(error))]
    else:
        problems = [((), f"{type(error).__name__}: {error}")]
    return ((path + inner, message) for inner, message in problems)


def parse_path(setting: str) -> SettingPath:
    """Return the dotted name of a setting as a path; numbers are indices of lists."""
    return tuple(int(part) if part.isdecimal() else part for part in setting.split(".") if part)


def type_name(kind: object) -> str:
    """Return the name of a type for a message."""
    return getattr(kind, "__qualname__", None) or str(kind)
