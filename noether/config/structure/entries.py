"""Entries of a configuration: objects named by their dotted path, each with its settings beside it."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from noether.config.compatibility import ConfigWarning, current_path, translate_settings
from noether.config.errors import (
    InvalidValueError,
    LocatedProblem,
    NamedObjectError,
    collect_errors,
    raise_together,
)
from noether.config.objects.function_callback import FunctionCallbackFactory
from noether.config.objects.functions import FunctionKind, MetricKind, describe_function
from noether.config.objects.kinds import (
    CALLBACK,
    DATASET,
    METRIC,
    MODEL,
    OUTPUT_FUNCTION,
    PART,
    SAMPLER,
    Kind,
    Role,
    build_nested,
    can_serve,
    check_constructible,
    resolve,
    takes_settings,
)
from noether.config.structure.construction import arguments, construct_with_settings
from noether.config.structure.converter import read_untyped
from noether.config.structure.signatures import parameters
from noether.core.callables import positional_names, unbound_settings
from noether.core.errors import suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from cattrs import Converter

    from noether.config.errors import SettingPath
    from noether.config.source import Source


@dataclass(frozen=True)
class EntryHooks:
    """Structures settings that name an object by its dotted path.

    Args:
        converter: Structures all other settings.
        allow: Prefixes of modules that may be named, beside those that are always allowed.
        source: The document, for the places of warnings.
        run_dir: As for `import_allowed`.
    """

    converter: Converter
    allow: tuple[str, ...]
    source: Source
    run_dir: Path | None

    def structure(self, value: object, kind: type, role: Role) -> object:
        """Return an entry, or the text of a path or a name, as an annotation with a role asks for it."""
        if kind is Kind:
            if role is SAMPLER and isinstance(value, str):
                value = {"kind": value}
            return self.callback(value) if role is CALLBACK else self.kind(value, role)
        if isinstance(value, dict) and kind is not str:
            return self.metric(value) if role is METRIC else self.function(value, role)
        path = self.path(value, role)
        if "." in path or not role.has_names:
            self.resolve_function(path, role)
        return path

    def resolve(self, path: object, role: Role) -> Any:
        """Return the object at a path."""
        try:
            return resolve(path, role, self.allow, self.run_dir)
        except InvalidValueError as error:
            raise NamedObjectError(str(error)) from None

    def path(self, value: object, role: Role) -> str:
        """Return the text of a path or a name."""
        if isinstance(value, list) and role is OUTPUT_FUNCTION:
            raise InvalidValueError(f"{value!r} is a list; a single function may return several, as {{name: loss}}")
        return str(self.converter.structure(value, str))

    def resolve_function(self, path: str, role: Role) -> Any:
        """Return the function at a path without settings."""
        target = self.resolve(path, role)
        missing = (
            [each for each in unbound_settings(target) if each not in role.passed_by_name] if role.arguments else []
        )
        if missing:
            write = ", ".join(f"{name}: ..." for name in missing)
            raise InvalidValueError(
                f"{path!r} needs the setting {' and '.join(missing)}: write {{kind: {path}, {write}}}"
            )
        return target

    def fits(self, path: object, role: Role) -> bool:
        """Return whether the object at a path may be imported and fits a role."""
        try:
            self.resolve(path, role)
        except InvalidValueError:
            return False
        return True

    def kind(self, value: object, role: Role) -> Kind:
        """Return an entry with checked settings, nested entries included; `Kind.build` constructs them later."""
        path, target, written = self.read_entry(value, role)
        return Kind(path, target, self.settings(target, written, role.given))

    def settings(
        self, target: Any, written: Mapping[str, object], given: Iterable[str] = (), beside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return checked settings of a class or function, nested entries included."""
        settings, errors = arguments(self.converter, target, written, given=given, beside=beside)
        raise_together(errors, Kind)
        return settings

    def function(self, value: object, role: Role, beside: Sequence[str] = ()) -> FunctionKind | Kind:
        """Return the entry of a function, or of a class that makes one: a dotted path, or a `kind` with settings.

        Args:
            value: The entry.
            role: What the function is called with.
            beside: Settings of the entry that are not the function's.
        """
        if not isinstance(value, dict):
            path = self.path(value, role)
            return FunctionKind(path, self.resolve_function(path, role))
        path, target, written = self.read_entry(value, dataclasses.replace(role, fits=partial(can_serve, role=role)))
        written = {name: each for name, each in written.items() if name not in beside}
        if (written or isinstance(target, type)) and not takes_settings(target):
            raise InvalidValueError(f"{path!r} gets no settings from a configuration; call it in a function of yours")
        if isinstance(target, type):
            return Kind(path, target, self.settings(target, written, (), beside))
        # Those that its caller passes are no settings.
        passed = positional_names(target)
        given = passed[: len(role.arguments)] if role.arguments else [each for each in passed if each not in written]
        by_name = [name for name in role.passed_by_name if name not in written]
        return FunctionKind(path, target, self.settings(target, written, (*given, *by_name), beside))

    def metric(self, value: object) -> MetricKind | str:
        """Return the entry of a metric, or the name of one of noether's that has no other name."""
        kind = value.get("kind") if isinstance(value, dict) else None
        if isinstance(kind, str) and isinstance(value, dict) and "." not in kind:
            if set(value) == {"kind"}:
                return str(kind)
            entry: FunctionKind | Kind = self.metric_of_noether(str(kind), value)
        else:
            entry = self.function(value, METRIC, beside=("name", "prepare") if self.is_metric(value) else ("name",))
        errors: list[Exception] = []
        name, prepare = None, None
        if isinstance(value, dict) and "name" in value:
            with collect_errors(errors, "name"):
                name = self.converter.structure(value["name"], str)
                if not name.strip():
                    raise InvalidValueError(f"{name!r} is no name for a metric; leave it out or write one")
                if "name" in parameters(entry.target):
                    raise InvalidValueError(
                        f"is the name of the metric, so {entry.path} cannot have a parameter of that name; rename it"
                    )
        if isinstance(value, dict) and "prepare" in value and self.is_metric(value):
            with collect_errors(errors, "prepare"):
                prepare = self.function(value["prepare"], OUTPUT_FUNCTION)
        raise_together(errors, MetricKind)
        return MetricKind(entry, name, prepare)

    def is_metric(self, value: object) -> bool:
        """Return whether an entry names a class of metrics of torchmetrics."""
        # Imported here, because it imports torch and a configuration can be read without it.
        from noether.core.callbacks.metric_states import is_metric_class

        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or not self.fits(kind, dataclasses.replace(METRIC, fits=callable)):
            return False
        target = self.resolve(kind, dataclasses.replace(METRIC, fits=callable))
        return isinstance(target, type) and is_metric_class(target)

    def metric_of_noether(self, kind: str, value: Mapping[str, object]) -> FunctionKind:
        """Return the entry of a metric that noether knows by name."""
        # Imported here, because it imports torch and a configuration can be read without it.
        from noether.core.callbacks.metric_functions import METRICS

        errors: list[Exception] = []
        with collect_errors(errors, "kind"):
            if kind not in METRICS:
                known = ", ".join(map(repr, METRICS))
                raise InvalidValueError(
                    f"{kind!r} is not {known}, or the dotted path of a function{suggest(kind, METRICS)}"
                )
        raise_together(errors, MetricKind)
        written = {name: each for name, each in value.items() if name not in ("kind", "name")}
        return FunctionKind(kind, METRICS[kind], self.settings(METRICS[kind], written, METRIC.arguments))

    def structure_dataclass(self, value: object, kind: type) -> Kind:
        """Return the entry of a dataclass in settings, which is constructed now so that it checks its own."""
        instance, settings = construct_with_settings(self.converter, kind, value, build_nested)
        return Kind("", kind, settings, instance)

    def structure_nested(self, value: Any) -> Any:
        """Return a setting with each mapping in it that has a dotted path as `kind` structured as an entry."""
        value = read_untyped(value)
        if isinstance(value, dict) and "." in str(value.get("kind")):
            return self.kind(value, PART)
        if not isinstance(value, (dict, list, tuple)):
            return value
        parts = dict(value if isinstance(value, dict) else enumerate(value))
        errors: list[Exception] = []
        for part, inner in parts.items():
            with collect_errors(errors, part):
                parts[part] = self.structure_nested(inner)
        raise_together(errors, Kind)
        return parts if isinstance(value, dict) else type(value)(parts.values())

    def callback(self, value: object) -> Kind:
        """Return the entry of a callback, which is constructed now so that its constructor checks the settings."""
        path, target, written = self.read_entry(value, CALLBACK)
        if isinstance(target, type):
            written, ignored = translate_settings(target, written)
            for problem in ignored:
                self.warn((*self.path_of(value), problem.setting), problem.message)
        else:
            target = FunctionCallbackFactory(target)
        if "name" not in parameters(target):
            written.pop("name", None)  # in YAML, any callback may have a label for the reader
        instance, settings = construct_with_settings(self.converter, target, written, build_nested)
        # Imported here, because it imports torch and an invalid entry is refused without it.
        from noether.core.callback_checks import check_bound, check_callback

        check_callback(instance, "callbacks")
        check_bound(instance)
        return Kind(path, target, settings, instance)

    def warn(self, path: SettingPath, message: str) -> None:
        """Warn about a setting, with its place."""
        located = LocatedProblem(self.source.place(path), path, message)
        warnings.warn(str(located), ConfigWarning, stacklevel=2)

    def path_of(self, callback: object) -> SettingPath:
        """Return the path of one of the callbacks."""
        callbacks = self.source.data.get("callbacks", [])
        return ("callbacks", next(i for i, each in enumerate(callbacks) if each is callback))

    def read_entry(self, value: object, role: Role) -> tuple[str, Any, dict[str, object]]:
        """Return the `kind` of an entry, the object at that path, and the settings beside it."""
        if not isinstance(value, dict):
            hint = f": write {{kind: {value}}}" if isinstance(value, str) and "." in value else ""
            raise InvalidValueError(f"{value!r} is not a mapping with a `kind`{hint}")
        errors: list[Exception] = []
        path = target = None
        with collect_errors(errors, "kind"):
            if "kind" not in value:
                raise InvalidValueError(f"is missing; expected {role.expected}")
            path = str(value["kind"]) if isinstance(value["kind"], str) else value["kind"]
            if role is CALLBACK and isinstance(path, str) and not self.fits(path, role):
                path = current_path(path)
            target = self.resolve(path, role)
            check_constructible(path, target)
        raise_together(errors, Kind)
        bound: dict[str, object] = {}
        if role in (MODEL, DATASET) and isinstance(target, partial):
            bound = {
                name: describe_function(each) if callable(each) else each for name, each in target.keywords.items()
            }
            target = target.func
        return path, target, {**bound, **{name: each for name, each in value.items() if name != "kind"}}
