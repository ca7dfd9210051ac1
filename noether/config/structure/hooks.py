"""How the sections of a configuration, and the objects that they name, are structured from plain values."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args, get_origin

from noether.config.compatibility import ConfigWarning, translate_settings
from noether.config.errors import InvalidValueError, LocatedProblem, collect_errors, raise_together
from noether.config.objects.function_callback import FunctionCallbackFactory
from noether.config.objects.kinds import (
    CALLBACK,
    DATASET,
    FUNCTION,
    MODEL,
    OPTIMIZER,
    OUTPUT_FUNCTION,
    PART,
    Kind,
    Role,
    check_constructible,
    resolve,
)
from noether.config.schema import (
    BatchFunction,
    CheckpointSettings,
    Config,
    EvaluateSettings,
    Metric,
    OptimizerSettings,
)
from noether.config.structure.construction import arguments, construct, construct_with_settings
from noether.config.structure.converter import has_origin, make_converter
from noether.config.structure.signatures import parameters
from noether.core.errors import Problem, SettingsError, suggest
from noether.core.schedules.schedule import INTERVALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cattrs import Converter

    from noether.config.source import Source

_SETTING_FUNCTION: Final = dataclasses.replace(FUNCTION, fits=callable, expected="a callable")
_OPTIMIZER_FIELDS: Final = tuple(each.name for each in dataclasses.fields(OptimizerSettings) if each.name != "kind")


def make_config_converter(allow: Sequence[str], source: Source, run_dir: Path | None = None) -> Converter:
    """Return the strict converter with the hooks of a configuration: named objects, and sections with open settings."""
    converter = make_converter()
    kinds = _KindHooks(converter, tuple(allow), source, run_dir)
    converter.register_structure_hook(EvaluateSettings, lambda value, _: _structure_evaluate(converter, value))
    converter.register_structure_hook(CheckpointSettings, lambda value, _: _structure_checkpoints(converter, value))
    converter.register_structure_hook(OptimizerSettings, lambda value, _: _structure_optimizer(kinds, value))
    converter.register_structure_hook(Config, lambda value, _: _structure_config(converter, value, source))
    converter.register_structure_hook_func(
        has_origin(Callable, type), lambda value, _: kinds.resolve(value, _SETTING_FUNCTION)
    )
    for role, base in _PART_TYPES.items():
        converter.register_structure_hook_func(partial(_derives_from, base), partial(_structure_part, kinds, role))
    converter.register_structure_hook_func(
        has_origin(Annotated), lambda value, kind: kinds.structure(value, *get_args(kind))
    )
    return converter


@dataclass(frozen=True)
class _KindHooks:
    """Structures settings that name an object by its dotted path."""

    converter: Converter
    allow: tuple[str, ...]
    source: Source
    run_dir: Path | None

    def structure(self, value: object, kind: type, role: Role | str) -> object:
        if kind is Kind and isinstance(role, Role):
            return self.callback(value) if role is CALLBACK else self.kind(value, role)
        path: str = self.converter.structure(value, str)
        # Text without a dot names a metric of noether; the callback that measures it checks the name.
        if isinstance(role, Role) or "." in path:
            self.resolve(path, role if isinstance(role, Role) else OUTPUT_FUNCTION)
        return path

    def resolve(self, path: object, role: Role) -> Any:
        return resolve(path, role, self.allow, self.run_dir)

    def kind(self, value: object, role: Role) -> Kind:
        """Return an entry with checked settings, nested entries included; `Kind.build` constructs them later."""
        path, target, written = self.read_entry(value, role)
        settings, errors = arguments(self.converter, target, written, given=role.given)
        for name, setting in settings.items():
            with collect_errors(errors, name):
                settings[name] = self.nested(setting)
        raise_together(errors, Kind)
        return Kind(path, target, settings)

    def nested(self, value: Any) -> Any:
        """Return a setting with each mapping in it that has a dotted path as `kind` structured as an entry."""
        if isinstance(value, dict) and "." in str(value.get("kind")):
            return self.kind(value, PART)
        if not isinstance(value, (dict, list, tuple)):
            return value
        parts = dict(value if isinstance(value, dict) else enumerate(value))
        errors: list[Exception] = []
        for part, inner in parts.items():
            with collect_errors(errors, part):
                parts[part] = self.nested(inner)
        raise_together(errors, Kind)
        return parts if isinstance(value, dict) else type(value)(parts.values())

    def callback(self, value: object) -> Kind:
        """Return the entry of a callback, which is constructed now so that its constructor checks the settings."""
        path, target, written = self.read_entry(value, CALLBACK)
        if isinstance(target, type):
            written, ignored = translate_settings(target, written)
            for problem in ignored:
                self.warn(value, problem)
        else:
            target = FunctionCallbackFactory(target)
        if "name" not in parameters(target):
            written.pop("name", None)  # in YAML, any callback may have a label for the reader
        instance, settings = construct_with_settings(self.converter, target, written)
        # Imported here, because it imports torch and an invalid entry is refused without it.
        from noether.core.callback_checks import check_bound, check_callback

        check_callback(instance, "callbacks")
        check_bound(instance)
        return Kind(path, target, settings, instance)

    def warn(self, callback: object, problem: Problem) -> None:
        """Warn about a setting of one of the callbacks, with its place."""
        callbacks = self.source.data.get("callbacks", [])
        path = ("callbacks", next(i for i, each in enumerate(callbacks) if each is callback), problem.setting)
        located = LocatedProblem(self.source.place(path), path, problem.message)
        warnings.warn(str(located), ConfigWarning, stacklevel=2)

    def read_entry(self, value: object, role: Role) -> tuple[str, Any, dict[str, object]]:
        """Return the `kind` of an entry, the object at that path, and the settings beside it."""
        if not isinstance(value, dict):
            hint = f": write {{kind: {value}}}" if isinstance(value, str) and "." in value else ""
            raise InvalidValueError(f"{value!r} is not a mapping with a `kind`{hint}")
        errors: list[Exception] = []
        target: Any = None
        with collect_errors(errors, "kind"):
            if "kind" not in value:
                raise InvalidValueError(f"is missing; expected {role.expected}")
            target = self.resolve(value["kind"], role)
            check_constructible(value["kind"], target)
        raise_together(errors, Kind)
        return value["kind"], target, {name: each for name, each in value.items() if name != "kind"}


_PART_TYPES: Final = {DATASET: ("torch.utils.data.dataset", "Dataset"), MODEL: ("torch.nn.modules.module", "Module")}


def _derives_from(base: tuple[str, str], kind: Any) -> bool:
    """Return whether an annotation is a class of torch or a subclass; torch need not be imported for that."""
    bases = getattr(get_origin(kind) or kind, "__mro__", ())
    return any((each.__module__, each.__name__) == base for each in bases)


def _structure_part(kinds: _KindHooks, role: Role, value: object, kind: Any) -> Kind:
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


def _structure_config(converter: Converter, value: object, source: Source) -> object:
    """Return the configuration; `data.batch_size`, which is no dataset, is the field `batch_size`."""
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(data, dict) or "batch_size" not in data:
        return construct(converter, Config, value, source=source, batch_size=None)
    rest = {**value, "data": {name: each for name, each in data.items() if name != "batch_size"}}
    errors: list[Exception] = []
    function = None
    with collect_errors(errors, "data"):
        problems: list[Exception] = []
        with collect_errors(problems, "batch_size"):
            if isinstance(data["batch_size"], dict):
                raise InvalidValueError(
                    "is no dataset, but the dotted path of a function (batch) -> number of samples; rename the dataset"
                )
            function = converter.structure(data["batch_size"], BatchFunction)
        raise_together(problems, Config)
    with collect_errors(errors):
        config = construct(converter, Config, rest, source=source, batch_size=function)
    raise_together(errors, Config)
    return config


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


def _structure_optimizer(kinds: _KindHooks, value: object) -> object:
    """Return the section `optimizer`, in which every key that is no field is a setting of the optimizer's class."""
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
