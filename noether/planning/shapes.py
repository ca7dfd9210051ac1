"""Builds an experiment on the meta device, where tensors have shapes but no values: a plan reads sizes from it."""

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
    from noether.training.step.optimizer import FunctionalOptimizer
    from noether.training.step.optimizer_class import OptState

_KERNEL_SETTINGS: Final = ("fused", "capturable")
"""Settings of optimizers that choose a kernel which the meta device does not have; no size depends on them."""
_MAX_CPU_PARAMS: Final = 10**8
"""Maximum number of parameters for which a plan tries an optimizer that reads values with zeros on the CPU."""


class MetaExperiment(NamedTuple):
    """An experiment on the meta device.

    Args:
        experiment: The experiment; its state is that before the first update, with the memory of callbacks.
        updated: That state with the memory that the optimizer has after an update.
        notes: What could not be built on the meta device, and why.
    """

    experiment: Experiment
    updated: TrainState
    notes: list[str]


def build_on_meta(config: Config) -> MetaExperiment:
    """Return the experiment that `config` describes, on the meta device.

    Datasets are constructed as usual. The model is constructed on the meta device or, if it needs values, on the CPU.

    Raises:
        ConfigError: As `build` does.
    """
    notes: list[str] = []
    experiment = build(_meta_config(config), model=partial(_build_model, config, notes))
    initial = experiment.state.replace(callback_states=experiment.reducer.init(experiment.state))
    updated = initial.replace(opt_state=_opt_state(experiment, notes))
    return MetaExperiment(replace(experiment, state=initial), updated, notes)


def _meta_config(config: Config) -> Config:
    optimizer = config.optimizer
    groups = tuple(replace(group, settings=_without_kernels(group.settings)) for group in optimizer.groups)
    kind = replace(optimizer.kind, settings=_without_kernels(optimizer.kind.settings))
    trainer = replace(config.trainer, device="meta", precision="float32", num_workers=0)
    return replace(config, trainer=trainer, optimizer=replace(optimizer, kind=kind, groups=groups))


def _without_kernels(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _KERNEL_SETTINGS}


def _build_model(config: Config, notes: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the meta device loses values, which is intended here
        try:
            with torch.device("meta"):
                model: nn.Module = config.model.build()
        except Exception as error:  # noqa: BLE001  # a constructor may raise anything where tensors have no values
            model = config.model.build()  # raises if the model itself is wrong
            notes.append(f"{config.model.path} was built on the CPU: it needs values of tensors ({_describe(error)})")
    return model


def _opt_state(experiment: Experiment, notes: list[str]) -> OptState:
    """Return the optimizer's memory after one update: before it, most optimizers have none."""
    optimizer, state = experiment.step.optimizer, experiment.state
    try:
        return _opt_state_after_update(optimizer, state.params, state)
    except Exception as error:  # noqa: BLE001  # as above
        reason = _describe(error)
    if sum(map(torch.numel, state.params.values())) <= _MAX_CPU_PARAMS:
        try:
            zeros = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.params.items()}
            return _opt_state_after_update(optimizer, zeros, state)
        except Exception as error:  # noqa: BLE001  # as above
            reason = _describe(error)
    name = optimizer.optimizer.__name__
    notes.append(f"the memory of {name} is not counted: it cannot be tried without values of tensors ({reason})")
    return dict(state.opt_state)


def _opt_state_after_update(
    optimizer: FunctionalOptimizer, params: Mapping[str, torch.Tensor], state: TrainState
) -> OptState:
    grads = {name: torch.zeros_like(params[name]) for name in optimizer.trainable(state.params)}
    return optimizer.update(grads, optimizer.init(params), FrozenDict(params))[1]


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
