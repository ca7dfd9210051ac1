"""Plain Python values as the source of a configuration, in place of YAML text."""

from __future__ import annotations

import functools
import numbers
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from noether.config.errors import ConfigError, InvalidValueError, LocatedProblem, Place
from noether.config.objects.functions import describe_function
from noether.config.source import Source
from noether.config.yaml_values import MAX_LEVELS

if TYPE_CHECKING:
    from noether.config.errors import SettingPath


def source_from_values(values: Mapping[str, Any]) -> Source:
    """Return the source of a configuration that is given as a mapping; its settings have paths, but no file and line.

    Args:
        values: Sections of mappings, lists, tuples, paths, text, numbers, true, false and None. A function or class
            in a module stands for its dotted path; a `functools.partial` of one, for its `kind` and settings.

    Raises:
        ConfigError: With the path of every value that YAML could not contain.

    Example:
        >>> source_from_values({"trainer": {"loss": source_from_values}}).data
        {'trainer': {'loss': 'noether.config.values.source_from_values'}}
        >>> source_from_values({"data": {"train": object()}})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        noether.config.errors.ConfigError: data.train: <object object at 0x...> is not a plain value;
        write a function or class as its dotted path, such as 'package.module.name'
    """
    problems: list[LocatedProblem] = []
    data = _plain(values, (), problems)
    if problems:
        raise ConfigError(problems)
    return Source("", data, {})


def _plain(value: Any, path: SettingPath, problems: list[LocatedProblem]) -> Any:
    if len(path) > MAX_LEVELS:
        problems.append(LocatedProblem(Place(""), path[:1], "is nested too deeply"))
        return None
    if isinstance(value, Mapping):
        return _plain_mapping(value, path, problems)
    if isinstance(value, (list, tuple)):
        return [_plain(each, (*path, index), problems) for index, each in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Real):  # numbers of numpy, too
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        try:
            return _plain(describe_function(value), path, problems)
        except InvalidValueError as error:
            problems.append(LocatedProblem(Place(""), path, str(error)))
            return None
    message = (
        f"{value!r} is not a plain value; write a function or class as its dotted path, such as 'package.module.name'"
    )
    problems.append(LocatedProblem(Place(""), path, message))
    return None


def _plain_mapping(value: Mapping[Any, Any], path: SettingPath, problems: list[LocatedProblem]) -> dict[str, Any]:
    kind = value.get("kind")
    if isinstance(kind, functools.partial) and not kind.args:
        value = {**value, "kind": kind.func, **kind.keywords}
    plain: dict[str, Any] = {}
    for key, each in value.items():
        name = _plain(key, path, problems) if callable(key) else key  # a type of effect, whose handler is the value
        if not isinstance(name, str):
            problems.append(LocatedProblem(Place(""), path, f"the key {key!r} is not text; write {str(key)!r}"))
        plain[str(name)] = _plain(each, (*path, str(name)), problems)
    return plain
