"""How the sections of a configuration are structured from plain values."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, cast, get_args, get_origin

from noether.config.compatibility import (
    SECTIONS,
    TRAINER,
    translate,
)
from noether.config.errors import InvalidValueError, collect_errors, raise_together
from noether.config.init_settings import InitSettings
from noether.config.objects.kinds import (
    DATASET,
    FACTOR,
    MODEL,
    OPTIMIZER,
    SETTING_FUNCTION,
    Kind,
    Role,
)
from noether.config.optimizer_settings import SETTINGS_OF_ALL, OptimizerSettings, ScheduleSettings
from noether.config.schema import BatchFunction, Config
from noether.config.structure.construction import arguments, construct
from noether.config.structure.converter import has_origin, is_function_type, make_converter
from noether.config.structure.entries import EntryHooks
from noether.config.structure.signatures import parameters
from noether.config.trainer_settings import CheckpointSettings, EvaluateSettings, Metric, TrainerSettings
from noether.core.errors import Problem, SettingsError, suggest
from noether.core.schedules.schedule import INTERVALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from cattrs import Converter

    from noether.config.compatibility import Translation
    from noether.config.errors import SettingPath
    from noether.config.objects.functions import Function
    from noether.config.source import Source

_OPTIMIZER_FIELDS: Final = tuple(each.name for each in dataclasses.fields(OptimizerSettings) if each.name != "kind")


def make_config_converter(allow: Sequence[str], source: Source, run_dir: Path | None = None) -> Converter:
    """Return the strict converter with the hooks of a configuration: named objects, and sections with open settings."""
    converter = make_converter()
    kinds = EntryHooks(converter, tuple(allow), source, run_dir)
    converter.register_structure_hook(EvaluateSettings, lambda value, _: _structure_evaluate(converter, value))
    converter.register_structure_hook(CheckpointSettings, lambda value, _: _structure_checkpoints(converter, value))
    converter.register_structure_hook(ScheduleSettings, lambda value, _: _structure_schedule(kinds, value))
    converter.register_structure_hook(InitSettings, lambda value, _: _structure_init(converter, value))
    converter.register_structure_hook(TrainerSettings, lambda value, _: _structure_trainer(kinds, value))
    converter.register_structure_hook(OptimizerSettings, lambda value, _: _structure_optimizer(kinds, value))
    converter.register_structure_hook(Config, lambda value, _: _structure_config(kinds, value))
    converter.register_structure_hook_func(
        lambda kind: kind in (Any, object), lambda value, _: kinds.structure_nested(value)
    )
    converter.register_structure_hook_func(_is_dataclass_of_user, kinds.structure_dataclass)
    converter.register_structure_hook_func(is_function_type, lambda value, _: kinds.function(value, SETTING_FUNCTION))
    converter.register_structure_hook_func(_is_metric_type, lambda value, _: kinds.metric(value))
    for role, base in _PART_TYPES.items():
        converter.register_structure_hook_func(partial(_derives_from, base), partial(_structure_part, kinds, role))
    converter.register_structure_hook_func(
        has_origin(Annotated), lambda value, kind: kinds.structure(value, *get_args(kind))
    )
    return converter


def _is_dataclass_of_user(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and not kind.__module__.startswith("noether.")


def _is_metric_type(kind: Any) -> bool:
    name = (getattr(kind, "__module__", ""), getattr(kind, "__name__", ""))
    return name == ("noether.core.callbacks.metric_functions", "MetricFunction")


_PART_TYPES: Final = {DATASET: ("torch.utils.data.dataset", "Dataset"), MODEL: ("torch.nn.modules.module", "Module")}


def _derives_from(base: tuple[str, str], kind: Any) -> bool:
    """Return whether an annotation is a class of torch or a subclass; torch need not be imported for that."""
    bases = getattr(get_origin(kind) or kind, "__mro__", ())
    return any((each.__module__, each.__name__) == base for each in bases)


def _structure_part(kinds: EntryHooks, role: Role, value: object, kind: Any) -> Kind:
    """Return the entry of a dataset or model that is a setting of another one."""
    part, expected = kinds.kind(value, role), get_origin(kind) or kind
    if isinstance(part.target, type) and not issubclass(part.target, expected):
        raise InvalidValueError(f"{part.path!r} is not a subclass of {expected.__qualname__}")
    return part


def _structure_evaluate(converter: Converter, value: object) -> object:
    """Return the section `evaluate`, in which every key but the intervals names a dataset."""
    if not isinstance(value, dict):
        raise InvalidValueError(f"{value!r} is not a mapping such as {{val: [loss, accuracy], every_n_epochs: 1}}")
    intervals = {name: each for name, each in value.items() if name in INTERVALS}
    datasets: dict[str, object] = {}
    errors: list[Exception] = []
    for name in (name for name in value if name not in INTERVALS):
        datasets[name] = ("loss",)  # replaces an invalid list, so that the constructor does not refuse it again
        with collect_errors(errors, name):
            if not isinstance(value[name], list):
                hint = suggest(name, INTERVALS)
                raise InvalidValueError(f"{value[name]!r} is not a list such as [loss, accuracy]{hint}")
            datasets[name] = converter.structure(value[name], tuple[Metric, ...])
    with collect_errors(errors):
        section = construct(converter, EvaluateSettings, intervals, datasets=datasets)
    raise_together(errors, EvaluateSettings)
    return section


def _structure_config(kinds: EntryHooks, value: object) -> object:
    """Return the configuration; `data.batch_size`, which is no dataset, is the field `batch_size`."""
    sections, errors = _translate(kinds, SECTIONS, value, ())
    function: Function | None = None
    data = sections.get("data") if isinstance(sections, dict) else None
    if isinstance(sections, dict) and isinstance(data, dict) and "batch_size" in data:
        sections = {**sections, "data": {name: each for name, each in data.items() if name != "batch_size"}}
        with collect_errors(errors, "data"):
            function = _structure_batch_function(kinds, data["batch_size"])
    with collect_errors(errors):
        config = construct(kinds.converter, Config, sections, source=kinds.source, batch_size=function)
    raise_together(errors, Config)
    return config


def _structure_init(converter: Converter, value: object) -> object:
    """Return the section `init_from`, which may be a path alone."""
    if isinstance(value, str):
        return InitSettings(path=value)
    if not isinstance(value, dict):
        raise InvalidValueError(f"{value!r} is not a path, and not a mapping such as {{path: pre.pt, prefix: net.}}")
    return construct(converter, InitSettings, value)


def _structure_batch_function(kinds: EntryHooks, entry: object) -> Function:
    errors: list[Exception] = []
    function: Any = None
    with collect_errors(errors, "batch_size"):
        if isinstance(entry, dict) and kinds.fits(entry.get("kind"), DATASET):
            raise InvalidValueError(
                "is no dataset, but the dotted path of a function (batch) -> number of samples; rename the dataset"
            )
        function = kinds.converter.structure(entry, cast("Any", BatchFunction))
    raise_together(errors, Config)
    return cast("Function", function)


def _structure_trainer(kinds: EntryHooks, value: object) -> object:
    """Return the section `trainer`, with the settings of a class-based framework translated."""
    settings, errors = _translate(kinds, TRAINER, value, ("trainer",))
    with collect_errors(errors):
        section = construct(kinds.converter, TrainerSettings, settings)
    raise_together(errors, TrainerSettings)
    return section


def _translate(
    kinds: EntryHooks, translation: Translation, value: object, path: SettingPath
) -> tuple[object, list[Exception]]:
    """Return a section with its settings translated, and the errors of those that are refused; warn of the others."""
    if not isinstance(value, dict):
        return value, []
    settings, without_effect, refusals = translate(translation, value)
    for problem in without_effect:
        kinds.warn((*path, problem.setting), problem.message)
    return settings, [SettingsError(refusals)] if refusals else []


def _structure_checkpoints(converter: Converter, value: object) -> object:
    """Return the section `checkpoints`; its key `async`, a keyword of Python, is the field `asynchronous`."""
    if not isinstance(value, dict) or "async" not in value:
        return construct(converter, CheckpointSettings, value)
    rest = {name: each for name, each in value.items() if name != "async"}
    errors: list[Exception] = []
    asynchronous = True
    with collect_errors(errors, "async"):
        asynchronous = converter.structure(value["async"], bool)
    with collect_errors(errors):
        section = construct(converter, CheckpointSettings, rest, asynchronous=asynchronous)
    raise_together(errors, CheckpointSettings)
    return section


def _structure_schedule(kinds: EntryHooks, value: object) -> object:
    """Return a schedule; beside the path of a function, every key that is no setting of all schedules is one of it."""
    if isinstance(value, str):
        raise InvalidValueError(f"{value!r} is not a mapping of settings: write {{kind: {value}}}")
    path = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(path, str) or "." not in path:
        return construct(kinds.converter, ScheduleSettings, value)
    fields = {name: each for name, each in value.items() if name in SETTINGS_OF_ALL}
    kind = kinds.function(value, FACTOR, beside=SETTINGS_OF_ALL)
    for name in SETTINGS_OF_ALL:
        if name in parameters(kind.target):
            message = f"has the parameter {name}, which is a setting of every schedule; rename it"
            raise SettingsError([Problem("kind", f"{kind.path} {message}")])
    return construct(kinds.converter, ScheduleSettings, fields, kind=kind)


def _structure_optimizer(kinds: EntryHooks, value: object) -> object:
    """Return the section `optimizer`, in which every key that is no field is a setting of the optimizer's class."""
    several = list(value.values()) if isinstance(value, dict) and "kind" not in value else value
    if isinstance(several, list) and any(isinstance(each, dict) and "kind" in each for each in several):
        raise InvalidValueError(
            "lists several optimizers, and this trainer steps one: write one, with groups: for other settings of some "
            "parameters, or step several in a loop of yours, with noether.Session(optimizer={name: ...})"
        )
    path, target, written = kinds.read_entry(value, OPTIMIZER)
    fields = {name: each for name, each in written.items() if name in _OPTIMIZER_FIELDS}
    others = {name: each for name, each in written.items() if name not in _OPTIMIZER_FIELDS}
    settings, errors = arguments(kinds.converter, target, others, given=OPTIMIZER.given, beside=_OPTIMIZER_FIELDS)
    with collect_errors(errors):
        section = construct(kinds.converter, OptimizerSettings, fields, kind=Kind(path, target, settings))
    errors.extend(_unknown_to_optimizer(fields, target))
    raise_together(errors, OptimizerSettings)
    return section


def _unknown_to_optimizer(fields: Mapping[str, Any], target: type) -> Iterator[SettingsError]:
    """Yield each setting, of all parameters or of a group, that the optimizer's class does not have."""
    known = [name for name in parameters(target) if name not in OPTIMIZER.given]
    names = {name: name for name in ("lr", "weight_decay") if fields.get(name) is not None}
    groups = fields.get("groups")
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        settings = group.get("settings") if isinstance(group, dict) else None
        names |= {f"groups.{index}.settings.{name}": name for name in (settings if isinstance(settings, dict) else ())}
    for setting, name in names.items():
        if name not in known:
            message = f"is not a setting of {target.__qualname__}{suggest(name, known)}"
            yield SettingsError([Problem(setting, message)])
