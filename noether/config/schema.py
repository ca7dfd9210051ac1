"""The sections of a configuration. Their constructors refuse, all at once, whatever is out of range."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeAlias, final

from noether.config.errors import ConfigError, LocatedProblem, Place, SettingPath
from noether.config.objects import kinds
from noether.config.objects.kinds import Kind
from noether.config.optimizer_settings import ParamGroup, ScheduleSettings  # noqa: TC001 - as above
from noether.config.source import Source  # noqa: TC001 - as above
from noether.core.errors import Problem, check_choice, check_whole, raise_problems, suggest
from noether.core.schedules.schedule import INTERVALS

ENDS = ("max_epochs", "max_updates", "max_samples")
"""The settings of `trainer` that say where a run ends; exactly one is given."""
"""The settings that say when a callback acts."""

Model: TypeAlias = Annotated[Kind, kinds.MODEL]
Dataset: TypeAlias = Annotated[Kind, kinds.DATASET]
Callback: TypeAlias = Annotated[Kind, kinds.CALLBACK]
Function: TypeAlias = Annotated[str, kinds.FUNCTION]
EffectType: TypeAlias = Annotated[str, kinds.EFFECT]
Metric: TypeAlias = Annotated[str, "metric"]


_SEEDS: Final = 2**63


@final
@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Where Weights & Biases puts a run.

    Args:
        project: Name of the project; None for the default of the service.
        entity: Team or user; None for the default of the service.
        mode: Whether it is sent at once, kept for `wandb sync`, or neither; None for what `WANDB_MODE` says.
    """

    project: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None


@final
@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run is called, where it goes and what it begins from.

    Args:
        name: Folder of the runs, below `output`.
        output: Folder of everything.
        seed: Seed of parameters, data order, dropout and augmentation; at least 0.
        init_from: Checkpoint whose weights the run starts with; None for new ones.
        handlers: Dotted path of a type of effect to that of its handler `(effect, state, event)`.
        tensorboard: Whether metrics also go to TensorBoard, in the run's folder `tensorboard`.
        wandb: Where metrics also go at Weights & Biases; None for not there.

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
    init_from: str | None = None
    handlers: Mapping[EffectType, Function] = field(default_factory=dict)
    tensorboard: bool = False
    wandb: WandbSettings | None = None

    def __post_init__(self) -> None:
        raise_problems([_folder("name", self.name), _text("output", self.output), _seed(self.seed)])


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What `trainer.evaluate` measures, and when. In YAML the datasets stand beside the interval.

    Args:
        every_n_epochs: Interval in epochs; exactly one interval is given.
        every_n_updates: Interval in updates.
        every_n_samples: Interval in samples.
        datasets: For each dataset key `loss`, names of metrics, or dotted paths of functions.

    Raises:
        SettingsError: If an interval is no whole number, there is not exactly one, or there is nothing to measure.

    Example:
        >>> EvaluateSettings(every_n_epochs=1, datasets={"val": ("loss", "accuracy")}).datasets["val"]
        ('loss', 'accuracy')
    """

    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    every_n_samples: int | None = None
    datasets: Mapping[str, tuple[Metric, ...]]

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        yield from _exactly_one(self, INTERVALS)
        if not self.datasets:
            yield Problem("", "names no dataset; expected for example `val: [loss, accuracy]`")
        for key, metrics in self.datasets.items():
            if not metrics:
                yield Problem(key, "names nothing to measure; expected for example [loss, accuracy]")
            if len(set(metrics)) < len(metrics):
                yield Problem(key, f"{list(metrics)} names one twice")


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How checkpoints are written. In YAML `asynchronous` is called `async`, which Python has another use for.

    Args:
        asynchronous: Whether they are written in a thread of their own while training goes on.
        on_error: What one that cannot be written does: `stop` ends training, `warn` goes on without it.

    Raises:
        SettingsError: If a value is none of these.

    Example:
        >>> CheckpointSettings(on_error="ignore")
        Traceback (most recent call last):
        noether.core.errors.SettingsError: on_error: 'ignore' is not one of 'stop', 'warn'
    """

    asynchronous: bool = True
    on_error: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        raise_problems([check_choice("on_error", self.on_error, ("stop", "warn"))])


