"""What a display shows of a run: numbers and names only, so that a thread can draw it, and never frees a tensor."""

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
    """The last value of a metric, and its best.

    Attributes:
        value: The last value.
        direction: Whether higher or lower is better; None if that is not known.
        is_watched: Whether a callback watches it.
        best: The best value; None if there is none yet.
        best_at: Where that was.
        is_best: Whether the last value is the best.
    """

    value: float | str
    direction: Mode | None
    is_watched: bool
    best: float | None = None
    best_at: str = ""
    is_best: bool = False

    def update(self, value: float | str, at: TrainingIteration) -> None:
        """Take a new value, logged at an iteration."""
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
    """An iteration that takes long, such as an evaluation."""

    description: str
    total: int | None
    began_s: float = field(default_factory=monotonic)
    done: int = 0


class RunView:
    """The newest facts about a run.

    Attributes:
        newest: The iteration, and that at which its epoch began; None before the first event.
        run: Its end and lengths.
        progress: The newest `ShowProgress`.
        metrics: The metrics that are shown, by key.
        tasks: The iterations that are running.
    """

    def __init__(self) -> None:
        self.newest: tuple[TrainingIteration, TrainingIteration] | None = None
        self.run = Run()
        self.progress: ShowProgress | None = None
        self.metrics: dict[str, MetricView] = {}
        self.tasks: list[TaskView] = []
        self._watched: Mapping[str, Mode] = {}
        self._paces: deque[tuple[float, int, int]] = deque()  # time, updates and samples

    def begin(self, run: Run) -> None:
        """Take the end and the lengths of a run, and forget the pace before."""
        self.run = Run(**{name: value for name, value in vars(run).items() if name in _SIZES})
        self._paces.clear()

    def watch(self, callbacks: Iterable[Callback], state: TrainState) -> None:
        """Show the metrics that callbacks watch, with their best values in a state.

        Args:
            callbacks: The callbacks of the run, without decorators.
            state: Where it begins.
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

    def rank_of(self, key: str) -> int:
        """Return 0 for a metric that a callback watches, 1 for a loss, 2 for others."""
        return 0 if key in self._watched else 1 if self.is_shown(key) else 2

    def log(self, metrics: Mapping[str, Any], at: TrainingIteration) -> None:
        """Take the values that were logged at an iteration."""
        for key, value in metrics.items():
            if self.is_shown(key):
                shown = self.metrics.get(key)
                if shown is None:
                    direction = self._watched.get(key, "lower")
                    shown = self.metrics[key] = MetricView(math.nan, direction, key in self._watched)
                shown.update(float(value) if isinstance(value, int | float) else format_value(value), at)

    def add_pace(self, now_s: float) -> None:
        """Remember the updates and samples that are completed at a time."""
        if self.newest is None:
            return
        at, _ = self.newest
        if self._paces and self._paces[-1][1] > at.update:  # a new run
            self._paces.clear()
        self._paces.append((now_s, at.update, at.sample))
        while now_s - self._paces[0][0] > _HISTORY_S:
            self._paces.popleft()

    def rates(self) -> tuple[float, float] | None:
        """Return updates and samples per second of the last ten seconds; None if none was completed."""
        if not self._paces:
            return None
        now_s, updates, samples = self._paces[-1]
        before_s, updates_before, samples_before = next(each for each in self._paces if now_s - each[0] <= _RATE_S)
        if updates == updates_before:
            before_s, updates_before, samples_before = self._paces[0]
        if updates == updates_before:
            return None
        return (updates - updates_before) / (now_s - before_s), (samples - samples_before) / (now_s - before_s)

    def left_s(self, end: int | None) -> float | None:
        """Return the seconds until an update is completed, evaluations included; None if they cannot be estimated."""
        if end is None or not self._paces:
            return None
        (began_s, first, _), (now_s, last, _) = self._paces[0], self._paces[-1]
        return None if last == first else (now_s - began_s) / (last - first) * (end - last)
