"""A configuration as text again, with every default written out, and what differs between two of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from noether.config.errors import ConfigError, Located, Place
from noether.config.kinds import Kind
from noether.config.schema import ENDS, CheckpointSettings, Config, EvaluateSettings, OptimizerSettings
from noether.config.source import SCALARS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

MAY_CHANGE = (
    "run.output",
    "run.handlers",
    "run.tensorboard",
    "run.wandb",
    *(f"trainer.{end}" for end in ENDS),
    "trainer.device",
    "trainer.num_workers",
    "trainer.evaluate",
    "trainer.checkpoints",
    "trainer.record",
    "callbacks",
)
"""What may differ in a resumed run; a section stands for all that is in it."""


def resolve_config(config: Config) -> dict[str, Any]:
    """Return `config` as plain values in the order of its sections; a setting that is None by default is left out."""
    plain: dict[str, Any] = _plain(config)
    return plain


def dump(config: Config) -> str:
    """Return `config` as YAML text, which loads as an equal configuration."""
    text: str = yaml.dump(resolve_config(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def changed_settings(old: Config, new: Config) -> tuple[str, ...]:
    """Return the dotted names of all settings that differ, in the order of the sections; a list is one setting."""
    return tuple(".".join(path) for path, _, _ in _differences(resolve_config(old), resolve_config(new)))


def refuse_changes(old: Config, new: Config) -> None:
    """Return if a run of `old` may go on as `new`: only what is in `MAY_CHANGE` differs.

    Raises:
        ConfigError: With every other setting that differs, where the new value was written.
    """
    problems = [
        Located(_place(new, path), path, f"{_shown(before)} cannot become {_shown(after)} in a resumed run")
        for path, before, after in _differences(resolve_config(old), resolve_config(new))
        if not any(f"{'.'.join(path)}.".startswith(f"{may}.") for may in MAY_CHANGE)
    ]
    if problems:
        raise ConfigError(problems)


def _place(config: Config, path: tuple[str, ...]) -> Place:
    return config.source.place(path) if config.source else Place("configuration")


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)


def _differences(old: object, new: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif repr(old) != repr(new):  # so that NaN equals itself, and True is not 1
        yield path, old, new


@singledispatch
def _plain(value: Any) -> Any:
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return _fields(value) if dataclasses.is_dataclass(value) else value


@_plain.register
def _(value: Kind) -> dict[str, Any]:
    return {"kind": value.path, **_plain(value.settings)}


@_plain.register
def _(value: OptimizerSettings) -> dict[str, Any]:
    return _opened(value, "kind")


@_plain.register
def _(value: EvaluateSettings) -> dict[str, Any]:
    return _opened(value, "datasets")


@_plain.register
def _(value: CheckpointSettings) -> dict[str, Any]:
    fields = _fields(value)
    return {"async": fields.pop("asynchronous"), **fields}


@_plain.register(Mapping)
def _(value: Mapping[str, object]) -> dict[str, Any]:
    return {key: _plain(each) for key, each in value.items()}


@_plain.register(list)
@_plain.register(tuple)
@_plain.register(set)
@_plain.register(frozenset)
def _(value: Collection[object]) -> list[Any]:
    return [_plain(each) for each in value]


@_plain.register
def _(value: Path) -> str:
    return str(value)


def _opened(value: object, inner: str) -> dict[str, Any]:
    """Return the fields of a section that shows what is in one of them beside the others."""
    fields = _fields(value)
    return {**fields.pop(inner), **fields}


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain values, without those that are None by default or not compared."""
    values = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.compare}
    absent = {each.name for each in dataclasses.fields(value) if each.default is None and values.get(each.name) is None}
    return {name: _plain(each) for name, each in values.items() if name not in absent}


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as anything else, and writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


for _tag, _pattern, _first in SCALARS:
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds YAML 1.1's further line breaks to spaces in any style but this one.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
