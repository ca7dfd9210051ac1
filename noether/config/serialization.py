"""Writes a configuration as plain values or as YAML text, with every default filled in."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import re
from collections.abc import Mapping
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from noether.config.init_settings import InitSettings
from noether.config.objects.functions import FunctionKind, MetricKind, describe_function
from noether.config.objects.kinds import Kind
from noether.config.optimizer_settings import SETTINGS_OF_ALL, OptimizerSettings, ScheduleSettings
from noether.config.references import escape_references
from noether.config.schema import Config
from noether.config.trainer_settings import CheckpointSettings, EvaluateSettings
from noether.config.yaml_values import SCALARS

if TYPE_CHECKING:
    from collections.abc import Collection


def resolve_config(config: Config) -> dict[str, Any]:
    """Return `config` as plain values, section by section, with every default filled in.

    A setting whose default is None is left out where it has that value.
    """
    sections: dict[str, Any] = _plain_value(config)
    return sections


def dump(config: Config) -> str:
    """Return `config` as YAML text, which loads as an equal configuration."""
    values = escape_references(resolve_config(config))
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


@singledispatch
def _plain_value(value: Any) -> Any:
    if inspect.isroutine(value) or isinstance(value, (type, functools.partial)):
        return _plain_value(describe_function(value))
    return _plain_fields(value) if dataclasses.is_dataclass(value) else value


@_plain_value.register
def _(value: Config) -> dict[str, Any]:
    fields = _plain_fields(value)
    function = fields.pop("batch_size", None)
    return fields if function is None else {**fields, "data": {"batch_size": function, **fields["data"]}}


@_plain_value.register
def _(value: Kind) -> dict[str, Any]:
    kind = {"kind": value.path} if value.path else {}
    return {**kind, **_plain_value(value.settings)}


@_plain_value.register
def _(value: FunctionKind) -> dict[str, Any] | str:
    return {"kind": value.path, **_plain_value(value.settings)} if value.settings else value.path


@_plain_value.register
def _(value: MetricKind) -> Any:
    entry = _plain_value(value.entry)
    beside = {"name": value.name, "prepare": value.prepare}
    named = {name: _plain_value(each) for name, each in beside.items() if each is not None}
    return {**({"kind": entry} if isinstance(entry, str) else entry), **named} if named else entry


@_plain_value.register
def _(value: OptimizerSettings) -> dict[str, Any]:
    fields = _plain_fields(value)
    return {**fields.pop("kind"), **fields}


@_plain_value.register
def _(value: ScheduleSettings) -> dict[str, Any]:
    fields = _plain_fields(value)
    if value.factor is None:
        return fields
    kind = fields["kind"]
    entry = {"kind": kind} if isinstance(kind, str) else kind
    return {**entry, **{name: each for name, each in fields.items() if name in SETTINGS_OF_ALL}}


@_plain_value.register
def _(value: EvaluateSettings) -> dict[str, Any]:
    fields = _plain_fields(value)
    return {**fields.pop("datasets"), **fields}


@_plain_value.register
def _(value: InitSettings) -> dict[str, Any] | str:
    fields = {name: each for name, each in _plain_fields(value).items() if each}
    return value.path if fields.keys() == {"path"} else fields


@_plain_value.register
def _(value: CheckpointSettings) -> dict[str, Any]:
    fields = _plain_fields(value)
    return {"async": fields.pop("asynchronous"), **fields}


@_plain_value.register(Mapping)
def _(value: Mapping[str, object]) -> dict[str, Any]:
    return {key: _plain_value(each) for key, each in value.items()}


@_plain_value.register(list)
@_plain_value.register(tuple)
def _(value: Collection[object]) -> list[Any]:
    return [_plain_value(each) for each in value]


@_plain_value.register(set)
@_plain_value.register(frozenset)
def _(value: Collection[object]) -> list[Any]:
    return sorted(map(_plain_value, value), key=repr)  # the order of a set is another one in each process


@_plain_value.register
def _(value: enum.Enum) -> Any:
    return value.value if isinstance(value.value, (str, int, float)) else value.name


@_plain_value.register
def _(value: Path) -> str:
    return str(value)


def _plain_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain values.

    Fields that equality ignores are left out, and so are fields whose default is None where they have that value.
    """
    values = {each: getattr(value, each.name) for each in dataclasses.fields(value) if each.compare}
    return {
        each.name: _plain_value(inner)
        for each, inner in values.items()
        if inner is not None or each.default is not None
    }


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else than text, and writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


for _tag, _pattern, _first in SCALARS:
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # In any other style PyYAML folds the additional line breaks of YAML 1.1 to spaces.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
