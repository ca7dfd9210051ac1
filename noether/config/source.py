"""Reads YAML text as plain values and records the place where each was written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.core.errors import NoetherError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from noether.config.errors import SettingPath

MAX_NODES = 20_000
"""Values that a document may have once its aliases are expanded; a few nested aliases can stand for billions."""
MAX_LEVELS = 100
"""Levels of nesting, far fewer than Python's stack allows a function that recurses into the values."""
MAX_BYTES = 1 << 20
"""Size of a file in bytes; no file written by hand comes near it."""

_TOO_MANY = f"has more than {MAX_NODES} values once its aliases are expanded"
_TOO_DEEP = "is nested too deeply"
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Source:
    r"""The values of a YAML document and the places where they were written.

    Args:
        file: The file, as the user named it.
        data: Its plain values: mappings, lists, text, numbers, true, false and null.
        places: Place of each value by its path; a value in a mapping has the place of its key.
        references: Text of each reference such as `${trainer.max_epochs}` that was resolved, by its path.

    Example:
        >>> source = parse("trainer:\n  max_epochs: 10\n", "a.yaml").override("trainer.max_epochs=20")
        >>> source.data
        {'trainer': {'max_epochs': 20}}
        >>> print(source.place(("trainer",)), "|", source.place(("trainer", "max_epochs")))
        a.yaml:1 | --set trainer.max_epochs=20
    """

    file: str
    data: dict[str, Any]
    places: Mapping[SettingPath, Place]
    references: Mapping[SettingPath, str] = field(default_factory=dict)

    def reference(self, path: SettingPath) -> str | None:
        """Return the text of the reference that gave the value at `path`, or a value around it; None if none did."""
        found = (self.references.get(path[:length]) for length in range(len(path), -1, -1))
        return next(filter(None, found), None)

    def place(self, path: SettingPath) -> Place:
        """Return where the value at `path` was written, or the nearest value around it that was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.file))

    def value(self, path: SettingPath) -> Any:
        """Return the value at `path`, or None if no value is there."""
        value: Any = self.data
        for part in path:
            value = _child(value, part)
        return value

    def is_overridden(self, path: SettingPath) -> bool:
        """Return whether the value at `path` was given by `override`."""
        return path in self.places and self.places[path].line is None

    def override(self, setting: str) -> Source:
        """Return the source with one value replaced, as `--set` does.

        Args:
            setting: `key=value`; the key is dotted, with numbers for list elements, and the value is YAML.

        Raises:
            ConfigError: If the `=` is missing, the value does not parse, or the key leads into a value that is no
                mapping or past the end of a list.
        """
        place = Place(f"--set {setting}")
        key, equals, text = setting.partition("=")
        path = _parse_key(self.data, key.strip().split("."))
        if not equals or "" in path:
            raise ConfigError(
                [LocatedProblem(place, (), "is not of the form key=value, such as trainer.max_epochs=20")]
            )
        builder = _Builder(lambda _: place)
        value = _build_value(text, place, path, builder)
        around = {path[:length]: place for length in range(1, len(path))}  # of mappings that the override creates
        places = around | self._places_outside(path) | builder.places
        return replace(self, data=_replace_value(self.data, path, value, place), places=places)

    def without(self, path: SettingPath) -> Source:
        """Return the source without the value at `path`, whose last part is a key of a mapping."""
        inner = {key: value for key, value in self.value(path[:-1]).items() if key != path[-1]}
        data = _replace_value(self.data, path[:-1], inner, Place(self.file))
        return replace(self, data=data, places=self._places_outside(path))

    def _places_outside(self, path: SettingPath) -> dict[SettingPath, Place]:
        return {known: place for known, place in self.places.items() if known[: len(path)] != path}


def read(path: str | Path) -> Source:
    """Return the values of the YAML file at `path`.

    Raises:
        ConfigError: If the file cannot be read, is too large, is not UTF-8, does not parse, or is not a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _file_error(path, f"has more than {MAX_BYTES} bytes, too large for a configuration")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        folder = Path(path).parent
        names = [each.name for each in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise _file_error(path, f"no such file{suggest(Path(path).name, names)}") from None
    except UnicodeDecodeError as error:
        raise _file_error(path, f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise _file_error(path, (error.strerror or str(error)).lower()) from None
    return parse(text, str(path))


def parse(text: str, file: str) -> Source:
    r"""Return the values of the YAML `text` of `file`.

    Numbers, true, false and null are those of YAML 1.2: `1e-3` is a number; `on`, `off`, `yes`, `no` and dates are
    text.

    Raises:
        ConfigError: If the text does not parse, a key is given twice, or it is not a mapping.

    Example:
        >>> parse("lr: 1e-3\nmode: on", "a.yaml").data
        {'lr': 0.001, 'mode': 'on'}
    """
    builder = _Builder(lambda node: Place(file, node.start_mark.line + 1))
    data = _build_value(text, Place(file), (), builder)
    if not isinstance(data, dict):
        problem = "is empty" if data is None else "is not a mapping"
        raise ConfigError([LocatedProblem(Place(file, 1), (), f"{problem}; expected sections such as `trainer:`")])
    return Source(file, data, builder.places)


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


def _build_value(text: str, place: Place, path: SettingPath, builder: _Builder) -> object:
    """Return the value of `text`, or raise all its problems at once."""
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
    return value


def _syntax_problem(error: yaml.MarkedYAMLError, place: Place, text: str) -> LocatedProblem:
    reason = ", ".join(filter(None, [error.context, error.problem]))
    mark = error.problem_mark or error.context_mark
    if mark is not None and "${" in "".join(text.split("\n")[mark.line : mark.line + 1]):
        reason += "; between braces or brackets, put a reference in quotes: '${...}'"
    if mark is None or place.origin.startswith("--set"):
        return LocatedProblem(place, (), f"does not parse: {reason}")
    return LocatedProblem(replace(place, line=mark.line + 1), (), f"column {mark.column + 1}: does not parse: {reason}")


def _parse_key(data: Any, parts: Iterable[str]) -> SettingPath:
    """Return `parts` as a path into `data`: a number is an index where a list is, and a key anywhere else."""
    path: list[str | int] = []
    for part in parts:
        index = int(part) if isinstance(data, list) and part.isdecimal() else part
        path.append(index)
        data = _child(data, index)
    return tuple(path)


def _child(data: Any, part: str | int) -> Any:
    """Return the value at one key or index, or None if no value is there."""
    if isinstance(data, dict):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None


def _replace_value(data: Any, path: SettingPath, value: object, place: Place, done: SettingPath = ()) -> Any:
    """Return `data` with the value at `path` replaced, creating the mappings that are missing on the way."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(data, list):
        if head not in range(len(data)):
            raise ConfigError(
                [
                    LocatedProblem(
                        place, (*done, head), f"there is no such element; the list has {len(data)}, numbered from 0"
                    )
                ]
            )
        changed = _replace_value(data[int(head)], rest, value, place, (*done, head))
        return [changed if index == head else each for index, each in enumerate(data)]
    if data is not None and not isinstance(data, dict):
        raise ConfigError([LocatedProblem(place, done, f"is {data!r}, which has no settings inside")])
    inner = data or {}
    return inner | {head: _replace_value(inner.get(head), rest, value, place, (*done, head))}


def apply_overrides(source: Source, settings: Iterable[str]) -> Source:
    """Return `source` with every override applied in order.

    Raises:
        ConfigError: With the problems of all overrides that cannot be applied.
    """
    problems: list[LocatedProblem] = []
    for setting in settings:
        try:
            source = source.override(setting)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return source


def _file_error(path: str | Path, message: str) -> ConfigError:
    return ConfigError([LocatedProblem(Place(str(path)), (), message)])
