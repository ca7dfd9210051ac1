"""What is to be said of a kind of callback: its settings, its documentation, its YAML."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from noether.config.compatibility import translation_of
from noether.config.objects.function_callback import FunctionCallbackFactory
from noether.config.objects.kinds import CALLBACK, resolve
from noether.config.structure.signatures import parameters
from noether.core.callback import declaration_of
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.callbacks.registry import ALIASES, EXPORTS, SHIPPED

PREFIX = "noether.core.callbacks"
_WORDS: dict[object, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}


@final
@dataclass(frozen=True)
class Setting:
    """One setting of a kind.

    Args:
        name: Its name.
        type: What it is, in words.
        default: How its default is written in YAML; None where it is required.
        text: What it is for, as far as that is documented.
    """

    name: str
    type: str
    default: str | None
    text: str


@final
@dataclass(frozen=True)
class Description:
    """What is to be said of a kind.

    Args:
        kind: Its dotted path.
        aliases: Its other names.
        summary: One line.
        text: Its documentation, the parts below aside.
        settings: Its settings: the required ones, its own, then those that it inherits.
        renamed: The names that YAML may give them, too.
        yaml: An entry of `callbacks`.
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
    """Return what is to be said of a kind of callback.

    Args:
        kind: A name of one of noether's callbacks, or a dotted path.
        allow: Prefixes of modules that the path may begin with, beside those always allowed.

    Raises:
        InvalidValueError: If there is no such callback.

    Example:
        >>> describe("ReduceLROnPlateauCallback").settings[2]
        Setting(name='factor', type='number', default='0.1', text='What the learning rate is multiplied by, in (0, 1).')
    """
    path = kind if "." in kind else f"{PREFIX}.{kind}"
    target = resolve(path, CALLBACK, allow)
    aliases = known_kinds().get(getattr(target, "__name__", ""), ()) if path.startswith(f"{PREFIX}.") else ()
    if path.removeprefix(f"{PREFIX}.") in aliases:
        path = f"{PREFIX}.{target.__name__}"
    documented = _documentation(target if isinstance(target, type) else inspect.unwrap(target))
    settings = _settings(target)
    text = _without_parts(documented)
    return Description(
        kind=path,
        aliases=aliases,
        summary=" ".join(text.partition("\n\n")[0].split()),
        text=text,
        settings=settings,
        renamed=translation_of(target).renamed,
        yaml=_yaml(path, documented, settings, gated=_is_gated(target)),
    )


def _settings(target: Any) -> tuple[Setting, ...]:
    """Return the settings of a class with those of its own first, then those that it inherits; or of a function."""
    if not isinstance(target, type):
        texts = _inherited_texts(PeriodicCallback) | _argument_texts(_documentation(inspect.unwrap(target)))
        return tuple(_setting(each, texts) for each in parameters(FunctionCallbackFactory(target)).values())
    known, found = parameters(target), dict[str, Setting]()
    texts = _inherited_texts(target)
    for owner in target.__mro__:
        own = [name for name in vars(owner).get("__annotations__", {}) if name in known and name not in found]
        found |= {name: _setting(known[name], texts) for name in own}
    return tuple(sorted(found.values(), key=lambda setting: setting.default is not None))  # what is required first


def _is_gated(target: Any) -> bool:
    """Return whether a function has an interval already."""
    return not isinstance(target, type) and declaration_of(target).gate is not None


def _inherited_texts(target: type) -> dict[str, str]:
    return {
        name: text for each in reversed(target.__mro__) for name, text in _argument_texts(_documentation(each)).items()
    }


def _documentation(target: object) -> str:
    # `inspect.getdoc` would return what is inherited, and a dataclass without documentation has its signature there.
    written = (vars(target).get("__doc__") if isinstance(target, type) else target.__doc__) or ""
    return "" if written.startswith(f"{getattr(target, '__name__', '')}(") else inspect.cleandoc(written)


def _setting(parameter: inspect.Parameter, texts: dict[str, str]) -> Setting:
    default = None if parameter.default is parameter.empty else _in_yaml(parameter.default)
    return Setting(parameter.name, in_words(parameter.annotation), default, texts.get(parameter.name, ""))


def in_words(annotation: Any) -> str:
    """Return a type as the reader of a YAML file knows it.

    Example:
        >>> in_words(tuple[float, ...]), in_words(typing.Literal["mean", "last"]), in_words(int | None)
        ('list of number', 'mean | last', 'whole number')
    """
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each) for each in inside if each is not type(None)))
    if origin is typing.Literal:
        return " | ".join(map(str, inside))
    if origin in (tuple, list, Sequence):
        return f"list of {', '.join(in_words(each) for each in inside if each is not Ellipsis)}"
    if origin is Callable:
        return "dotted path of a function"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _in_yaml(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"[{', '.join(map(_in_yaml, default))}]" if isinstance(default, (tuple, list)) else str(default)


_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^(Args|Raises|Returns|Example):\n((?:[ ]+.*\n?|\n)*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+): (.*(?:\n[ ]+.*)*)", re.MULTILINE)


def _argument_texts(documented: str) -> dict[str, str]:
    """Return what the documentation says of each argument."""
    section = next((body for title, body in _SECTION.findall(documented) if title == "Args"), "")
    return {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(textwrap.dedent(section))}


def _without_parts(documented: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", _SECTION.sub("", _YAML.sub("", documented))).strip()


def _yaml(path: str, documented: str, settings: Sequence[Setting], *, gated: bool) -> str:
    """Return the YAML in the documentation, or else an entry with the settings that are required."""
    written = _YAML.search(documented)
    if written:
        return written[1].rstrip()
    takes = not gated and any(each.name == "every_n_epochs" for each in settings)
    interval = ["every_n_epochs: 1"] if takes else []
    required = [f"{each.name}: <{each.type}>" for each in settings if each.default is None]
    return "\n  ".join((f"- kind: {path}", *interval, *required))
