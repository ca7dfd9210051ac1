"""Descriptions of callbacks from their docstrings and signatures: settings, documentation, YAML."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from noether.config.compatibility import current_path, translation_of
from noether.config.errors import InvalidValueError
from noether.config.objects.function_callback import FunctionCallbackFactory
from noether.config.objects.kinds import CALLBACK, resolve
from noether.config.structure.converter import is_function_type
from noether.config.structure.signatures import parameters
from noether.core.callback import declaration_of
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.callbacks.registry import ALIASES, EXPORTS, SHIPPED

PREFIX = "noether.core.callbacks"
_WORDS: dict[object, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}


@final
@dataclass(frozen=True)
class Setting:
    """One setting of a callback.

    Args:
        name: Its name.
        type: Its type in words, such as `list of number`.
        default: Its default in YAML; None if it is required.
        text: Its documentation, or an empty text.
    """

    name: str
    type: str
    default: str | None
    text: str


@final
@dataclass(frozen=True)
class Description:
    """The description of a callback.

    Args:
        kind: Its dotted path.
        aliases: Its other names.
        summary: The first sentence of its documentation.
        text: Its documentation without the sections that the other fields contain.
        settings: Required settings, then optional ones; within each group its own before inherited ones.
        renamed: New name of a setting by an older name that YAML may use.
        yaml: An example entry of `callbacks`.
    """

    kind: str
    aliases: tuple[str, ...]
    summary: str
    text: str
    settings: tuple[Setting, ...]
    renamed: Mapping[str, str]
    yaml: str


def known_kinds() -> dict[str, tuple[str, ...]]:
    """Return the names of all callbacks that noether ships, sorted, each with its aliases.

    Example:
        >>> known_kinds()["LrCallback"]
        ('LR',)
    """
    canonical = {alias: EXPORTS[alias].load().__name__ for alias in ALIASES}
    return {name: tuple(alias for alias in ALIASES if canonical[alias] == name) for name in sorted(SHIPPED)}


def describe(kind: str, allow: Sequence[str] = ()) -> Description:
    """Return the description of a callback.

    Args:
        kind: The name of a callback of noether, or a dotted path.
        allow: Prefixes of modules that the path may begin with, in addition to those that are always allowed.

    Raises:
        InvalidValueError: If there is no such callback.

    Example:
        >>> describe("ReduceLROnPlateauCallback").settings[2]
        Setting(name='factor', type='number', default='0.1', text='Factor for the learning rate, in (0, 1).')
    """
    path = kind if "." in kind else f"{PREFIX}.{kind}"
    try:
        target = resolve(path, CALLBACK, allow)
    except InvalidValueError:
        path = current_path(path)
        target = resolve(path, CALLBACK, allow)
    aliases = known_kinds().get(getattr(target, "__name__", ""), ()) if path.startswith(f"{PREFIX}.") else ()
    if path.removeprefix(f"{PREFIX}.") in aliases:
        path = f"{PREFIX}.{target.__name__}"
    doc = _docstring(target if isinstance(target, type) else inspect.unwrap(target))
    settings = _settings(target)
    text = re.sub(r"\n{3,}", "\n\n", _SECTION.sub("", _YAML.sub("", doc))).strip()
    return Description(
        kind=path,
        aliases=aliases,
        summary=" ".join(text.partition("\n\n")[0].split()),
        text=text,
        settings=settings,
        renamed=translation_of(target).renamed,
        yaml=_example(path, target, doc, settings),
    )


def _settings(target: Any) -> tuple[Setting, ...]:
    """Return the settings of a class or a function: required before optional, own before inherited."""
    if not isinstance(target, type):
        texts = _inherited_texts(PeriodicCallback) | _argument_texts(_docstring(inspect.unwrap(target)))
        return tuple(_setting(each, texts) for each in parameters(FunctionCallbackFactory(target)).values())
    known, settings = parameters(target), dict[str, Setting]()
    texts = _inherited_texts(target)
    for owner in target.__mro__:
        own = [name for name in vars(owner).get("__annotations__", {}) if name in known and name not in settings]
        settings |= {name: _setting(known[name], texts) for name in own}
    return tuple(sorted(settings.values(), key=lambda setting: setting.default is not None))


def _inherited_texts(target: type) -> dict[str, str]:
    """Return the documentation of each setting of a class and its base classes, by name."""
    return {name: text for each in reversed(target.__mro__) for name, text in _argument_texts(_docstring(each)).items()}


def _docstring(target: object) -> str:
    """Return the docstring of an object without those of its base classes, which `inspect.getdoc` would add."""
    doc = (vars(target).get("__doc__") if isinstance(target, type) else target.__doc__) or ""
    # A dataclass without a docstring gets its signature as one.
    return "" if doc.startswith(f"{getattr(target, '__name__', '')}(") else inspect.cleandoc(doc)


def _setting(parameter: inspect.Parameter, texts: dict[str, str]) -> Setting:
    default = None if parameter.default is parameter.empty else _to_yaml(parameter.default)
    return Setting(parameter.name, type_in_words(parameter.annotation), default, texts.get(parameter.name, ""))


def type_in_words(annotation: Any) -> str:
    """Return the name of a type for readers of YAML.

    Example:
        >>> type_in_words(tuple[float, ...]), type_in_words(typing.Literal["mean", "last"]), type_in_words(int | None)
        ('list of number', 'mean | last', 'whole number')
    """
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_in_words(each) for each in inside if each is not type(None)))
    if origin is typing.Literal:
        return " | ".join(map(str, inside))
    if origin in (tuple, list, Sequence):
        return f"list of {', '.join(type_in_words(each) for each in inside if each is not Ellipsis)}"
    if origin is not type and is_function_type(annotation):
        return "dotted path of a function"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _to_yaml(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"[{', '.join(map(_to_yaml, default))}]" if isinstance(default, (tuple, list)) else str(default)


_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^(Args|Raises|Returns|Example):\n((?:[ ]+.*\n?|\n)*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+): (.*(?:\n[ ]+.*)*)", re.MULTILINE)


def _argument_texts(doc: str) -> dict[str, str]:
    """Return the documentation of each argument in a docstring, by name."""
    section = next((body for title, body in _SECTION.findall(doc) if title == "Args"), "")
    return {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(textwrap.dedent(section))}


def _example(path: str, target: Any, doc: str, settings: Sequence[Setting]) -> str:
    """Return the YAML in a docstring, or else an entry with the required settings."""
    example = _YAML.search(doc)
    if example:
        return example[1].rstrip()
    # YAML cannot give an interval to a function that has one from a decorator.
    has_interval = not isinstance(target, type) and declaration_of(target).gate is not None
    takes_interval = not has_interval and any(each.name == "every_n_epochs" for each in settings)
    interval = ["every_n_epochs: 1"] if takes_interval else []
    required = [f"{each.name}: <{each.type}>" for each in settings if each.default is None]
    return "\n  ".join((f"- kind: {path}", *interval, *required))
