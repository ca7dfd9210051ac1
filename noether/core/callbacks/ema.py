"""Averages the weights exponentially, and saves the averages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, final

import torch

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import SaveCheckpoint
from noether.core.errors import Problem, WeightsError, check_whole, raise_problems
from noether.core.tensors import torch_internals
from noether.core.tensors.donation import ALREADY_UPDATED, DonatedTree, OwnedStorages
from noether.core.tensors.dtensors import local_part, place_like, with_local_part
from noether.core.tensors.stored_weights import memory_of, name_in_tags
from noether.core.tensors.tied_names import add_tied, list_modules, names_below
from noether.core.tensors.tree import FrozenDict, clone_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterTraining, AfterUpdate, BeforeTraining, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class EMACallback(PeriodicCallback):
    """Keeps exponential moving averages of the weights (EMA), and saves them as checkpoints for inference.

    The averages start as the params before training. After each update
    `average = factor * average + (1 - factor) * params`, in float32 or more; buffers and integers are copied. Updates
    that were skipped because they were not finite do not count. The untrained weights are in the average for about
    `1 / (1 - factor)` updates, unless `start_at_update` or `warmup` is set.

    To evaluate an average, give `weights: ema=0.999` to a callback that iterates data and list it after this one; the
    weights in training do not change. The averages are part of every resumable checkpoint, so they resume exactly. A
    checkpoint that this callback saves contains an average in place of the weights.

    Args:
        target_factors: Decays, each in (0, 1), without duplicates. A decay of 0.999 averages about 1000 updates.
        model_paths: Sub-modules to average, by their path in the model; empty, or with null in it, for the whole model.
        save_weights: Whether to save the averages at the interval, as checkpoints `TAG.ema=FACTOR`.
        save_last_weights: Whether to save the averages after training, with the pointer `last.ema=FACTOR`.
        save_latest_weights: Whether to save the averages at the interval with the pointer `latest.ema=FACTOR`, and to
            keep the newest ones.
        keep: With `save_weights`: number of newest checkpoints of each average to keep, >= 1; None keeps all. Those
            that a pointer names are kept in any case.
        start_at_update: Number of updates before averaging starts, >= 0; up to there the averages are copies of the
            weights.
        warmup: Whether the decay grows to its factor, so that early weights are forgotten: the n-th update that is
            averaged, from 0, has the decay `min(factor, (1 + n) / (10 + n))`, as in `tf.train.ExponentialMovingAverage`
            with `num_updates`. n is counted from the number of updates, so it resumes exactly.
        every_n_epochs: Epochs between saves, >= 1.
        every_n_updates: Updates between saves, >= 1.
        every_n_samples: Samples between saves, >= 1; give exactly one of the three.

    Raises:
        SettingsError: If a factor is not in (0, 1), or a path names no sub-module with parameters.

    ```yaml
    - kind: noether.core.callbacks.EMACallback
      every_n_epochs: 10
      target_factors: [0.99, 0.999]
    - kind: noether.core.callbacks.MetricCallback
      every_n_epochs: 1
      dataset_key: val
      metric: accuracy
      weights: ema=0.999
    ```

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> ema = EMACallback(every_n_epochs=1, target_factors=(0.5,))
        >>> state = TrainState(params={"w": torch.tensor(1.0)})
        >>> state = state.replace(callback_states=ema.init(state), params={"w": torch.tensor(3.0)})
        >>> state, _ = ema(state.advance(samples=8), AfterUpdate(samples=8))
        >>> state.memory("weights/ema=0.5")["params"]["w"]
        tensor(2.)
    """

    target_factors: tuple[float, ...]
    model_paths: tuple[str | None, ...] = ()
    save_weights: bool = True
    save_last_weights: bool = True
    save_latest_weights: bool = False
    keep: int | None = None
    start_at_update: int = 0
    warmup: bool = False

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        if self.id is not None and not _NAME.fullmatch(self.id):
            yield Problem("id", f"{self.id!r} becomes part of checkpoint names; use letters, digits, '_', '.' and '-'")
        if self.keep is not None:
            yield check_whole("keep", self.keep)
            if not self.save_weights:
                yield Problem("keep", "has no effect without save_weights: leave it out, or set save_weights to true")
        yield check_whole("start_at_update", self.start_at_update, at_least=0)
        if not self.target_factors or len(set(self.target_factors)) < len(self.target_factors):
            yield Problem("target_factors", f"{list(self.target_factors)} is not a list of different factors")
        for index, factor in enumerate(self.target_factors):
            if not _is_decay(factor):
                yield Problem(f"target_factors.{index}", f"{factor!r} is not a number between 0 and 1, both excluded")

    @property
    def produces(self) -> tuple[str, ...]:
        """The averages, for callbacks with a setting `weights`."""
        return tuple(map(memory_of, self._averages))

    @property
    def _averages(self) -> dict[str, float]:
        return {self._name_of(factor): factor for factor in self.target_factors}

    def _name_of(self, factor: float) -> str:
        return f"ema={factor}" if self.id is None else f"{self.id}/ema={factor}"

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return averages equal to the weights.

        Raises:
            SettingsError: If one of `model_paths` names no sub-module with parameters.
        """
        names = add_tied(state.params, state.tied_names)
        raise_problems(_path_problem(path, index, names) for index, path in enumerate(self.model_paths))
        params, buffers = self._select(state)
        return {
            memory_of(name): FrozenDict(
                params=FrozenDict({path: _upcast(tensor).clone() for path, tensor in params.items()}),
                buffers=clone_tensors(buffers),
            )
            for name in self._averages
        }

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Check that the averages of a resumed run have the parameters that `model_paths` chooses.

        Raises:
            WeightsError: If `model_paths` was changed since the checkpoint.
        """
        for name in map(memory_of, self._averages):
            average = state.callback_states.get(name)
            if average is not None and average["params"].keys() != self._select(state)[0].keys():
                raise WeightsError(
                    f"{name!r} has other parameters than model_paths of {self.name} chooses: restore the former "
                    f"model_paths, or restart the average with --drop-memory {name}"
                )
        return state, ()

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Move every average towards the weights."""
        if event.skipped:
            return state, ()
        params, buffers = self._select(state)
        move = _move_in_place if isinstance(state.params, DonatedTree) else _move
        for name, factor in self._averages.items():
            memory = state.callback_states.get(memory_of(name))
            if memory is None:  # called without a reducer, which fills in initial memory
                memory = self.init(state)[memory_of(name)]
            averages = memory["params"]
            if isinstance(averages, DonatedTree) and averages.owner is ALREADY_UPDATED:
                averages = FrozenDict(averages)  # the same event did it, before it was cut short
            else:
                averages = move(averages, params, 1 - self._decay(factor, state.iteration.update))
            average = FrozenDict(params=averages, buffers=clone_tensors(buffers))
            state = state.remember(memory_of(name), average)
        return state, ()

    def _decay(self, factor: float, update: int) -> float:
        """Return the weight of the average at an update, counted from 1."""
        n = update - 1 - self.start_at_update
        if n < 0:
            return 0.0
        return min(factor, (1 + n) / (10 + n)) if self.warmup else factor

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Request checkpoints of the averages."""
        if not (self.save_weights or self.save_latest_weights):
            return state, ()
        pointer = "latest" if self.save_latest_weights else None
        return state, self._requests(state, pointer, keep=self.keep if self.save_weights else 0)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Request the last checkpoints of the averages."""
        state, effects = super().after_training(state, event)
        if not self.save_last_weights:
            return state, effects
        return state, (*effects, *self._requests(state, "last", keep=0))

    def _requests(self, state: TrainState, pointer: str | None, *, keep: int | None) -> tuple[SaveCheckpoint, ...]:
        return tuple(
            SaveCheckpoint(
                tag=f"{state.iteration}.{name_in_tags(name)}",
                optimizer=False,
                weights_of=name,
                models=tuple(path for path in self.model_paths if path is not None) if self._partial else (),
                pointers=() if pointer is None else (f"{pointer}.{name_in_tags(name)}",),
                retention=FrozenDict({memory_of(name): keep}),
            )
            for name in self._averages
        )

    @property
    def _partial(self) -> bool:
        """Whether `model_paths` chooses a part of the model only."""
        return bool(self.model_paths) and None not in self.model_paths

    def _select(self, state: TrainState) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        """Return the params and buffers that the model has below one of `model_paths` under any of their names."""
        if not self._partial:
            return state.params, state.buffers
        paths, tied = [path for path in self.model_paths if path is not None], state.tied_names
        params, buffers = state.params, state.buffers
        chosen = {*names_below(params, paths, tied).values(), *names_below(buffers, paths, tied).values()}
        return (
            {name: tensor for name, tensor in params.items() if name in chosen},
            {name: tensor for name, tensor in buffers.items() if name in chosen},
        )