@final
@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How a run is trained, and where it ends.

    Args:
        max_epochs: End in epochs; exactly one end is given.
        max_updates: End in updates.
        max_samples: End in samples.
        effective_batch_size: Samples of one update, at least 1.
        max_batch_size: Samples of one forward pass at most; a larger update is accumulated. None for no limit.
        eval_batch_size: Samples of one forward pass in evaluation; None for that of training.
        loss: Dotted path of a pure function `(outputs, batch) -> {name: mean over samples}`.
        evaluate: What is measured during training, and when; None for nothing.
        evaluate_first: Whether that is measured before the first update, too.
        device: `cpu`, `cuda`, `cuda:1` and the like, or `auto` for the best there is.
        precision: Type that the forward pass computes in.
        nonfinite: What happens to an update whose loss or gradient is not finite.
        clip_grad_norm: Largest norm of all gradients together, above 0; None for no clipping.
        clip_grad_value: Largest absolute value of a gradient, above 0; None for no clipping.
        num_workers: Processes that load data; 0 loads in this one.
        drop_last: Whether an epoch's last batch is left out if it is short.
        checkpoints: How checkpoints are written.
        donate: Whether an update may write to the tensors of the state that it is made from: faster, in less memory,
            and to the same bits. A tensor that a callback keeps is copied first.
        compile: Whether updates are compiled as a whole by `torch.compile`: faster after some seconds, and the same up
            to the last bits. Where they cannot be, a warning says why.
        record: `events` to keep what `noether replay` needs, in `events.jsonl`; every loss is then read from its device
            at every update. None for nothing.

    Raises:
        SettingsError: If a value is out of range, or there is not exactly one end.

    Example:
        >>> TrainerSettings(max_epochs=10, max_updates=5, effective_batch_size=0, loss="my.loss")
        Traceback (most recent call last):
        noether.core.errors.SettingsError: max_updates: max_epochs and max_updates are given; expected exactly one of
        max_epochs, max_updates, max_samples
        effective_batch_size: 0 is not a whole number of at least 1
    """

    max_epochs: int | None = None
    max_updates: int | None = None
    max_samples: int | None = None
    effective_batch_size: int
    max_batch_size: int | None = None
    eval_batch_size: int | None = None
    loss: Function
    evaluate: EvaluateSettings | None = None
    evaluate_first: bool = False
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    nonfinite: Literal["apply", "skip", "raise"] = "apply"
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    num_workers: int = 0
    drop_last: bool = False
    checkpoints: CheckpointSettings = CheckpointSettings()
    donate: bool = True
    compile: bool = False
    record: Literal["events"] | None = None

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        yield from _exactly_one(self, ENDS)
        yield check_whole("effective_batch_size", self.effective_batch_size)
        for name in ("max_batch_size", "eval_batch_size"):
            yield None if getattr(self, name) is None else check_whole(name, getattr(self, name))
        for name in ("clip_grad_norm", "clip_grad_value"):
            yield None if getattr(self, name) is None else _number(name, getattr(self, name), above=True)
        if self.clip_grad_norm is not None and self.clip_grad_value is not None:
            yield Problem("clip_grad_value", "clip_grad_norm is given too; give one of them")
        yield check_whole("num_workers", self.num_workers, at_least=0)
        if self.evaluate_first and self.evaluate is None:
            yield Problem("evaluate_first", "there is nothing to evaluate; give `evaluate`")
        if not re.fullmatch(r"[a-z]+(:\d+)?", self.device):
            yield Problem("device", f"{self.device!r} is not a device such as 'auto', 'cpu', 'cuda' or 'cuda:1'")


@final
@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer. In YAML the settings of its class stand beside the ones here.

    Args:
        kind: Subclass of `torch.optim.Optimizer` with its settings, those below aside.
        lr: Learning rate, at least 0; the one that `schedule` multiplies.
        weight_decay: Weight decay, at least 0; None for the default of the class.
        schedule: How the learning rate moves; None for constant.
        weight_decay_schedule: How the weight decay moves; None for constant.
        groups: Parameters with values of their own.

    Raises:
        SettingsError: If a value is out of range.
    """

    kind: Kind
    lr: float
    weight_decay: float | None = None
    schedule: ScheduleSettings | None = None
    weight_decay_schedule: ScheduleSettings | None = None
    groups: tuple[ParamGroup, ...] = ()

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        yield _number("lr", self.lr)
        yield None if self.weight_decay is None else _number("weight_decay", self.weight_decay)
        names = [getattr(group, "name", None) for group in self.groups]
        for index, name in enumerate(names):
            if name is not None and name in names[:index]:
                yield Problem(f"groups.{index}.name", f"{name!r} is the name of an earlier group, too")


