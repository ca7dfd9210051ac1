"""From a configuration to everything that a run is made of."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch.utils.data import IterableDataset

from noether.config.errors import ConfigError
from noether.config.kinds import import_kind
from noether.config.optimizer_settings import ScheduleSettings
from noether.config.schema import ENDS
from noether.config.serialization import resolve_config
from noether.core.callback import declaration_of, init_of
from noether.core.callbacks.evaluation import EvaluateCallback
from noether.core.declarations import DeclarationError, check_declarations
from noether.core.errors import Problem, SettingsError
from noether.core.iteration import TrainingIteration
from noether.core.metrics import keys_overlap
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.module import forward
from noether.core.tensors.tree import clone_tensors
from noether.effects import CheckpointError
from noether.session.randomness import derive, seed_all
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.data.streamed import StreamedData, StreamedEvaluationData
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import ValueSchedule, value_schedule
from noether.training.weights import check_weights, device_of, to_device, with_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from noether.config.kinds import Kind
    from noether.config.schema import Config, TrainerSettings
    from noether.core.callback import Callback
    from noether.core.reducer import Reducer

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
_LIMIT = 2**63
"""Counts in a manifest are less than this."""


@final
@dataclass(frozen=True)
class Placed:
    """A callback, and the path of the section that describes it."""

    callback: Callback
    path: tuple[str | int, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run is made of; made by `build`.

    Args:
        config: What it was made from.
        model: The architecture; training does not use its weights.
        state: Where a new run begins.
        run: What is fixed for the run.
        callbacks: The callbacks, those of `trainer.evaluate` among them, each with its place.
        reducer: The same, composed.
        step: Makes one update.
        data: Gives the batches.
    """

    config: Config
    model: nn.Module
    state: TrainState
    run: Run
    callbacks: tuple[Placed, ...]
    reducer: Reducer
    step: Step
    data: TrainingData | StreamedData

    def to_device(self, state: TrainState) -> TrainState:
        """Return a loaded state on the device of the run.

        Raises:
            CheckpointError: If its weights are not those of this model.
        """
        check_weights(self.state, state)
        groups = self.step.optimizer.group_settings(self.state.params).values()
        fused = any(settings.get("fused") or settings.get("capturable") for settings in groups)
        return to_device(state, device_of(self.state), fused=fused)


def build(
    config: Config, run_id: str = "", *, begins: bool = True, model: Callable[[], nn.Module] | None = None
) -> Experiment:
    """Return what `config` describes, made: datasets, model, optimizer, callbacks.

    Args:
        config: A checked configuration.
        run_id: Name of the run.
        begins: Whether the run begins here; one that is gone on with needs what it was initialized from no more.
        model: Makes the model, in place of `config.model`.

    Raises:
        ConfigError: If what only the made objects can tell is wrong: a batch larger than the dataset, a parameter
            group that matches nothing, a metric that nobody produces.
    """
    trainer = config.trainer
    device = _device(config)
    datasets = {key: _dataset(config, key, kind) for key, kind in config.data.items()}
    data = _training_data(config, datasets["train"], device)
    seed_all(derive(config.run.seed, "params"))
    network = _made(config, ("model",), model or config.model.build).to(device).train()
    run = _run(config, data, datasets, network, run_id, device)
    _check_end(config, run)
    with _located(config, ("model",)):  # a lazy module has parameters without a shape
        state = _with_own_tensors(TrainState.from_module(network, seed=config.run.seed))
    if begins and config.run.init_from is not None:
        state = _init_from(config, state)
    optimizer = _optimizer(config, network)
    lr, weight_decay = _value_schedules(config, optimizer, state, run)
    run = run.replace(frozen=frozenset(state.params) - set(optimizer.trainable(state.params)))
    state = state.replace(opt_state=optimizer.init(state.params))
    streams = [data] if isinstance(data, StreamedData) else []
    callbacks = callbacks_of(config, state, run)
    reducer = compose(*streams, *(placed.callback for placed in callbacks))
    step = Step(
        model=network,
        loss=import_kind(trainer.loss),
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        precision=_PRECISIONS[trainer.precision],
        clip_grad_norm=trainer.clip_grad_norm,
        clip_grad_value=trainer.clip_grad_value,
        nonfinite=trainer.nonfinite,
        grad_norm="grad_norm" in reducer.readings,
        finite="finite" in reducer.readings,
        elapsed_s=time.perf_counter if "forward_s" in reducer.readings else None,
        donate=trainer.donate,
    )
    return Experiment(
        config=config,
        model=network,
        state=state,
        run=run,
        callbacks=tuple(callbacks),
        reducer=reducer,
        step=step,
        data=data,
    )


