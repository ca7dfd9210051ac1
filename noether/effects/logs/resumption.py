"""Which log lines stay where a run resumes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple, Self

from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.state import TrainState


class LogError(NoetherError):
    """A log file is damaged."""


def lines_before_resume(lines: list[bytes], point: ResumePoint, saved: int, path: Path) -> tuple[list[bytes], int]:
    """Return the lines logged before the point where a run resumes, and how many saved ones it logs again.

    The second number is not 0 only if an error cut an event short after its lines were logged.

    Raises:
        LogError: If one of the first `saved` lines, or a line before another that stays, is damaged. A last line
            without a line end was only cut off.
    """
    positions = [_parse_position(line) for line in lines]
    remaining = [index for index, each in enumerate(positions) if each is not None and point.keeps(*each)]
    # Later lines may be partial, or damaged by a power loss.
    whole = len(lines) - 1 if lines and not lines[-1].endswith(b"\n") else len(lines)
    intact = max(min(saved, whole), remaining[-1] if remaining else 0)
    for index, line in enumerate(lines[:intact]):
        if positions[index] is None:
            text = line[:80].decode(errors="replace")
            raise LogError(f"{path}:{index + 1}: not a log line: {text!r}; remove this line, and resume again")
    repeated = {
        index
        for index, position in enumerate(positions[:saved])
        if position is not None and point.iteration is not None and position[1].update == point.iteration.update
    }
    return [lines[index] for index in remaining], len(repeated.difference(remaining))


def _parse_position(line: bytes) -> tuple[str, TrainingIteration] | None:
    """Return the event name and the counters of a log line, or None if it is damaged."""
    try:
        fields = json.loads(line)
        event, counts = fields["event"], TrainingIteration(fields["epoch"], fields["update"], fields["sample"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (event, counts) if line.endswith(b"\n") and isinstance(event, str) else None


class ResumePoint(NamedTuple):
    """Where a run resumes, as far as logs need it; a state would keep its tensors alive.

    Args:
        iteration: Counters of the state; None for a new run.
        repeated: Names of the events at these counters that the resumed run dispatches, such as `after_training`.
    """

    iteration: TrainingIteration | None
    repeated: frozenset[str]

    @classmethod
    def of(cls, state: TrainState | None) -> Self:
        """Return the point at which a run resumes from `state`; None for a new run."""
        if state is None:
            return cls(None, frozenset())
        # Accumulation steps and the end of training share the counters of an update.
        repeated = {"after_accumulation_step"}
        repeated |= set() if state.ended else {"after_training"}
        repeated |= set() if state.pending is None else {"after_update"}
        return cls(state.iteration, frozenset(repeated))

    def keeps(self, event: str, logged_at: TrainingIteration) -> bool:
        """Return whether a log line stays, because the resumed run does not dispatch its event again.

        Args:
            event: Name of the event, such as `after_update`.
            logged_at: Counters at the event.
        """
        if self.iteration is None or not self.iteration.reached(logged_at):
            return False
        return logged_at != self.iteration or event not in self.repeated
