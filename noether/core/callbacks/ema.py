"""Exponential moving averages of the weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, final

import torch

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import SaveCheckpoint
from noether.core.errors import Problem, WeightsError, raise_problems, suggest
from noether.core.tensors import torch_internals
from noether.core.tensors.donation import DonatedTree, OwnedStorages
from noether.core.tensors.stored_weights import memory_of
from noether.core.tensors.tree import FrozenDict, clone_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterTraining, AfterUpdate, BeforeTraining, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class EMACallback(PeriodicCallback):
    """Keeps exponential moving averages of the weights, current at every update, and saves them.

    After each update `average = factor * average + (1 - factor) * params`, from the params before training on, in
    float32 at least; buffers and whole numbers are copied. Updates that were skipped as non-finite do not count.
    `weights: ema=0.999` on a callback that iterates data evaluates an average; the weights in training stay as they
    are. Every checkpoint that can be resumed holds the averages, so they resume exactly; those that this callback saves
    hold an average in place of the weights, for inference.

    Args:
        target_factors: Decays, each in (0, 1) and given once; the closer to 1, the longer the memory.
        model_paths: Sub-modules to average, by their path in the model; none, or null among them, stands for the whole.
        save_weights: Whether to save the averages at the interval, and keep them, as checkpoints `TAG.ema=FACTOR`.
        save_last_weights: Whether to save them after training; the pointer `last.ema=FACTOR` names them.
        save_latest_weights: Whether to save them at the interval and keep the newest; the pointer is
            `latest.ema=FACTOR`.
        every_n_epochs: Epochs between saves, >= 1.
        every_n_updates: Updates between saves, >= 1.
        every_n_samples: Samples between saves, >= 1; give exactly one of the three.

    Raises:
        SettingsError: If a factor is not in (0, 1), or a path leads to no parameter.

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

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        if self.id is not None and not _NAME.fullmatch(self.id):
            yield Problem(
                "id", f"{self.id!r} is part of the names of checkpoints; use letters, digits, '_', '.' and '-'"
            )
        if not self.target_factors or len(set(self.target_factors)) < len(self.target_factors):
            yield Problem("target_factors", f"{list(self.target_factors)} is not a list of different factors")
        for index, factor in enumerate(self.target_factors):
            if not _is_decay(factor):
                yield Problem(f"target_factors.{index}", f"{factor!r} is not a number between 0 and 1, both excluded")

    @property
    def produces(self) -> tuple[str, ...]:
        """The averages, for callbacks with `weights`."""
        return tuple(map(memory_of, self._averages))

    @property
    def _averages(self) -> dict[str, float]:
        return {self._name_of(factor): factor for factor in self.target_factors}

    def _name_of(self, factor: float) -> str:
        return f"ema={factor}" if self.id is None else f"{self.id}/ema={factor}"

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return averages that are copies of the weights.

        Raises:
            SettingsError: If one of `model_paths` leads to no parameter.
        """
        raise_problems(_lost(path, index, state.params) for index, path in enumerate(self.model_paths))
        params, buffers = self._chosen(state.params), self._chosen(state.buffers)
        return {
            memory_of(name): FrozenDict(params=_begun(params), buffers=clone_tensors(buffers))
            for name in self._averages
        }

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Refuse averages of other parameters, as a resumed run has them after its `model_paths` were changed.

        Raises:
            WeightsError: If so.
        """
        for name in map(memory_of, self._averages):
            kept = state.callback_states.get(name)
            if kept is not None and kept["params"].keys() != self._chosen(state.params).keys():
                raise WeightsError(
                    f"{name!r} averages other parameters than model_paths of {self.name} says: leave model_paths as it "
                    f"was, or begin the average anew with --drop-memory {name}"
                )
        return state, ()

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Move every average towards the weights."""
        if event.skipped:
            return state, ()
        params, buffers = self._chosen(state.params), self._chosen(state.buffers)
        for name, factor in self._averages.items():
            memory = state.callback_states.get(memory_of(name))
            if memory is None:  # called alone, without a reducer that fills in memory
                memory = self.init(state)[memory_of(name)]
            move = _moved_in_place if isinstance(state.params, DonatedTree) else _moved
            moved = FrozenDict(params=move(memory["params"], params, 1 - factor), buffers=clone_tensors(buffers))
            state = state.remember(memory_of(name), moved)
        return state, ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Ask for checkpoints of the averages."""
        if not (self.save_weights or self.save_latest_weights):
            return state, ()
        return state, self._saves(state, "latest" if self.save_latest_weights else None, lasting=self.save_weights)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Ask for the last ones."""
        state, effects = super().after_training(state, event)
        if not self.save_last_weights:
            return state, effects
        return state, (*effects, *self._saves(state, "last", lasting=False))

    def _saves(self, state: TrainState, pointer: str | None, *, lasting: bool) -> tuple[SaveCheckpoint, ...]:
        return tuple(
            SaveCheckpoint(
                tag=f"{state.iteration}.{name.replace('/', '.')}",
                optimizer=False,
                weights_of=name,
                models=tuple(path for path in self.model_paths if path is not None) if self._partial else (),
                pointers=() if pointer is None else (f"{pointer}.{name.replace('/', '.')}",),
                retention=FrozenDict({memory_of(name): None if lasting else 0}),
            )
            for name in self._averages
        )

    @property
    def _partial(self) -> bool:
        return bool(self.model_paths) and None not in self.model_paths

    def _chosen(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if not self._partial:
            return tensors
        return {name: tensor for name, tensor in tensors.items() if _is_below(name, self.model_paths)}


def _is_decay(factor: object) -> bool:
    return isinstance(factor, float) and 0 < factor < 1


def _is_below(name: str, paths: Iterable[str | None]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _lost(path: str | None, index: int, params: Mapping[str, torch.Tensor]) -> Problem | None:
    if path is None or any(_is_below(name, [path]) for name in params):
        return None
    modules = dict.fromkeys(
        ".".join(name.split(".")[:depth]) for name in params for depth in range(1, name.count(".") + 1)
    )
    known = f"; the model has {', '.join(modules) or 'none'}{suggest(path, modules)}"
    return Problem(f"model_paths.{index}", f"{path!r} is no sub-module with parameters{known}")


def _begun(params: Mapping[str, torch.Tensor]) -> FrozenDict:
    return FrozenDict({name: _precise(tensor).clone() for name, tensor in params.items()})


def _moved(averages: Mapping[str, torch.Tensor], params: Mapping[str, torch.Tensor], share: float) -> FrozenDict:
    """Return the averages moved by `share` of the way to `params`; one call for all, and nothing is written to."""
    moving = _moving(averages)
    copied = {name: params[name].clone() for name in averages if name not in moving}
    if not moving:
        return FrozenDict(copied)
    targets = [_precise(params[name]) for name in moving]
    moved = torch_internals.foreach_lerp([averages[name] for name in moving], targets, share)
    return FrozenDict({**copied, **dict(zip(moving, moved, strict=True))})


def _moved_in_place(
    averages: Mapping[str, torch.Tensor], params: Mapping[str, torch.Tensor], share: float
) -> Mapping[str, torch.Tensor]:
    """Return what `_moved` does, to the same bits, written to the averages where they are donated."""
    if isinstance(averages, DonatedTree) and isinstance(averages.owner, OwnedStorages):
        owned, tree = averages.owner, averages.take()
        owned.unshare()
    else:
        tree = {name: tensor.clone() for name, tensor in averages.items()}
        owned = OwnedStorages([(tree, name) for name in tree])
    moving = _moving(tree)
    for name in tree.keys() - set(moving):
        tree[name].copy_(params[name])
    if moving:
        targets = [_precise(params[name]) for name in moving]
        torch_internals.foreach_lerp_([tree[name] for name in moving], targets, share)
    return DonatedTree(tree, owned)


def _moving(averages: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of what can be averaged; the others are copied."""
    return [name for name, tensor in averages.items() if tensor.is_floating_point() or tensor.is_complex()]


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in a precision in which a small step does not round to none."""
    return tensor.float() if tensor.dtype in _COARSE else tensor


_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]+")
_COARSE: Final = (torch.float16, torch.bfloat16)


EmaCallback = EMACallback
"""Alias for YAML of a class-based framework."""
