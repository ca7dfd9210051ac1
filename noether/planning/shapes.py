"""An experiment on the meta device, where tensors have shapes and no values: what sizes are read from."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from noether.core.tensors.tree import FrozenDict
from noether.training.experiment import build

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from noether.config import Config
    from noether.core.state import TrainState
    from noether.training.experiment import Experiment
    from noether.training.step.optimizer import FunctionalOptimizer, OptState

_KERNELS: Final = ("fused", "capturable")
"""Settings of optimizers that choose a kernel which is not there on the meta device; no size depends on them."""
_MOST_ZEROS: Final = 10**8
"""Parameters that are made on the CPU at most, where an optimizer reads values."""


class Shapes(NamedTuple):
    """An experiment on the meta device.

    Args:
        experiment: Its state is that before the first update, with the memory of callbacks.
        updated: That state with the memory that the optimizer has after an update.
        notes: What could not be made that way, and why.
    """

    experiment: Experiment
    updated: TrainState
    notes: list[str]


def shapes(config: Config) -> Shapes:
    """Return the experiment that `config` describes, on the meta device.

    Datasets are made as they are. The model is made on the meta device or, if it needs values, on the CPU.

    Raises:
        ConfigError: As `build` does.
    """
    notes: list[str] = []
    experiment = build(_without_kernels(config), begins=False, model=partial(_model, config, notes))
    begun = experiment.state.replace(callback_states=experiment.reducer.init(experiment.state))
    updated = begun.replace(opt_state=_opt_state(experiment, notes))
    return Shapes(replace(experiment, state=begun), updated, notes)


def _without_kernels(config: Config) -> Config:
    optimizer = config.optimizer
    groups = tuple(replace(group, settings=_without(group.settings)) for group in optimizer.groups)
    kind = replace(optimizer.kind, settings=_without(optimizer.kind.settings))
    trainer = replace(config.trainer, device="meta", precision="float32", num_workers=0)
    return replace(config, trainer=trainer, optimizer=replace(optimizer, kind=kind, groups=groups))


def _without(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _KERNELS}


def _model(config: Config, notes: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that values are lost, which is what is wanted here
        try:
            with torch.device("meta"):
                made: nn.Module = config.model.build()
        except Exception as error:  # noqa: BLE001  # whatever a constructor meets where there are no values
            made = config.model.build()  # what is really wrong with it, this raises
            notes.append(f"{config.model.path} was made on the CPU: it cannot be made without values ({_said(error)})")
    return made


def _opt_state(experiment: Experiment, notes: list[str]) -> OptState:
    """Return the optimizer's memory after one update: before it, most have none."""
    optimizer, state = experiment.step.optimizer, experiment.state
    try:
        return _updated(optimizer, state.params, state)
    except Exception as error:  # noqa: BLE001  # as above
        reason = _said(error)
    if sum(map(torch.numel, state.params.values())) <= _MOST_ZEROS:
        try:
            zeros = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.params.items()}
            return _updated(optimizer, zeros, state)
        except Exception as error:  # noqa: BLE001  # as above
            reason = _said(error)
    name = optimizer.optimizer.__name__
    notes.append(f"the memory of {name} is not counted: it cannot be tried without values ({reason})")
    return dict(state.opt_state)


def _updated(optimizer: FunctionalOptimizer, params: Mapping[str, torch.Tensor], state: TrainState) -> OptState:
    grads = {name: torch.zeros_like(params[name]) for name in optimizer.trainable(state.params)}
    return optimizer.update(grads, optimizer.init(params), FrozenDict(params))[1]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
