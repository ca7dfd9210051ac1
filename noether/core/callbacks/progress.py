"""Writes the progress of a run, and its expected end."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, final

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import LogText, LogUpdateText
from noether.core.estimates import estimate_end, known_end
from noether.core.iteration import COUNTERS
from noether.core.tensors.tree import FrozenDict
from noether.core.text import format_duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState
    from noether.core.stretch import CompletedUpdate


@final
class ProgressCallback(PeriodicCallback):
    """Writes a line with percentage, counters, elapsed time and expected end; a terminal's live display has them, too.

    In detail: percent done; epoch, update and sample with their ends; milliseconds per update; time since the last line
    (`last`); total time; remaining time and end in UTC. The estimate leaves out the first interval because its updates
    are slower. Times are sums of the durations in the events, so a resumed run continues with them. If the end of the
    run is unknown, the line has neither percentage nor expected end. If the length of its epochs is unknown, both are
    estimates from the epochs and updates so far. Where updates are short, the trainer writes the lines of a quarter of
    a second together, so the last ones are missing if an update hangs or the process is killed.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.ProgressCallback
      every_n_updates: 10
    ```

    Example:
        >>> from noether import AfterUpdate, Run, TrainingIteration, TrainState
        >>> end = TrainingIteration(update=8)
        >>> run = Run(end=end, updates_per_epoch=4, samples_per_epoch=16, effective_batch_size=4)
        >>> event = AfterUpdate(run=run, samples=4, duration_s=0.5)
        >>> _, effects = ProgressCallback(every_n_updates=1)(TrainState().advance(samples=4), event)
        >>> print(effects[0].text)
         12.5 %  epoch 0/2  update 1/8  sample 4/32  500.0 ms/update  last 0:00:00  total 0:00:00  left unknown
    """

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return times of 0 s."""
        return {
            self.name: FrozenDict(total_s=0.0, since_s=0.0, since_updates=0, steady_s=0.0, steady_updates=0, lines=0)
        }

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Add the durations of updates."""
        memory = self.memory(state)
        total_s, since_s = memory["total_s"], memory["since_s"]
        for _, event in updates:
            total_s += event.duration_s
            since_s += event.duration_s
        count = memory["since_updates"] + len(updates)
        memory = FrozenDict(memory, total_s=total_s, since_s=since_s, since_updates=count)
        return state.remember(self.name, memory), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Write the line, and start a new interval."""
        state, line = self._end_interval(state, event)
        return state, (line,)

    def fire_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Write a line for each of the updates."""
        now, lines = state.iteration, list[LogUpdateText]()
        for iteration, event in updates:
            state, line = self._end_interval(state.replace(iteration=iteration), event)
            lines.append(LogUpdateText(iteration, event, line))
        return state.replace(iteration=now), tuple(lines)

    def _end_interval(self, state: TrainState, event: Event) -> tuple[TrainState, LogText]:
        """Return the state with the memory of a new interval, and the line of the interval that ends."""
        memory = self.memory(state)
        steady_s, steady_updates = memory["steady_s"], memory["steady_updates"]
        if memory["lines"]:  # not the first interval, whose updates are slower
            steady_s += memory["since_s"]
            steady_updates += memory["since_updates"]
        end = estimate_end(state, event.run)
        text = f"{_format_share(state, event.run, end)}{_format_counters(state, event.run)}  {_format_times(memory)}"
        if end is not None:
            left_s = (end - state.iteration.update) * steady_s / steady_updates if steady_updates else None
            text = f"{text}  {_format_end(left_s, event.time_s)}"
        memory = FrozenDict(
            total_s=memory["total_s"],
            since_s=0.0,
            since_updates=0,
            steady_s=steady_s,
            steady_updates=steady_updates,
            lines=memory["lines"] + 1,
        )
        return state.remember(self.name, memory), LogText(text, is_progress=True)


def _format_share(state: TrainState, run: Run, end: int | None) -> str:
    """Return the share of the run that is completed; nothing if it is unknown."""
    if end is None:
        return ""
    at, last = state.iteration, run.end
    if not last.update and not last.sample:  # within an epoch, only updates and samples advance
        share = at.update / end
    else:
        share = max(getattr(at, name) / count for name in COUNTERS if (count := getattr(last, name)))
    # A run that ends at a number of samples may exceed it.
    return f"{100 * min(share, 1.0):5.1f} %  "


def _format_counters(state: TrainState, run: Run) -> str:
    at, end = state.iteration, known_end(run)
    if end is None:
        return f"epoch {at.epoch}  update {at.update}  sample {at.sample}"
    return f"epoch {at.epoch}/{end.epoch}  update {at.update}/{end.update}  sample {at.sample}/{end.sample}"


def _format_times(memory: Mapping[str, float]) -> str:
    update_time = (
        f"{1000 * memory['since_s'] / memory['since_updates']:.1f} ms/update"
        if memory["since_updates"]
        else "no update"
    )
    return f"{update_time}  last {format_duration(memory['since_s'])}  total {format_duration(memory['total_s'])}"


def _format_end(left_s: float | None, time_s: float) -> str:
    if left_s is None:
        return "left unknown"
    left = f"left {format_duration(left_s)}"
    try:
        end = datetime.fromtimestamp(time_s + left_s, tz=UTC).isoformat(" ", "seconds")  # faster than a format
    except (ValueError, OverflowError, OSError):  # beyond the year 9999, or the clock is wrong
        return left
    return f"{left}  ends {end.removesuffix('+00:00')} UTC"


Progress = ProgressCallback
"""Alias for YAML that was written for a class-based framework."""