def _with_own_tensors(state: TrainState) -> TrainState:
    """Return the state with params and buffers of its own, so that it does not change with a live model."""
    return state.replace(params=clone_tensors(state.params), buffers=clone_tensors(state.buffers))


def _dataset(config: Config, key: str, kind: Kind) -> Any:
    # A dataset that draws its split in its constructor has to draw the same one when the run goes on.
    seed_all(derive(config.run.seed, f"data/{key}"))
    return _made(config, ("data", key), kind.build)


def _made(config: Config, path: tuple[str, ...], make: Callable[[], Any]) -> Any:
    with _located(config, path):
        return make()


@contextmanager
def _located(config: Config, path: tuple[str | int, ...]) -> Iterator[None]:
    """Give refusals of objects the place of the section that described them."""
    try:
        yield
    except SettingsError as error:
        raise _errors(config, path, error.problems) from error
    except (ValueError, TypeError, RuntimeError) as error:  # the last is what torch says of sizes that cannot be
        raise config.error(path, str(error)) from error


def _errors(config: Config, path: tuple[str | int, ...], problems: Sequence[Problem]) -> ConfigError:
    errors = [config.error((*path, *_way(config, problem.setting)), problem.message) for problem in problems]
    return ConfigError([located for error in errors for located in error.problems])


def _way(config: Config, setting: str) -> tuple[str | int, ...]:
    """Return the dotted name of a setting as a path; the optimizer knows its groups by name, the YAML by number."""
    for index, group in enumerate(config.optimizer.groups):
        if f"{setting}.".startswith(f"groups.{group.name}."):
            inside = setting.removeprefix(f"groups.{group.name}").removeprefix(".")
            return ("groups", index, *_way(config, inside))
    return tuple(int(part) if part.isdecimal() else part for part in setting.split(".")) if setting else ()


def _device(config: Config) -> torch.device:
    name = config.trainer.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise config.error(
            ("trainer", "device"), f"{name!r} cannot be used here: {reason}; 'auto' takes what there is"
        ) from error
    return torch.device(name)


def _training_data(config: Config, dataset: Any, device: torch.device) -> TrainingData | StreamedData:
    trainer = config.trainer
    settings: dict[str, Any] = {
        "seed": config.run.seed,
        "effective_batch_size": trainer.effective_batch_size,
        "max_batch_size": trainer.max_batch_size,
        "drop_last": trainer.drop_last,
        "device": device,
    }
    streamed = isinstance(dataset, IterableDataset)
    if streamed and trainer.num_workers:
        raise config.error(("trainer", "num_workers"), "an IterableDataset is read in this process; set it to 0")
    try:
        if streamed:
            return StreamedData(dataset, **settings)
        return TrainingData(dataset, **settings, num_workers=trainer.num_workers)
    except TypeError as error:
        raise config.error(("data", "train"), str(error)) from error
    except ValueError as error:
        raise config.error(("trainer", "effective_batch_size"), str(error)) from error


def _evaluation_data(config: Config, dataset: Any, device: torch.device) -> EvaluationData | StreamedEvaluationData:
    trainer = config.trainer
    size = trainer.eval_batch_size or trainer.max_batch_size or trainer.effective_batch_size
    settings: dict[str, Any] = {"seed": config.run.seed, "batch_size": size, "device": device}
    if isinstance(dataset, IterableDataset):
        return StreamedEvaluationData(dataset, **settings)
    return EvaluationData(dataset, **settings, num_workers=trainer.num_workers)


def _run(
    config: Config,
    data: TrainingData | StreamedData,
    datasets: Mapping[str, Any],
    model: nn.Module,
    run_id: str,
    device: torch.device,
) -> Run:
    trainer = config.trainer
    evaluated = {
        key: _made(config, ("data", key), partial(_evaluation_data, config, dataset, device))
        for key, dataset in datasets.items()
        # To evaluate a stream that is trained on would take its place away.
        if key != "train" or not isinstance(dataset, IterableDataset)
    }
    return Run(
        end=_end(trainer),
        updates_per_epoch=data.batching.updates_per_epoch,
        samples_per_epoch=data.batching.samples_per_epoch,
        effective_batch_size=data.batching.effective_batch_size,
        run_id=run_id,
        config=resolve_config(config),
        data=evaluated,
        forward=forward(model, import_kind(trainer.loss), precision=_PRECISIONS[trainer.precision]),
    )