def _is_decay(factor: object) -> bool:
    return isinstance(factor, float) and 0 < factor < 1


def _path_problem(path: str | None, index: int, params: Mapping[str, torch.Tensor]) -> Problem | None:
    if path is None or any(name.startswith(f"{path}.") for name in params):
        return None
    message = f"{path!r} names no sub-module with parameters; {list_modules(path, params)}"
    return Problem(f"model_paths.{index}", message)


def _move(averages: Mapping[str, torch.Tensor], params: Mapping[str, torch.Tensor], weight: float) -> FrozenDict:
    """Return `averages + weight * (params - averages)`, computed out of place in one call for all tensors."""
    names = _names_to_average(averages)
    copies = {name: params[name].clone() for name in averages if name not in names}
    if not names:
        return FrozenDict(copies)
    targets = [_upcast(local_part(params[name])) for name in names]
    averaged = [local_part(place_like(averages[name], params[name])) for name in names]
    # A model may have been moved, as by `model.to(torch.float64)`.
    starts = [
        average if average.dtype is target.dtype else average.to(target)
        for average, target in zip(averaged, targets, strict=True)
    ]
    results = torch_internals.foreach_lerp(starts, targets, weight)
    moved = {name: with_local_part(params[name], result) for name, result in zip(names, results, strict=True)}
    return FrozenDict({**copies, **moved})


