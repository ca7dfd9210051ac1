"""The position of a run: counts of completed epochs, updates and samples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, Self, get_args

from noether.core.errors import Problem, check_whole, raise_problems

Counter = Literal["epoch", "update", "sample"]
COUNTERS: Final[tuple[Counter, ...]] = get_args(Counter)
LETTERS: Final[dict[Counter, str]] = {"epoch": "E", "update": "U", "sample": "S"}

# Python converts at most 4300 digits to an int.
_TEXT: Final = re.compile(
    r"(?:E(?P<epoch>\d{1,4300}))?_?(?:U(?P<update>\d{1,4300}))?_?(?:S(?P<sample>\d{1,4300}))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class TrainingIteration:
    """Counts of completed epochs, updates and samples.

    It also names a point of a run: `TrainingIteration(update=1000)` is the point after 1,000 updates, in any epoch.

    Args:
        epoch: Completed epochs, >= 0.
        update: Completed optimizer updates, >= 0.
        sample: Completed training samples, >= 0.

    Raises:
        SettingsError: If a count is not a whole number >= 0.

    Example:
        >>> str(TrainingIteration(epoch=10, update=200, sample=800))
        'E10_U200_S800'
        >>> TrainingIteration(update=199).advance(samples=4)
        TrainingIteration(epoch=0, update=200, sample=4)
    """

    epoch: int = 0
    update: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        # This runs at every update, so one test covers the common case.
        whole_numbers = type(self.epoch) is type(self.update) is type(self.sample) is int
        if not (whole_numbers and self.epoch >= 0 and self.update >= 0 and self.sample >= 0):
            raise_problems(check_whole(name, getattr(self, name), at_least=0) for name in COUNTERS)

    def __str__(self) -> str:
        return f"E{self.epoch}_U{self.update}_S{self.sample}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the iteration that `text` names: the inverse of `str`, except that counters may be left out.

        Args:
            text: Like `E10_U200_S800`, or a point on one counter like `U1000`.

        Raises:
            SettingsError: If `text` has another form.

        Example:
            >>> TrainingIteration.parse("U1000")
            TrainingIteration(epoch=0, update=1000, sample=0)
        """
        match = _TEXT.fullmatch(text)
        counts = {name: int(digits) for name, digits in match.groupdict().items() if digits} if match else {}
        given = "_".join(f"{LETTERS[name]}{counts[name]}" for name in COUNTERS if name in counts)
        if not counts or given != text:
            raise_problems(
                [Problem("", f"{text!r} is not an iteration like 'E10_U200_S800', or a part of it like 'U200'")]
            )
        return cls(**counts)

    def advance(self, *, samples: int) -> Self:
        """Return the iteration after one more update of `samples` samples.

        Raises:
            SettingsError: If `samples` is not a whole number >= 0.
        """
        if type(samples) is not int or samples < 0:
            raise_problems([check_whole("samples", samples, at_least=0)])
        return type(self)(self.epoch, self.update + 1, self.sample + samples)

    def next_epoch(self) -> Self:
        """Return the iteration after the end of the epoch."""
        return type(self)(self.epoch + 1, self.update, self.sample)

    def reached(self, point: TrainingIteration) -> bool:
        """Return whether every counter is at least that of `point`.

        Example:
            >>> TrainingIteration(epoch=1, update=50).reached(TrainingIteration(update=50))
            True
        """
        return self.epoch >= point.epoch and self.update >= point.update and self.sample >= point.sample
