"""What is wrong with a configuration: every problem at once, each with the place where it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Iterable

SettingPath: TypeAlias = tuple[str | int, ...]
"""The way from the top of a document to a value: keys of mappings and indices of lists."""


@dataclass(frozen=True)
class Place:
    """Where a setting was written.

    Args:
        origin: The file as the user named it, or the text of a `--set`.
        line: Line in that file, counted from 1; None where there are no lines.

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
    """One problem: where it was written, which setting it is about, what is wrong and what would be right.

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
    """A configuration was refused; `problems` holds every one of them, in the order of their lines.

    Example:
        >>> early = LocatedProblem(Place("a.yaml", 2), ("a",), "early")
        >>> late = LocatedProblem(Place("a.yaml", 7), ("b",), "late")
        >>> raise ConfigError([late, early])
        Traceback (most recent call last):
        noether.config.errors.ConfigError: a.yaml:2: a: early
        a.yaml:7: b: late
    """

    def __init__(self, problems: Iterable[LocatedProblem]) -> None:
        # What was given on the command line comes after what stands in the file.
        self.problems = tuple(sorted(problems, key=lambda each: (each.place.line is None, each.place.line or 0)))
        super().__init__("\n".join(map(str, self.problems)))


def format_path(path: SettingPath) -> str:
    """Return `path` as it is shown.

    Example:
        >>> format_path(("callbacks", 2, "every_n_epochs"))
        'callbacks[2].every_n_epochs'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
