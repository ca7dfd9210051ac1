"""The sections of a configuration; a constructor reports every value that is out of range at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeAlias, final

from noether.config.errors import ConfigError, LocatedProblem, Place, SettingPath
from noether.config.init_settings import InitSettings  # noqa: TC001 - read at run time, as below
from noether.config.objects import kinds
from noether.config.objects.functions import Function
from noether.config.objects.kinds import Kind
from noether.config.optimizer_settings import OptimizerSettings  # noqa: TC001  # read at run time, as below
from noether.config.source import Source  # noqa: TC001 - the annotations of a dataclass are read at run time
from noether.config.trainer_settings import TrainerSettings  # noqa: TC001  # as above
from noether.core.errors import Problem, check_whole, raise_problems, suggest
from noether.core.schedules.schedule import INTERVALS

Model: TypeAlias = Annotated[Kind, kinds.MODEL]
Dataset: TypeAlias = Annotated[Kind, kinds.DATASET]
Callback: TypeAlias = Annotated[Kind, kinds.CALLBACK]
BatchFunction: TypeAlias = Annotated[Function, kinds.BATCH_FUNCTION]
Handler: TypeAlias = Annotated[Function, kinds.HANDLER]
EffectType: TypeAlias = Annotated[str, kinds.EFFECT]

_SEED_LIMIT: Final = 2**63
_NAME_BYTES: Final = 255


@final
@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Settings of the log at Weights & Biases.

    Args:
        project: Name of the project; None for the default of the service.
        entity: Team or user; None for the default of the service.
        mode: `online` sends the log during the run, `offline` keeps it for `wandb sync`, `disabled` writes none; None
            for the value of `WANDB_MODE`.
    """

    project: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None


@final
@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Name, output folder, seed, initial weights and logs of a run.

    Args:
        name: Folder of the runs, under `output`.
        output: Folder of all output.
        seed: Seed of parameters, data order, dropout and augmentation; from 0 to 2**63 - 1.
        init_from: Checkpoint or file whose weights the run starts with; None for newly initialized weights. A resumed
            run ignores it.
        handlers: Maps the dotted path of a type of effect to its handler `(effect, state, event)`, as for
            `trainer.loss`. Of several ranks, only rank 0 calls handlers. A handler may have the keyword parameters
            `directory`, the path of the run (of the evaluation for `noether eval`), and `services`, the log services in
            use by name.
        tensorboard: Whether to write metrics to TensorBoard too, in the run's folder `tensorboard`.
        wandb: Settings for logging metrics to Weights & Biases too; None to not use it.

    Raises:
        SettingsError: If a value is out of range.

    Example:
        >>> RunSettings(name="digits/1", seed=-1)
        Traceback (most recent call last):
        noether.core.errors.SettingsError: name: 'digits/1' is not the name of a folder;
        use letters, digits, '.', '_', '-'
        seed: -1 is not a whole number of at least 0
    """

    name: str
    output: str = "runs"
    seed: int = 0
    init_from: InitSettings | None = None
    handlers: Mapping[EffectType, Handler] = field(default_factory=dict)
    tensorboard: bool = False
    wandb: WandbSettings | None = None

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        if not re.fullmatch(r"[\w.-]+", self.name) or not self.name.strip("."):
            message = f"{self.name!r} is not the name of a folder; use letters, digits, '.', '_', '-'"
            yield Problem("name", message)
        elif (size := len(self.name.encode())) > _NAME_BYTES:
            yield Problem("name", f"has {size} bytes, and the name of a folder has at most {_NAME_BYTES}")
        if "\0" in self.output:
            yield Problem("output", f"{self.output!r} cannot be the name of a file; remove the null character")
        if not self.output.strip():
            yield Problem("output", f"{self.output!r} is empty; give a folder such as 'runs'")
        yield check_whole("seed", self.seed, at_least=0) or (
            Problem("seed", f"{self.seed} is not below {_SEED_LIMIT}") if self.seed >= _SEED_LIMIT else None
        )


@final
@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole configuration, checked and with every default filled in; its model and data are not built yet.

    Args:
        run: Name, output folder, seed, initial weights and logs of the run.
        model: The model.
        data: Datasets by key; training uses `train`.
        optimizer: The optimizer.
        trainer: How the run is trained, and where it ends.
        callbacks: The callbacks in the order of their calls. In YAML, `default` stands for callbacks that log losses,
            learning rate and progress, evaluate `val`, and keep the newest and the best checkpoint; so does a
            configuration without `callbacks`.
        batch_size: Function `batch -> number of samples` as for `trainer.loss`, in YAML `data.batch_size`; None to
            count the samples that are collated into a batch. It is needed for a dataset whose `collate` leaves samples
            out of batches whose tensors differ in their first dimension, or where a sample is something else than an
            item.
        source: The text that it was read from, for messages; equality ignores it.

    Raises:
        SettingsError: If sections do not fit together.
    """

    run: RunSettings
    model: Model
    data: Mapping[str, Dataset]
    optimizer: OptimizerSettings
    trainer: TrainerSettings
    callbacks: tuple[Callback, ...] = ()
    batch_size: BatchFunction | None = None
    source: Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def place(self, path: SettingPath) -> Place:
        """Return where the setting at `path` was written."""
        return self.source.place(path) if self.source else Place("configuration")

    def error(self, path: SettingPath, message: str) -> ConfigError:
        """Return an error about the setting at `path`, with the place where it was written."""
        return ConfigError([LocatedProblem(self.place(path), path, message)])

    def _problems(self) -> Iterator[Problem | None]:
        if "train" not in self.data:
            yield Problem("data.train", f"is missing; training uses that dataset{suggest('train', self.data)}")
        for index, callback in enumerate(self.callbacks):
            key = _mapping_in(callback, "settings").get("dataset_key")
            if isinstance(key, str):
                yield self._unknown_dataset(key, f"callbacks.{index}.dataset_key")
        evaluate = _mapping_in(self.trainer, "").get("evaluate") or getattr(self.trainer, "evaluate", None)
        for key in _mapping_in(evaluate, "datasets"):
            if key not in INTERVALS:
                yield self._unknown_dataset(key, f"trainer.evaluate.{key}", INTERVALS)

    def _unknown_dataset(self, key: str, setting: str, also: Collection[str] = ()) -> Problem | None:
        if key in self.data:
            return None
        known = ", ".join(map(repr, self.data)) or "nothing"
        return Problem(setting, f"data has no {key!r}, it has {known}{suggest(key, [*self.data, *also])}")


def _mapping_in(section: object, field: str) -> Mapping[str, Any]:
    """Return the mapping in a field of a section, or the section itself while it is still a mapping from YAML.

    It is a mapping if another setting in it is invalid; problems between sections are then reported at the same time.
    """
    found = section if isinstance(section, Mapping) else getattr(section, field, None)
    return found if isinstance(found, Mapping) else {}
