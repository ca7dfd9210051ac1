"""Turns YAML text into plain values, with the scalars of YAML 1.2 and within limits of size."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import yaml

from noether.config.errors import ConfigError, LocatedProblem
from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from noether.config.errors import Place, SettingPath

MAX_NODES = 20_000
"""Values that a document may have once its aliases are expanded; a few nested aliases can stand for billions."""
MAX_LEVELS = 100
"""Levels of nesting, far fewer than Python's stack allows a function that recurses into the values."""
MAX_BYTES = 1 << 20
"""Size of a file in bytes; no file written by hand comes near it."""

_TOO_MANY = f"has more than {MAX_NODES} values once its aliases are expanded"
_TOO_DEEP = "is nested too deeply"
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of the YAML 1.2 core schema instead of those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own design
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node, or raise if there are too many: a node takes a hundred times the memory of its text."""
        self.composed += 1
        if self.composed > 2 * MAX_NODES:  # keys are nodes too
            raise _TooManyError
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


class _TooManyError(NoetherError):
    """The document has too many nodes."""


SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    (f"{_TAG}bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (f"{_TAG}int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        f"{_TAG}float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    (f"{_TAG}null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (f"{_TAG}merge", r"<<", ["<"]),  # recognised, to refuse it with a message
)
"""Tag, pattern and first characters of the scalars of YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3.2)."""

for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)

_SURROGATE = re.compile("[\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_RADIX = {"0o": 8, "0x": 16}
_SCALARS: dict[str, Callable[[str], object]] = {
    f"{_TAG}str": lambda text: _join_pairs(text).encode().decode(),  # fails for half of a surrogate pair
    f"{_TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    # Through decimal text, because Python refuses to print an integer with too many decimals.
    f"{_TAG}int": lambda text: int(str(int(text, _RADIX.get(text[:2], 10)))),
    f"{_TAG}float": lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower())),
    f"{_TAG}null": lambda _: None,
}


class EnvironmentText(str):
    """The value of an environment variable: a text, or what it means in YAML where a setting is no text.

    Example:
        >>> EnvironmentText("10"), EnvironmentText("10").scalar, EnvironmentText("ten").scalar
        ('10', 10, 'ten')
    """

    __slots__ = ()

    @property
    def scalar(self) -> object:
        """Its value as a scalar of YAML."""
        tag = next((tag for tag, pattern, _ in SCALARS if re.fullmatch(pattern, self)), f"{_TAG}str")
        return _SCALARS.get(tag, str)(str(self))


@dataclass
class _Builder:
    """Turns nodes into values and records their places and problems."""

    place_of: Callable[[yaml.Node], Place]
    places: dict[SettingPath, Place] = field(default_factory=dict)
    problems: list[LocatedProblem] = field(default_factory=list)
    nodes: int = 0

    def value(self, node: yaml.Node, path: SettingPath, around: tuple[yaml.Node, ...] = ()) -> object:
        self.nodes += 1
        place = self.places.setdefault(path, self.place_of(node))
        if self.nodes > MAX_NODES:
            raise ConfigError([LocatedProblem(place, (), _TOO_MANY)])
        if len(around) > MAX_LEVELS:
            raise ConfigError([LocatedProblem(place, (), _TOO_DEEP)])
        if any(node is each for each in around):
            return self.add_problem(node, path, "recursive alias: it is part of the value it refers to")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, path, (*around, node))
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(each, (*path, index), (*around, node)) for index, each in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: SettingPath, around: tuple[yaml.Node, ...]) -> dict[str, object]:
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = _join_pairs(key_node.value) if isinstance(key_node.value, str) else None
            if key_node.tag == f"{_TAG}merge":
                self.add_problem(key_node, path, "`<<` is not part of YAML 1.2; write these settings out")
            elif key_node.tag != f"{_TAG}str" or not isinstance(key, str) or _SURROGATE.search(key):
                self.add_problem(key_node, path, f"the key {_quote(key_node)} is not text; put it in quotes")
            elif key in values:
                first = self.places[*path, key]
                self.add_problem(key_node, (*path, key), f"is given twice, first in line {first.line}")
            else:
                self.places[*path, key] = self.place_of(key_node)
                values[key] = self.value(value_node, (*path, key), around)
        return values

    def scalar(self, node: yaml.Node, path: SettingPath) -> object:
        convert = _SCALARS.get(node.tag)
        if convert is None or not isinstance(node, yaml.ScalarNode):
            tag = node.tag.replace(_TAG, "!!")
            return self.add_problem(node, path, f"the tag {tag} is refused; a configuration is plain values")
        try:
            return convert(node.value)
        except (ValueError, KeyError):
            return self.add_problem(node, path, f"{_quote(node)} does not fit its tag {node.tag.replace(_TAG, '!!')}")

    def add_problem(self, node: yaml.Node, path: SettingPath, message: str) -> object:
        """Record a problem and return None, which takes the place of the value."""
        self.problems.append(LocatedProblem(self.place_of(node), path, message))
        return None


def _join_pairs(text: str) -> str:
    """Return text in which each surrogate pair, as JSON writes an emoji, is one character."""
    return _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


def _quote(node: yaml.Node) -> str:
    text = node.value if isinstance(node, yaml.ScalarNode) else "[...]"
    return repr(text if len(text) <= 40 else f"{text[:40]}...")  # noqa: PLR2004 - an error stays on one line


def build_value(
    text: str, place: Place, path: SettingPath, place_of: Callable[[yaml.Node], Place]
) -> tuple[object, dict[SettingPath, Place]]:
    """Return the value of YAML text, and the places of all values in it by their paths.

    Args:
        text: The text.
        place: Where the text is.
        path: Path of the value.
        place_of: Returns the place of a node of the text.

    Raises:
        ConfigError: With every problem of the text.
    """
    builder = _Builder(place_of)
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else builder.value(node, path)
        builder.places.setdefault(path, place)
    except RecursionError:
        raise ConfigError([LocatedProblem(place, (), _TOO_DEEP)]) from None
    except _TooManyError:
        raise ConfigError([LocatedProblem(place, (), _TOO_MANY)]) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_syntax_problem(error, place, text)]) from None
    except yaml.reader.ReaderError as error:
        line = None if place.origin.startswith("--set") else text.count("\n", 0, error.position) + 1
        message = f"does not parse: the character {chr(int(error.character))!r} is not allowed"
        raise ConfigError([LocatedProblem(replace(place, line=line), (), message)]) from None
    if builder.problems:
        raise ConfigError(builder.problems)
    return value, builder.places


def _syntax_problem(error: yaml.MarkedYAMLError, place: Place, text: str) -> LocatedProblem:
    reason = ", ".join(filter(None, [error.context, error.problem]))
    mark = error.problem_mark or error.context_mark
    if mark is not None and "${" in "".join(text.split("\n")[mark.line : mark.line + 1]):
        reason += "; between braces or brackets, put a reference in quotes: '${...}'"
    if mark is None or place.origin.startswith("--set"):
        return LocatedProblem(place, (), f"does not parse: {reason}")
    return LocatedProblem(replace(place, line=mark.line + 1), (), f"column {mark.column + 1}: does not parse: {reason}")
