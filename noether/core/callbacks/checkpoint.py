"""Saves checkpoints at an interval."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, final

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import LogText, SaveCheckpoint
from noether.core.errors import Problem, check_whole
from noether.core.file_names import escape_name
from noether.core.schedules.forecast import Occasions, events_at, fires
from noether.core.tensors.stored_weights import check_model_names, weights_by_name
from noether.core.tensors.tree import FrozenDict, tensors
from noether.core.text import count_of, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterTraining, BeforeTraining, Event
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


_FORECAST_NEEDS: Final = ("end", "updates_per_epoch", "samples_per_epoch", "effective_batch_size")


@final
class CheckpointCallback(PeriodicCallback):
    """Saves a checkpoint at its interval and after training.

    The pointer `latest` names the newest checkpoint; after training, `last` does too. A run resumes from a checkpoint
    with weights, optimizer and state. By default the newest checkpoint has all of them, and older ones only weights.
    Before training, the callback writes to the console how many checkpoints there will be and how large one is.

    `load_state_dict` takes the file of weights as it is; a tied weight is written under each of its names:

        from safetensors.torch import load_file

        weights = load_file("runs/NAME/RUN_ID/checkpoints/TAG/weights.safetensors")
        model.load_state_dict(weights)
        model.head.load_state_dict({n.removeprefix("head."): w for n, w in weights.items() if n.startswith("head.")})

    Args:
        save_weights: Whether every checkpoint has the weights.
        save_optim: Whether every checkpoint has the optimizer and the run's state.
        save_latest_weights: Whether the newest checkpoint has the weights.
        save_latest_optim: Whether the newest checkpoint has the optimizer and the run's state. At least one of the
            four must be true.
        model_names: Sub-modules whose weights to save, by their name in the model; empty for all. Such a
            checkpoint has them in its tag and pointers, as in `latest.head`; the names in its file are those in the
            whole model. A checkpoint with the optimizer has the weights of all sub-modules.
        keep: Number of newest checkpoints to keep, >= 1; None keeps all. A checkpoint that a pointer names, and the
            newest one to resume from, are kept in any case.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        SettingsError: If the settings save nothing, or `keep` is not a whole number >= 1.

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
        """Yield the problems of the settings."""
        yield from super().problems()
        if not (self._saves_each or self.save_latest_weights or self.save_latest_optim):
            one = "save_weights, save_optim, save_latest_weights, save_latest_optim"
            yield Problem("", f"nothing would be saved; set at least one of {one} to true")
        if self.keep is not None:
            yield check_whole("keep", self.keep)

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    @property
    def _saves_each(self) -> bool:
        """Whether each checkpoint is kept, not only the newest."""
        return self.save_weights or self.save_optim

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return no memory.

        Raises:
            SettingsError: If the model has no weights below one of `model_names`.
        """
        check_model_names(state, self.model_names)
        return {}

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Write how many checkpoints the schedule will save, and their size."""
        if not all(hasattr(event.run, name) for name in _FORECAST_NEEDS):
            return state, ()  # a loop may leave open where it ends
        return state, (LogText(self._forecast(state, event.run)),)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Request a checkpoint."""
        return state, self._requests(state, "latest")

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Request the last checkpoint."""
        return state, self._requests(state, "latest", "last")

    def _requests(self, state: TrainState, *pointers: str) -> tuple[SaveCheckpoint, ...]:
        newest = SaveCheckpoint(
            weights=self.save_weights or self.save_latest_weights,
            optimizer=self.save_optim or self.save_latest_optim,
            pointers=pointers,
            retention=FrozenDict({self.name: self.keep if self._saves_each else 0}),
        )
        newest = self._limit(newest, state)
        if not self._saves_each or (newest.weights, newest.optimizer) == (self.save_weights, self.save_optim):
            return (newest,)
        # The newest checkpoint has more than the others: it is a second checkpoint with its own retention.
        each = replace(newest, weights=self.save_weights, optimizer=self.save_optim, pointers=())
        return (
            self._limit(each, state),
            replace(newest, tag=f"{state.iteration}.latest", retention=FrozenDict({f"{self.name}/latest": 0})),
        )

    def _limit(self, save: SaveCheckpoint, state: TrainState) -> SaveCheckpoint:
        """Return the request for the weights in `model_names` only, under their name, if it is not for more."""
        if save.optimizer or not self.model_names:  # an optimizer is useless without all weights
            return save
        # Callbacks that list the same sub-modules in another order save one checkpoint.
        tag = f"{state.iteration}.{_name_of_part(sorted(self.model_names))}"
        pointers = tuple(f"{pointer}.{_name_of_part(self.model_names)}" for pointer in save.pointers)
        return replace(save, models=self.model_names, tag=tag, pointers=pointers)

    def _forecast(self, state: TrainState, run: Run) -> str:
        count = self._count_saves(state.iteration, run)
        first, *newest = self._requests(state)
        saves = [_describe_saves(first, state, count, keep=self.keep if self._saves_each else 1)]
        saves += [_describe_saves(save, state, count, keep=1) for save in newest]
        return f"{self.name} {' It '.join(saves)}"

    def _count_saves(self, start: TrainingIteration, run: Run) -> int:
        """Return the number of iterations after `start` at which the callback saves, the end of training included."""
        before_end = events_at(run.final.update, run)[-2:][:1]  # it has the iteration of the end
        fires_there = any(fires(Occasions(self.gate.schedule), event, run) for event in before_end)
        return max(1, self.gate.schedule.count(start, run.final, run) + (not fires_there))


def _name_of_part(models: Iterable[str]) -> str:
    return escape_name("-".join(models).replace(".", "/"))


def _describe_saves(save: SaveCheckpoint, state: TrainState, count: int, *, keep: int | None) -> str:
    """Return the end of a sentence about `count` checkpoints: what they contain, their size, and how many stay."""
    weights = _total_bytes((weights_by_name(state, save.models), state.extra_state)) if save.weights else 0
    optimizer = _total_bytes((state.opt_state, state.callback_states)) if save.optimizer else 0
    part = f" of {', '.join(save.models)}" if save.models else ""
    contents = [*([f"weights{part}"] if save.weights else []), *(["optimizer"] if save.optimizer else [])]
    # The optimizer allocates its memory at the first update; before that, only the size of the weights is known.
    unknown = " plus the optimizer's memory" if save.optimizer and not state.iteration.update else ""
    size = f"{format_bytes(weights + optimizer)}{' each' if count > 1 else ''}{unknown}"
    return (
        f"will save {count_of(count, 'checkpoint')} of {' and '.join(contents)} ({size}), and keep "
        f"{_describe_retention(count, keep)}."
    )


def _describe_retention(count: int, keep: int | None) -> str:
    """Return which of `count` checkpoints stay if the newest `keep` do; None for all."""
    if count == 1:
        return "it"
    if keep is None or keep >= count:
        return "all of them"
    return "only the newest" if keep == 1 else f"the newest {keep:,}"


def _total_bytes(tree: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors(tree))
