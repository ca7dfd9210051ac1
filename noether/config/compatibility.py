"""YAML that was written for a class-based framework: older paths and names, and settings that have no effect here."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, final

from noether.config.errors import InvalidValueError
from noether.core.callbacks.registry import EXPORTS
from noether.core.errors import Problem, raise_problems, suggest
from noether.core.schedules.schedule import INTERVALS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class ConfigWarning(UserWarning):
    """A setting in a configuration has no effect, or another one than where the configuration was written for."""


@final
@dataclass(frozen=True, kw_only=True)
class Translation:
    """How settings in YAML for a class-based framework become settings of noether.

    Args:
        renamed: New name by older name. Both are accepted.
        values: New value by older value, by name of a setting as it is written. Other values stay.
        ignored: Reason by name of a setting that has no effect here; a warning says so.
        replaced: What to write instead, by name of a setting that is refused.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Translation) -> Translation:
        """Return both together; where both translate a setting, `other` does."""
        return Translation(
            renamed={**self.renamed, **other.renamed},
            values={**self.values, **other.values},
            ignored={**self.ignored, **other.ignored},
            replaced={**self.replaced, **other.replaced},
        )


_ACTS_ONCE: Final = Translation(ignored=dict.fromkeys(INTERVALS, "it acts before training"))

TRANSLATIONS: Final[Mapping[str, Translation]] = {
    "CallbackBase": Translation(ignored={"batch_size": "it iterates no dataset"}),
    "BestCheckpointCallback": Translation(
        renamed={"model_name": "model_names"},
        ignored={"save_frozen_weights": "a checkpoint is whole, frozen weights included"},
        replaced={
            "eval_callbacks": "list those callbacks beside this one; to run them with the best weights after training, "
            "noether eval RUN_DIR --checkpoint best_model.METRIC"
        },
    ),
    "BestMetricCallback": Translation(renamed={"source_metric_key": "metric_key"}),
    "CheckpointCallback": Translation(renamed={"model_name": "model_names"}),
    "DatasetStatsCallback": _ACTS_ONCE,
    "EMACallback": Translation(
        replaced={"eval_callbacks": "list those callbacks after this one, each with weights: ema=FACTOR"}
    ),
    "FixedUpdateEarlyStopping": Translation(ignored=dict.fromkeys(INTERVALS, "it looks at every update")),
    "HyperparamsCallback": _ACTS_ONCE,
    "ParamCountCallback": _ACTS_ONCE,
}
"""Translations by the name of the callback in `noether.core.callbacks`; they hold for its subclasses, too."""


_DISTRIBUTED: Final = "only DistributedDataParallel reads it"
_RESUME: Final = "resume a run with noether train --resume RUN_DIR"
_LOG: Final = (
    "give each callback that logs its interval, as in {kind: noether.core.callbacks.OnlineLossCallback, %s: 10}"
)
_TRACKER: Final = "write run.wandb: {project: NAME, mode: offline}, or run.tensorboard: true"
_PROPERTIES: Final = "the model gets the batch: choose what it reads in the dataset, the model's forward or the loss"
_CHECKPOINT: Final = "write run.init_from: {path: CHECKPOINT, leave_out: [PATTERN, ...]}"
_DATASET: Final = "write it as a setting of each dataset in data"

TRAINER: Final = Translation(
    renamed={"use_torch_compile": "compile", "skip_nan_loss": "nonfinite"},
    values={
        "precision": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"},
        "skip_nan_loss": {True: "skip", False: "apply"},
    },
    ignored={
        "add_trainer_callbacks": "the trainer adds no callbacks",
        "disable_gradient_accumulation": "gradients are accumulated only where max_batch_size is given",
        "find_unused_params": _DISTRIBUTED,
        "save_on_sigint": "Ctrl-C always saves the run",
        "static_graph": _DISTRIBUTED,
    },
    replaced={
        "add_default_callbacks": "write `default` into callbacks, as in [default], or leave callbacks out",
        "forward_properties": _PROPERTIES,
        "initializer": "write run.init_from: CHECKPOINT to start with its weights; " + _RESUME,
        "kind": "there is one trainer; what yours computes as the loss is a function, in trainer.loss",
        **{f"log_{name}": _LOG % name for name in INTERVALS},
        "max_skipped_updates": "list noether.core.callbacks.NanGuardCallback with tolerance: N",
        "max_time": "write max_hours, such as 11.5: the hours after which the run is saved and left, to be resumed",
        "skip_nan_loss_max_count": "list noether.core.callbacks.NanGuardCallback with tolerance: N",
        "start_at_epoch": _RESUME,
        "target_properties": _PROPERTIES,
        **{f"track_{name}": _LOG % name for name in INTERVALS},
        "tracker": _TRACKER,
    },
)
"""The translation of the section `trainer`."""

SECTIONS: Final = Translation(
    ignored={
        "config_schema_kind": "a configuration has one schema",
        "cudnn_benchmark": "set torch.backends.cudnn.benchmark in a module of yours",
        "cudnn_deterministic": "set torch.backends.cudnn.deterministic in a module of yours",
        "debug": "try a run with noether train --smoke",
        "master_port": _DISTRIBUTED,
        "overwrite_output": "each run has a directory of its own",
        "slurm": "start noether train in your own job script, with trainer.max_hours below its limit",
        "store_code_in_output": "code is not copied",
    },
    replaced={
        "accelerator": "write trainer.device: auto, cpu or cuda",
        "dataset_kind": "write kind in each dataset of data",
        "dataset_root": _DATASET,
        "dataset_statistics": _DATASET,
        "datasets": "write data, with the datasets by key",
        "defaults": "write all settings in one file; parts that several files share can be given by --set",
        "devices": "write trainer.device, such as cuda:1",
        "name": "write run.name",
        "num_workers": "write trainer.num_workers",
        "output_path": "write run.output",
        "resume_checkpoint": _RESUME,
        "resume_output_path": _RESUME,
        "resume_patterns_to_instantiate": _CHECKPOINT,
        "resume_patterns_to_remove": _CHECKPOINT,
        "resume_patterns_to_rename": "write run.init_from: {path: CHECKPOINT, prefix: PREFIX}",
        "resume_run_id": _RESUME,
        "resume_stage_name": _RESUME,
        "run_id": "the time at which a run starts is its id; name it by run.name",
        "seed": "write run.seed",
        "stage_name": "write it into run.name",
        "tracker": _TRACKER,
    },
)
"""The translation of the names of sections."""