def _check_end(config: Config, run: Run) -> None:
    if run.final.sample >= _LIMIT:
        name = next(name for name in ENDS if getattr(config.trainer, name) is not None)
        message = f"{getattr(config.trainer, name)} is beyond what a checkpoint can count, {_LIMIT - 1:,} samples"
        raise config.error(("trainer", name), message)


def _end(trainer: TrainerSettings) -> TrainingIteration:
    return TrainingIteration(trainer.max_epochs or 0, trainer.max_updates or 0, trainer.max_samples or 0)


def _init_from(config: Config, state: TrainState) -> TrainState:
    """Return the state with the weights of another run's checkpoint."""
    path = Path(config.run.init_from or "")
    try:
        return with_weights(state, path)
    except CheckpointError as error:
        right = "give a checkpoint like runs/NAME/RUN_ID/checkpoints/latest"
        raise config.error(("run", "init_from"), f"{str(path)!r}: {error}; {right}") from error


def _optimizer(config: Config, model: nn.Module) -> FunctionalOptimizer:
    optimizer = config.optimizer
    own = {"lr": optimizer.lr} | ({} if optimizer.weight_decay is None else {"weight_decay": optimizer.weight_decay})
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    with _located(config, ("optimizer",)):
        return FunctionalOptimizer(
            cast("Any", optimizer.kind.target), {**optimizer.kind.settings, **own}, optimizer.groups, frozen
        )


def _value_schedules(
    config: Config, optimizer: FunctionalOptimizer, state: TrainState, run: Run
) -> tuple[dict[str, ValueSchedule], dict[str, ValueSchedule]]:
    with _located(config, ("optimizer",)):
        groups = optimizer.group_settings(state.params)

    def schedules(setting: str, name: str) -> dict[str, ValueSchedule]:
        settings = getattr(config.optimizer, name) or ScheduleSettings()
        lengths = {"total_updates": run.final.update, "updates_per_epoch": run.updates_per_epoch}
        with _located(config, ("optimizer", name)):
            return {
                group: value_schedule(own[setting], settings, **lengths)
                for group, own in groups.items()
                if setting in own
            }

    return schedules("lr", "schedule"), schedules("weight_decay", "weight_decay_schedule")


def callbacks_of(config: Config, state: TrainState, run: Run, before: Sequence[Callback] = ()) -> list[Placed]:
    """Return the configured callbacks, with those of `trainer.evaluate` before their first consumers.

    Args:
        config: A checked configuration.
        state: Where the run begins; of its tensors only names, shapes and types matter.
        run: What is fixed for the run.
        before: Callbacks that come before those that are configured.

    Raises:
        ConfigError: If they do not fit together, or do not fit the model.
    """
    placed = [Placed(each, ("callbacks",)) for each in before]
    placed += [Placed(kind.build(), ("callbacks", index)) for index, kind in enumerate(config.callbacks)]
    for evaluation in _evaluations(config):
        index = next((i for i, each in enumerate(placed) if _consumes(each.callback, evaluation)), len(placed))
        placed.insert(index, Placed(evaluation, ("trainer", "evaluate", evaluation.dataset_key)))
    for each in placed:
        with _located(config, each.path):
            init_of(each.callback, state)  # only with the model there, some can tell whether their settings fit
        key = getattr(each.callback, "dataset_key", None)
        if key is not None and key not in run.data:
            message = f"{key!r} is the stream that is trained on; evaluate another"
            raise config.error((*each.path, "dataset_key"), message)
    _check_fit(config, placed, state, run)
    return placed


def _check_fit(config: Config, placed: Sequence[Placed], state: TrainState, run: Run) -> None:
    try:
        check_declarations([each.callback for each in placed], state, run)
    except DeclarationError as error:
        where = {id(each.callback): each.path for each in placed}
        errors = [config.error(where[id(misfit.callback)], misfit.message) for misfit in error.misfits]
        raise ConfigError([located for each in errors for located in each.problems]) from error


def _evaluations(config: Config) -> list[EvaluateCallback]:
    evaluate = config.trainer.evaluate
    if evaluate is None:
        return []
    intervals = {name: getattr(evaluate, name) for name in ("every_n_epochs", "every_n_updates", "every_n_samples")}
    made = []
    for key, measures in evaluate.datasets.items():
        functions = tuple(import_kind(measure) if "." in measure else measure for measure in measures)
        with _located(config, ("trainer", "evaluate", key)):
            made.append(EvaluateCallback(dataset_key=key, measures=functions, **intervals))
    return made


def _consumes(callback: Callback, producer: EvaluateCallback) -> bool:
    declared = declaration_of(callback)
    return any(
        keys_overlap(pattern, key) for key in (*declared.consumes, *declared.uses) for pattern in producer.produces
    )