def _move_in_place(
    averages: Mapping[str, torch.Tensor], params: Mapping[str, torch.Tensor], weight: float
) -> Mapping[str, torch.Tensor]:
    """Return the result of `_move` bit for bit, written into the averages if they are donated."""
    if isinstance(averages, DonatedTree) and isinstance(averages.owner, OwnedStorages):
        owned, tree = averages.owner, averages.take()
        owned.unshare()
    else:
        tree = {name: place_like(tensor, params[name]).clone() for name, tensor in averages.items()}
        owned = OwnedStorages([(tree, name) for name in tree])
    names = _names_to_average(tree)
    for name in tree.keys() - set(names):
        tree[name].copy_(params[name])
    if names:
        targets = [_upcast(local_part(params[name])) for name in names]
        torch_internals.foreach_lerp_([local_part(tree[name]) for name in names], targets, weight)
    moved = DonatedTree(tree, owned)
    if isinstance(averages, DonatedTree):
        averages.successor = moved  # if this event is cut short later, it is dispatched again from the new averages
    return moved


def _names_to_average(averages: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the floating-point and complex tensors; the others are copied."""
    return [name for name, tensor in averages.items() if tensor.is_floating_point() or tensor.is_complex()]


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 if it is in half precision, in which a small step would round to zero."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]+")


EmaCallback = EMACallback
"""Alias for YAML that was written for a class-based framework."""
