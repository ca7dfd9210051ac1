"""Settings from docstrings and annotations: their texts, types in words, and defaults as YAML."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from noether.config.structure.converter import is_function_type

_WORDS: Final[dict[object, str]] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "anything",
}
SECTION: Final = re.compile(r"^(Args|Raises|Returns|Example):\n((?:[ ]+.*\n?|\n)*)", re.MULTILINE)
"""A section of a Google docstring: its title and its body."""
_ARGUMENT: Final = re.compile(r"^(\w+)(?: \(.*?\))?: (.*(?:\n[ ]+.*)*)", re.MULTILINE)


@final
@dataclass(frozen=True)
class Setting:
    """One setting of a section, a callback or another object that YAML names.

    Args:
        name: Its name.
        type: Its type in words, such as `list of number`.
        default: Its default in YAML; None if it is required.
        text: Its documentation, or an empty text.
        bounds: The range of a number, such as `at least 1`, or an empty text.
    """

    name: str
    type: str
    default: str | None
    text: str
    bounds: str = ""

    @property
    def kind(self) -> str:
        """Its type and range in words, such as `whole number, at least 1`."""
        return ", ".join(filter(None, (self.type, self.bounds)))


def make_setting(parameter: inspect.Parameter, texts: Mapping[str, str]) -> Setting:
    """Return the setting of a parameter, with its text from `texts`."""
    default = None if parameter.default is parameter.empty else to_yaml(parameter.default)
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
    if origin is typing.Annotated:
        return str(annotation.__metadata__[0].in_words(inside[0]))
    if origin is Mapping:
        return "mapping"
    if origin is typing.Literal:
        return " | ".join(map(str, inside))
    if origin in (tuple, list, Sequence):
        return f"list of {', '.join(type_in_words(each) for each in inside if each is not Ellipsis)}"
    if origin is not type and is_function_type(annotation):
        return "dotted path of a function"
    if getattr(annotation, "__name__", "") == "Kind":
        return "dotted path"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def to_yaml(default: object) -> str:
    """Return the default of a parameter as YAML."""
    if repr(default) == "<factory>":
        return "{}"  # of a field whose default is made by a factory
    if default == "":
        return "''"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"[{', '.join(map(to_yaml, default))}]" if isinstance(default, (tuple, list)) else str(default)


def inherited_texts(target: type) -> dict[str, str]:
    """Return the documentation of each setting of a class and its base classes, by name."""
    return {
        name: text for each in reversed(target.__mro__) for name, text in argument_texts(docstring_of(each)).items()
    }


def docstring_of(target: object) -> str:
    """Return the docstring of an object without those of its base classes, which `inspect.getdoc` would add."""
    doc = (vars(target).get("__doc__") if isinstance(target, type) else target.__doc__) or ""
    # A dataclass without a docstring gets its signature as one.
    return "" if doc.startswith(f"{getattr(target, '__name__', '')}(") else inspect.cleandoc(doc)


def argument_texts(doc: str) -> dict[str, str]:
    """Return the documentation of each argument in a docstring, by name."""
    section = next((body for title, body in SECTION.findall(doc) if title == "Args"), "")
    return {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(textwrap.dedent(section))}