@final
@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole configuration: checked, with every default filled in, and nothing made yet.

    Args:
        run: What the run is called, where it goes and what it begins from.
        model: The model.
        data: Datasets by key; `train` is the one that is trained on.
        optimizer: The optimizer.
        trainer: How the run is trained, and where it ends.
        callbacks: The callbacks, in the order in which they are called.
        source: The text it comes from, for messages; equality does not look at it.

    Raises:
        SettingsError: If sections do not fit together.
    """

    run: RunSettings
    model: Model
    data: Mapping[str, Dataset]
    optimizer: OptimizerSettings
    trainer: TrainerSettings
    callbacks: tuple[Callback, ...] = ()
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
            yield Problem("data.train", f"is missing; it is what is trained on{suggest('train', self.data)}")
        for index, callback in enumerate(self.callbacks):
            key = _plain(callback, "settings").get("dataset_key")
            if isinstance(key, str):
                yield self._unknown_dataset(key, f"callbacks.{index}.dataset_key")
        evaluate = _plain(self.trainer, "").get("evaluate") or getattr(self.trainer, "evaluate", None)
        for key in _plain(evaluate, "datasets"):
            if key not in INTERVALS:
                yield self._unknown_dataset(key, f"trainer.evaluate.{key}", INTERVALS)

    def _unknown_dataset(self, key: str, setting: str, also: Collection[str] = ()) -> Problem | None:
        if key in self.data:
            return None
        known = ", ".join(map(repr, self.data)) or "nothing"
        return Problem(setting, f"data has no {key!r}, it has {known}{suggest(key, [*self.data, *also])}")


def _plain(section: object, inner: str) -> Mapping[str, Any]:
    """Return a mapping in a section, or the section itself where it is still as it was written.

    That is so when something else in it was refused; what does not fit together is then said in the same go.
    """
    found = section if isinstance(section, Mapping) else getattr(section, inner, None)
    return found if isinstance(found, Mapping) else {}


def _exactly_one(settings: object, names: Collection[str]) -> Iterator[Problem | None]:
    given = [name for name in names if getattr(settings, name) is not None]
    yield from (check_whole(name, getattr(settings, name)) for name in given)
    if len(given) != 1:
        said = (
            f"{' and '.join(given)} are given"
            if given
            else "no interval is given"
            if names is INTERVALS
            else "no end is given"
        )
        yield Problem(given[-1] if given else "", f"{said}; expected exactly one of {', '.join(names)}")


def _number(setting: str, value: Any, *, above: bool = False) -> Problem | None:
    fits = type(value) in (int, float) and math.isfinite(value) and (value > 0 if above else value >= 0)
    return None if fits else Problem(setting, f"{value!r} is not a number {'above' if above else 'of at least'} 0")


def _seed(value: object) -> Problem | None:
    if isinstance(value, int) and value >= _SEEDS:
        return Problem("seed", f"{value} is not below {_SEEDS}")
    return check_whole("seed", value, at_least=0)


def _folder(setting: str, value: str) -> Problem | None:
    if re.fullmatch(r"[\w.-]+", value) and value.strip("."):
        return None
    return Problem(setting, f"{value!r} is not the name of a folder; use letters, digits, '.', '_', '-'")


def _text(setting: str, value: str) -> Problem | None:
    if "\0" in value:
        return Problem(setting, f"{value!r} cannot be the name of a file")
    return None if value.strip() else Problem(setting, f"{value!r} is empty")
