"""Checkpoints at an interval."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, final

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import LogText, SaveCheckpoint
from noether.core.errors import Problem, check_whole
from noether.core.tensors.tree import FrozenDict, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.callback import Effects
    from noether.core.event import AfterTraining, BeforeTraining, Event
    from noether.core.run import Run
    from noether.core.schedules.gate import Interval
    from noether.core.state import TrainState


_COUNTED: Final = ("end", "updates_per_epoch", "samples_per_epoch", "effective_batch_size")


@final
class CheckpointCallback(PeriodicCallback):
    """Saves a checkpoint at its interval and after training.

    The pointer `latest` follows it, after training `last` too. A checkpoint with weights and optimizer can be resumed;
    by default the newest is one, and of the others the weights are kept.

    Args:
        save_weights: Whether to save the weights and keep them.
        save_optim: Whether to save the optimizer and the run's state, and keep them.
        save_latest_weights: Whether to save the weights and keep those of the newest checkpoint only.
        save_latest_optim: The same for the optimizer and the run's state. At least one of the four is true.
        model_names: Sub-modules whose weights to save, by their name in the model; none stands for all. A checkpoint
            with the optimizer holds all of them.
        keep: How many of the newest checkpoints stay, >= 1; None keeps all. Those that a pointer names, and the one
            resumed from, stay too.
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

    Raises:
        SettingsError: If nothing is to be saved, or `keep` is not a whole number >= 1.

    ```yaml
    - kind: noether.core.callbacks.CheckpointCallback
      every_n_epochs: 1
      save_weights: true
      save_optim: true
      keep: 2
    ```

    Example:
        >>> from noether import AfterEpoch, TrainState
        >>> callback = CheckpointCallback(every_n_epochs=1, save_weights=True, save_optim=True)
        >>> callback(TrainState().next_epoch(), AfterEpoch())[1][0].pointers
        ('latest',)
    """

    save_weights: bool = True
    save_optim: bool = False
    save_latest_weights: bool = True
    save_latest_optim: bool = True
    model_names: tuple[str, ...] = ()
    keep: int | None = None

    def problems(self) -> Iterator[Problem | None]:
        """Yield what is wrong with the settings."""
        yield from super().problems()
        if not (self._lasting or self.save_latest_weights or self.save_latest_optim):
            one = "save_weights, save_optim, save_latest_weights, save_latest_optim"
            yield Problem("", f"nothing is to be saved; set at least one of {one} to true")
        if self.keep is not None:
            yield check_whole("keep", self.keep)

    @property
    def produces(self) -> tuple[str, ...]:
        """Nothing: it saves."""
        return ()

    @property
    def _lasting(self) -> bool:
        return self.save_weights or self.save_optim

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Say how much the schedule will write."""
        if not all(hasattr(event.run, name) for name in _COUNTED):
            return state, ()  # a loop of one's own need not say where it ends
        return state, (LogText(self._forecast(state, event.run)),)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Ask for a checkpoint."""
        return state, self._saves(state, "latest")

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Ask for the last checkpoint."""
        return state, self._saves(state, "latest", "last")

    def _saves(self, state: TrainState, *pointers: str) -> tuple[SaveCheckpoint, ...]:
        newest = SaveCheckpoint(
            weights=self.save_weights or self.save_latest_weights,
            optimizer=self.save_optim or self.save_latest_optim,
            pointers=pointers,
            retention=FrozenDict({self.name: self.keep if self._lasting else 0}),
        )
        newest = replace(newest, models=self._models(newest))
        if not self._lasting or (newest.weights, newest.optimizer) == (self.save_weights, self.save_optim):
            return (newest,)
        # What is kept is less than what the newest holds: two checkpoints, each with its own retention.
        lasting = replace(newest, weights=self.save_weights, optimizer=self.save_optim, pointers=())
        passing = FrozenDict({f"{self.name}/latest": 0})
        return (
            replace(lasting, models=self._models(lasting)),
            replace(newest, tag=f"{state.iteration}.latest", retention=passing),
        )

    def _models(self, save: SaveCheckpoint) -> tuple[str, ...]:
        return () if save.optimizer else self.model_names  # with a part of the weights, an optimizer is of no use

    def _forecast(self, state: TrainState, run: Run) -> str:
        count = self.gate.schedule.count(state.iteration, run.final, run) + 1
        saves = self._saves(state)
        said = [self._told(save, state, count, lasting=save is saves[0] and self._lasting) for save in saves]
        return f"{self.name}: {'; '.join(said)}"

    def _told(self, asked: SaveCheckpoint, state: TrainState, count: int, *, lasting: bool) -> str:
        weights = _bytes((state.params, state.buffers)) if asked.weights else 0
        optimizer = _bytes((state.opt_state, state.callback_states)) if asked.optimizer else 0
        # The optimizer makes its memory at the first update; before that only the weights are known.
        unknown = " and the optimizer's memory" if asked.optimizer and not state.iteration.update else ""
        keep = self.keep if lasting else 1
        kept = count if keep is None else min(count, keep)
        size = f"{(weights + optimizer) / 1e6:.2f} MB"
        return f"{count} checkpoints of {size}{unknown} will be written, {kept} of them kept"


def _bytes(tree: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors(tree))