_MODULES: Final = ("noether.core.callbacks", "noether.training.callbacks")


def current_path(path: str) -> str:
    """Return noether's path of a callback that YAML names by a module path of the class-based framework.

    Args:
        path: A dotted path at which there is no callback. One outside of noether's callback modules is returned as it
            is.

    Raises:
        InvalidValueError: If the path is in a module that does not exist, and no callback has its last part as name.

    Example:
        >>> current_path("noether.core.callbacks.early_stoppers.metric.MetricEarlyStopper")
        'noether.core.callbacks.MetricEarlyStopper'
        >>> current_path("my_module.MetricEarlyStopper")
        'my_module.MetricEarlyStopper'
    """
    module, _, name = path.rpartition(".")
    if not f"{module}.".startswith(tuple(f"{each}." for each in _MODULES)):
        return path
    if name in EXPORTS:
        return f"{_MODULES[0]}.{name}"
    if is_module(module):
        return path
    hint = suggest(name, EXPORTS) or "; `noether callbacks` lists them"
    raise InvalidValueError(f"{path!r}: noether has no callback {name!r}{hint}")


def is_module(path: str) -> bool:
    """Return whether there is a module at a dotted path; packages around it are imported."""
    try:
        return importlib.util.find_spec(path) is not None
    except ImportError:
        return False


def translation_of(target: object) -> Translation:
    """Return the translation for a callback class, with those of its base classes; empty for a function.

    Example:
        >>> from noether.core.callbacks import BestMetricCallback
        >>> translation_of(BestMetricCallback).renamed
        {'source_metric_key': 'metric_key'}
    """
    translation = Translation()
    for kind in reversed(target.__mro__ if isinstance(target, type) else ()):
        if kind.__module__.startswith("noether.core.callbacks."):
            translation |= TRANSLATIONS.get(kind.__name__, Translation())
    return translation


def translate_settings(target: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the settings of a callback under their names here, and a problem for each setting that has no effect.

    Args:
        target: The callback class.
        settings: Settings as YAML has them. Null counts as left out for a list and for a setting of `TRANSLATIONS`.

    Raises:
        SettingsError: If a setting is given under both of its names, or is one that something else replaces.

    Example:
        >>> from noether.core.callbacks import BestMetricCallback
        >>> translate_settings(BestMetricCallback, {"source_metric_key": "val/accuracy", "target_metric_keys": None})
        ({'metric_key': 'val/accuracy'}, [])
    """
    parameters = inspect.signature(target).parameters
    lists = {each.name for each in parameters.values() if isinstance(each.default, tuple)}
    translation = translation_of(target)
    ignored = {name: reason for name, reason in translation.ignored.items() if name not in parameters}
    translation = replace(translation, ignored=ignored)
    given = {name: value for name, value in settings.items() if value is not None or name not in lists}
    translated, warnings, refusals = translate(translation, given, f"has no meaning for {target.__name__}")
    raise_problems(refusals)
    for older, name in translation.renamed.items():
        if given.get(older) is not None and name in lists:
            translated[name] = [given[older]]  # the older setting holds a single value
    return translated, warnings


def translate(
    translation: Translation, settings: Mapping[str, Any], without_effect: str = "has no effect here"
) -> tuple[dict[str, Any], list[Problem], list[Problem]]:
    """Return the settings of a section under their names here, those without effect, and those that are refused.

    Args:
        translation: The translation of the section.
        settings: Settings as YAML has them. A setting that is translated counts as left out if it is null; one that
            is refused, also if it is an empty mapping or `disabled`.
        without_effect: First words of the warning about a setting without effect.

    Example:
        >>> translate(TRAINER, {"use_torch_compile": True, "precision": "bf16"})[0]
        {'compile': True, 'precision': 'bfloat16'}
    """
    renamed, ignored, replaced = translation.renamed, translation.ignored, translation.replaced
    nullable = {*renamed, *ignored, *replaced}
    given = {name: value for name, value in settings.items() if value is not None or name not in nullable}
    given = {name: value for name, value in given.items() if name not in replaced or value not in _OFF}
    refusals = [Problem(name, f"is no setting here: {replaced[name]}") for name in given if name in replaced]
    refusals += [
        Problem(name, f"is an older name of {renamed[name]}, which is given too; leave it out")
        for name in given
        if renamed.get(name) in given
    ]
    refused = {problem.setting for problem in refusals}
    read = {name: value for name, value in given.items() if name not in {*ignored, *refused}}
    translated = {renamed.get(name, name): _translate_value(translation, name, value) for name, value in read.items()}
    warnings = [
        Problem(name, f"{without_effect} and is left out: {ignored[name]}") for name in given if name in ignored
    ]
    return translated, warnings, refusals


_OFF: Final[tuple[object, ...]] = ({}, "disabled")


def _translate_value(translation: Translation, name: str, value: Any) -> Any:
    values = translation.values.get(name, {})
    return values.get(value, value) if isinstance(value, (str, bool)) else value
