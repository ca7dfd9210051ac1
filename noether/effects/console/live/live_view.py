"""The data that the live display shows: numbers and names, and no tensors, which its thread must not free."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal

from noether.core.run import Run
from noether.core.tensors.tree import FrozenDict
from noether.effects.console.columns import format_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from noether.core.callback import Callback
    from noether.core.effect import ShowProgress
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState

Mode = Literal["higher", "lower"]
_SIZES: Final = ("end", "updates_per_epoch", "samples_per_epoch", "effective_batch_size")
_LOSS: Final = "loss/"
_RATE_S: Final = 10.0
_HISTORY_S: Final = 300.0


@dataclass
class MetricView:
    """The last value of a metric, and its best value.

    Attributes:
        value: The last value.
        direction: Whether higher or lower is better; None if that is not known.
        is_watched: Whether a callback watches it.
        best: The best value; None if there is none yet.
        best_at: The iteration of the best value, as text.
        is_best: Whether the last value is better than all earlier ones; False for the first value.
    """

    value: float | str
    direction: Mode | None
    is_watched: bool
    best: float | None = None
    best_at: str = ""
    is_best: bool = False

    def update(self, value: float | str, at: TrainingIteration) -> None:
        """Set the last value, which was logged at an iteration, and the best value if this one is better."""
        self.value, had_best = value, self.best is not None
        is_better = isinstance(value, float) and math.isfinite(value) and self._improves(value)
        self.is_best = is_better and had_best
        if is_better:
            self.best, self.best_at = float(value), str(at)

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return self.direction is not None
        return value > self.best if self.direction == "higher" else value < self.best


@dataclass(eq=False)
class TaskView:
    """The progress of a task that takes long, such as an evaluation.

    Attributes:
        description: What is done.
        total: The number of its items; None if it is not known.
        began_s: When it began, in seconds of the clock `monotonic`.
        done: The number of completed items.
    """

    description: str
    total: int | None
    began_s: float = field(default_factory=monotonic)
    done: int = 0


class RunView:
    """The newest facts about a run.

    Attributes:
        newest: The newest iteration, and the one at which its epoch began; None before the first event.
        run: Its end and lengths.
        progress: The newest `ShowProgress`.
        metrics: The metrics that are shown, by key.
        tasks: The running tasks.
    """

    def __init__(self) -> None:
        self.newest: tuple[TrainingIteration, TrainingIteration] | None = None
        self.run = Run()
        self.progress: ShowProgress | None = None
        self.metrics: dict[str, MetricView] = {}
        self.tasks: list[TaskView] = []
        self._watched: Mapping[str, Mode] = {}
        self._history: deque[tuple[float, int, int]] = deque()  # time in seconds, completed updates and samples

    def begin(self, run: Run) -> None:
        """Set the end and the lengths of the run, and drop the speed of an earlier one."""
        self.run = Run(**{name: value for name, value in vars(run).items() if name in _SIZES})
        self._history.clear()

    def watch(self, callbacks: Iterable[Callback], state: TrainState) -> None:
        """Show the metrics that callbacks watch, with their best values in a state.

        Args:
            callbacks: The callbacks of the run, without decorators.
            state: The state in which the run begins, with the best values so far.
        """
        watchers: list[Any] = [each for each in callbacks if hasattr(each, "metric_key") and hasattr(each, "direction")]
        self._watched = {each.metric_key: each.direction for each in watchers}
        for each in watchers:
            memory = state.callback_states.get(each.name, FrozenDict())
            if isinstance(memory, FrozenDict) and memory.get("at") and memory.get("best") is not None:
                best = float(memory["best"])
                self.metrics[each.metric_key] = MetricView(
                    math.nan, each.direction, is_watched=True, best=best, best_at=str(memory["at"])
                )

    def is_shown(self, key: str) -> bool:
        """Whether the display shows a metric: a loss, or one that a callback watches."""
        return key in self._watched or (key.startswith(_LOSS) and not key.endswith(("/best", "/best_update")))

    def priority_of(self, key: str) -> int:
        """Return the place of a metric in a line: 0 if a callback watches it, 1 for a loss, 2 for others."""
        return 0 if key in self._watched else 1 if self.is_shown(key) else 2

    def log(self, metrics: Mapping[str, Any], at: TrainingIteration) -> None:
        """Set the values that were logged at an iteration, if the display shows them."""
        for key, value in metrics.items():
            if self.is_shown(key):
                shown = self.metrics.get(key)
                if shown is None:
                    direction = self._watched.get(key, "lower")
                    shown = self.metrics[key] = MetricView(math.nan, direction, key in self._watched)
                shown.update(float(value) if isinstance(value, int | float) else format_value(value), at)

    def record_progress(self, now_s: float) -> None:
        """Store how many updates and samples are completed at a time in seconds, to compute the speed."""
        if self.newest is None:
            return
        at, _ = self.newest
        if self._history and self._history[-1][1] > at.update:  # a new run
            self._history.clear()
        self._history.append((now_s, at.update, at.sample))
        while now_s - self._history[0][0] > _HISTORY_S:
            self._history.popleft()

    def rates(self) -> tuple[float, float] | None:
        """Return updates and samples per second in the last ten seconds; None without a completed update.

        If no update was completed in ten seconds, the rates are those of the last five minutes.
        """
        if not self._history:
            return None
        now_s, updates, samples = self._history[-1]
        before_s, updates_before, samples_before = next(each for each in self._history if now_s - each[0] <= _RATE_S)
        if updates == updates_before:
            before_s, updates_before, samples_before = self._history[0]
        if updates == updates_before:
            return None
        return (updates - updates_before) / (now_s - before_s), (samples - samples_before) / (now_s - before_s)

    def left_s(self, end: int | None) -> float | None:
        """Return the estimated seconds until update `end`, evaluations included; None if the speed is not known."""
        if end is None or not self._history:
            return None
        (began_s, first, _), (now_s, last, _) = self._history[0], self._history[-1]
        return None if last == first else (now_s - began_s) / (last - first) * (end - last)
