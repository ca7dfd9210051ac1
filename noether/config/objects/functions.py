"""Functions and metrics that a configuration names: by a dotted path, which is kept as it was written, and settings."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, final

from noether.config.errors import InvalidValueError
from noether.config.objects.import_policy import import_path
from noether.config.objects.kinds import Entry, Kind, build_nested

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
@dataclass(frozen=True)
class FunctionKind(Entry):
    """A function, or a class that is not called here, named in a configuration.

    Args:
        path: The dotted path as it was written.
        target: The object at that path.
        settings: Keyword arguments with which it is called, with defaults filled in; empty if none were written.

    Example:
        >>> FunctionKind("builtins.int", int, {"base": 2}).build()("101")
        5
    """

    path: str
    target: Any = field(compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def build(self) -> Any:
        """Return the object at the path; with settings, a `functools.partial` of it that has the name in the path."""
        if not self.settings:
            return self.target
        bound = functools.partial(self.target, **build_nested(self.settings))
        module, _, name = self.path.rpartition(".")
        vars(bound).update(__module__=module, __qualname__=name, __name__=name)  # for messages
        return bound


@final
@dataclass(frozen=True)
class MetricKind(Entry):
    """A metric named in a configuration.

    Args:
        entry: Its function, or the class that makes it.
        name: Its name in metric keys as it was written; None for the last part of the path.
        prepare: For a metric of torchmetrics, the function that returns what its `update` gets; None for outputs and
            targets.

    Example:
        >>> MetricKind(FunctionKind("mine.strict", print)).label
        'strict'
    """

    entry: FunctionKind | Kind
    name: str | None = None
    prepare: FunctionKind | Kind | None = None

    @property
    def label(self) -> str:
        """The name of the metric in metric keys."""
        return self.name or self.entry.path.rpartition(".")[2]

    def build(self) -> Any:
        """Return the metric as a `noether.core.callbacks.metric_functions.NamedMetric`."""
        # Imported here, because it imports torch and a configuration can be read without it.
        from noether.core.callbacks.metric_functions import NamedMetric

        prepare = None if self.prepare is None else self.prepare.build()
        return NamedMetric(self.label, self.entry.build(), prepare)


Function: TypeAlias = FunctionKind | Kind | Callable[..., Any] | str
"""A function as a section holds it: an entry of YAML or a dotted path; in Python also the function itself."""


def build_function(function: Entry | Callable[..., Any] | str) -> Any:
    """Return the function that a field of a configuration holds: an entry, a path that was checked, or the function.

    Example:
        >>> build_function("noether.core.errors.suggest").__name__
        'suggest'
    """
    if isinstance(function, Entry):
        return function.build()
    return import_path(function) if isinstance(function, str) else function


def build_metric(metric: MetricKind | Callable[..., Any] | str) -> Any:
    """Return a metric as callbacks take it: a function, or the name of one of noether's."""
    if isinstance(metric, str):
        return MetricKind(FunctionKind(metric, import_path(metric))).build() if "." in metric else metric
    return build_function(metric)


def metric_label(metric: MetricKind | Callable[..., Any] | str) -> str:
    """Return the name of a metric in metric keys, as far as a configuration knows it."""
    if isinstance(metric, MetricKind):
        return metric.label
    return metric.rpartition(".")[2] if isinstance(metric, str) else str(getattr(metric, "__name__", metric))


def describe_function(function: Any) -> str | dict[str, Any]:
    """Return the dotted path of a function or class, or of a `functools.partial` its `kind` and settings.

    Raises:
        InvalidValueError: If importing no path would return this object, so that no file can name it.

    Example:
        >>> describe_function(functools.partial(build_function, function="mine.loss"))
        {'kind': 'noether.config.objects.functions.build_function', 'function': 'mine.loss'}
        >>> describe_function(lambda outputs, batch: outputs)
        Traceback (most recent call last):
        noether.config.errors.InvalidValueError: <lambda> is made inside of another function or object, so config.yaml
        cannot name it: define it in a module and give it or its dotted path
    """
    if not isinstance(function, functools.partial):
        return _path_of(function)
    if function.args:
        given = ", ".join(map(repr, function.args))
        raise InvalidValueError(f"{function!r} binds {given} by position: bind settings by name, or write a function")
    return {"kind": _path_of(function.func), **function.keywords}


def _path_of(target: Any) -> str:
    """Return the path that leads to `target`: its own name, or else another one in its module."""
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    found = None if module == "__main__" else sys.modules.get(str(module))
    for each in () if found is None else filter(None, (name, *vars(found))):
        if _is_at(found, each, target):
            return f"{module}.{each}"
    if name is None:
        raise InvalidValueError(
            f"{target!r} is an object that config.yaml cannot name: give its class and settings, "
            f"{{'kind': {type(target).__name__}, ...}}, or define it in a module and give its dotted path"
        )
    if module == "__main__" and "<" not in name:
        raise InvalidValueError(
            f"{name} is defined in the script that runs, which a resumed run or `noether eval` cannot import: move it "
            f"to a module, such as mine.py, and write from mine import {name.partition('.')[0]}"
        )
    raise InvalidValueError(
        f"{name} is made inside of another function or object, so config.yaml cannot name it: define it in a module "
        "and give it or its dotted path"
    )


def _is_at(module: Any, name: str, target: Any) -> bool:
    try:
        found = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        return False
    # A bound method is made whenever it is read.
    return found is target or (isinstance(target, types.MethodType) and bool(found == target))
