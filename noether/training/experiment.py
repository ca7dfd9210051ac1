"""Builds everything that a run consists of from a configuration: data, model, optimizer step and callbacks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast, final

import torch

from noether.config.objects.kinds import build_nested
from noether.config.optimizer_settings import ScheduleSettings
from noether.config.serialization import resolve_config
from noether.config.trainer_settings import ENDS
from noether.core.errors import Problem, SettingsError
from noether.core.iteration import TrainingIteration
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.forward import forward
from noether.core.tensors.live.views import PARTS
from noether.core.tensors.modes import start_training_mode
from noether.core.tensors.module import device_of, frozen_names
from noether.core.tensors.step_counters import counts_on_device
from noether.core.tensors.tree import clone_tensors
from noether.distributed.ranks import ONE_PROCESS, Ranks
from noether.distributed.sharding import Sharding
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.disk.tensor_files import describe_unsavable
from noether.session.randomness import derive, seed_all
from noether.training.configured_callbacks import build_callbacks, check_handlers
from noether.training.configured_data import build_datasets, build_evaluation_data, build_training_data
from noether.training.data.streamed import StreamedData
from noether.training.devices import choose_device
from noether.training.error_locations import build_located_function, locate_errors
from noether.training.initial_weights import load_weights
from noether.training.step.loss_scaling import LossScaling, find_float16_problem
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.parallel_modules import refuse_cpu_sync_norms
from noether.training.step.sharded import find_optimizer_problem, place_state
from noether.training.step.step import Step
from noether.training.value_schedules import ValueSchedule, value_schedule
from noether.training.weights import check_opt_state, fit_weights, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from noether.config.schema import Config
    from noether.core.reducer import Reducer
    from noether.training.configured_callbacks import ConfiguredCallback
    from noether.training.data.indexed import TrainingData

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TIME_READINGS = frozenset({"forward_s", "backward_s", "optimizer_s"})
_SAMPLE_LIMIT = 2**63
"""A manifest can store only smaller counts."""


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run consists of; `build` returns it.

    Args:
        config: The configuration.
        model: The architecture; training does not use its weights.
        state: The initial state of a new run.
        run: The facts that stay fixed during the run.
        callbacks: The callbacks, those of `trainer.evaluate` included, each with its section.
        reducer: The same callbacks, composed.
        step: Makes one update.
        data: Returns the batches.
        ranks: The processes that train it.
        notes: Lines for the user on what the run starts from.
    """

    config: Config
    model: nn.Module
    state: TrainState
    run: Run
    callbacks: tuple[ConfiguredCallback, ...]
    reducer: Reducer
    step: Step
    data: TrainingData | StreamedData
    ranks: Ranks = ONE_PROCESS
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """Stop the processes that load samples; a later use starts them again."""
        self.data.close()
        for dataset in self.run.data.values():
            dataset.close()

    def to_device(self, state: TrainState) -> TrainState:
        """Return a loaded state on the device of the run.

        Raises:
            CheckpointError: If its weights do not fit this model.
        """
        state = fit_weights(self.state, state, self.model)
        check_opt_state(self.step.optimizer, state)
        groups = self.step.optimizer.group_settings(self.state.params).values()
        device = device_of(self.state.params.values())
        state = to_device(state, device, counts_on_device=any(map(counts_on_device, groups)))
        return state if self.step.sharding is None else place_state(state, self.step.sharding)


def build(
    config: Config,
    run_id: str = "",
    *,
    fresh: bool = True,
    model: Callable[[], nn.Module] | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Experiment:
    """Return the datasets, model, optimizer and callbacks that `config` describes.

    Args:
        config: A checked configuration.
        run_id: Name of the run.
        fresh: Whether the run starts here; a resumed run ignores `init_from`.
        model: Builds the model, in place of `config.model`.
        ranks: The processes that train the run.

    Raises:
        ConfigError: If something is wrong that only the built objects show: a batch larger than the dataset, a
            parameter group that matches nothing, a metric that no callback produces, an effect that nothing handles.
    """
    device = choose_device(config, are_several=ranks.are_several)
    datasets = build_datasets(config)
    data = build_training_data(config, datasets["train"], device, ranks)
    network = _build_model(config, model or config.model.build, device)
    count = (
        {}
        if config.batch_size is None
        else {"batch_size": build_located_function(config, ("data", "batch_size"), config.batch_size)}
    )
    loss = build_located_function(config, ("trainer", "loss"), config.trainer.loss)
    run = Run(
        end=configured_end(config),
        updates_per_epoch=data.batching.updates_per_epoch,
        samples_per_epoch=data.batching.samples_per_epoch,
        effective_batch_size=data.batching.effective_batch_size,
        run_id=run_id,
        rank=ranks.rank,
        world_size=ranks.world_size,
        gather=ranks.control.gather,
        config=resolve_config(config),
        data=build_evaluation_data(config, datasets, device),
        forward=forward(network, loss, precision=_PRECISIONS[config.trainer.precision]),
        **count,
    )
    _check_end(config, run)
    state, notes = _initial_state(config, network, fresh=fresh)
    optimizer = _build_optimizer(config, network, state.tied_names)
    lr, weight_decay = build_value_schedules(config, optimizer, state, run)
    run = run.replace(frozen=frozenset(state.params) - set(optimizer.trainable(state.params)))
    state = state.replace(opt_state=optimizer.init(state.params), lengths=data.batching.lengths)
    sharding = _build_sharding(config, state, ranks)
    state = state if sharding is None else place_state(state, sharding)
    callbacks = build_callbacks(config, state, run)
    check_handlers(config, callbacks)
    scaling = _build_loss_scaling(config, state, device)
    members = [each for each in (data, scaling) if isinstance(each, (StreamedData, LossScaling))]
    reducer = compose(*members, *(configured.callback for configured in callbacks))
    with locate_errors(config, ("model",)):  # it refuses a model that holds parameters outside of its modules
        step = Step(
            model=network,
            loss=loss,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            precision=_PRECISIONS[config.trainer.precision],
            loss_scaling=scaling,
            clip_grad_norm=config.trainer.clip_grad_norm,
            clip_grad_value=config.trainer.clip_grad_value,
            nonfinite=config.trainer.nonfinite,
            grad_norm="grad_norm" in reducer.readings,
            gradients=partial(reducer.reads, "gradients") if "gradients" in reducer.readings else None,
            finite="finite" in reducer.readings,
            rank=ranks.rank,
            elapsed_s=time.perf_counter if _TIME_READINGS & set(reducer.readings) else None,
            batch_size=run.batch_size,
            donate=config.trainer.donate,
            sharding=sharding,
        )
        if ranks.are_several:
            refuse_cpu_sync_norms(network, device)
    return Experiment(
        config=config,
        model=network,
        state=state,
        run=run,
        callbacks=tuple(callbacks),
        reducer=reducer,
        step=step,
        data=data,
        ranks=ranks,
        notes=notes,
    )


def configured_end(config: Config) -> TrainingIteration:
    """Return the end of a run that `config` gives, a point on one counter."""
    trainer = config.trainer
    return TrainingIteration(trainer.max_epochs or 0, trainer.max_updates or 0, trainer.max_samples or 0)


def _check_end(config: Config, run: Run) -> None:
    """Raise a ConfigError if the run trains on more samples than a manifest can store."""
    if run.final.sample >= _SAMPLE_LIMIT:
        name = next(name for name in ENDS if getattr(config.trainer, name) is not None)
        message = f"{getattr(config.trainer, name)} is more than a checkpoint can count: {_SAMPLE_LIMIT - 1:,} samples"
        raise config.error(("trainer", name), message)


# Model


def _build_model(config: Config, make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    seed_all(derive(config.run.seed, "params"))
    with locate_errors(config, ("model",)):
        model = make().to(device)
        start_training_mode(model)
    return model


def _initial_state(config: Config, model: nn.Module, *, fresh: bool) -> tuple[TrainState, tuple[str, ...]]:
    """Return the state that a new run starts from, and a line on weights that it takes from elsewhere.

    Its tensors are copies, so the live model does not change them.
    """
    with locate_errors(config, ("model",)):  # the parameters of a lazy module have no shape
        state = TrainState.from_module(model, seed=config.run.seed)
        if (problem := describe_unsavable({**state.params, **state.buffers})) is not None:
            raise config.error(("model",), problem)
        copies = {field: clone_tensors(getattr(state, field)) for field in PARTS}
        state = state.replace(**copies)
    if not fresh or config.run.init_from is None:
        return state, ()
    with locate_errors(config, ("run", "init_from")):
        try:
            state, line = load_weights(state, config.run.init_from, model)
        except CheckpointError as error:
            raise SettingsError([Problem("", str(error))]) from error
    return state, (line,)


# Step


def _build_optimizer(config: Config, model: nn.Module, tied: Mapping[str, str]) -> FunctionalOptimizer:
    optimizer = config.optimizer
    settings = {**build_nested(optimizer.kind.settings), "lr": optimizer.lr}
    if optimizer.weight_decay is not None:
        settings["weight_decay"] = optimizer.weight_decay
    frozen = frozen_names(model)
    with locate_errors(config, ("optimizer",)):
        return FunctionalOptimizer(cast("Any", optimizer.kind.target), settings, optimizer.groups, frozen, tied)


def _build_loss_scaling(config: Config, state: TrainState, device: torch.device) -> LossScaling | None:
    if config.trainer.precision != "float16":
        return None
    if problem := find_float16_problem(device, state.params):
        raise config.error(("trainer", "precision"), problem)
    return LossScaling()


def _build_sharding(config: Config, state: TrainState, ranks: Ranks) -> Sharding | None:
    """Return where parameters are under `trainer.parallel: shard`; None if each rank has all."""
    if config.trainer.parallel != "shard" or not ranks.are_several:
        return None
    if problem := find_optimizer_problem(config.optimizer.kind.target):
        raise config.error(("optimizer",), problem)
    return Sharding(state.params, ranks)


def build_value_schedules(
    config: Config, optimizer: FunctionalOptimizer, state: TrainState, run: Run
) -> tuple[dict[str, ValueSchedule], dict[str, ValueSchedule]]:
    """Return the schedules of the learning rate and of the weight decay, by parameter group."""
    with locate_errors(config, ("optimizer",)):
        groups = optimizer.group_settings(state.params)
    lengths = {"total_updates": run.final.update, "updates_per_epoch": run.updates_per_epoch}

    def build_schedules(setting: str, section: str) -> dict[str, ValueSchedule]:
        schedule = getattr(config.optimizer, section) or ScheduleSettings()
        with locate_errors(config, ("optimizer", section)):
            return {
                group: value_schedule(settings[setting], schedule, **lengths)
                for group, settings in groups.items()
                if setting in settings
            }

    return build_schedules("lr", "schedule"), build_schedules("weight_decay", "weight_decay_schedule")
