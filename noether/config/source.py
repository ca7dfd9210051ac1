"""YAML text as plain values, each with the place where it was written."""

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
"""Values a document may have once its aliases are written out; a few nested aliases can stand for billions."""
MAX_LEVELS = 100
"""How deep they may be nested: far less than what Python's own stack takes of whoever walks them."""
MAX_BYTES = 1 << 20
"""How large a file may be; who writes one by hand never comes near."""

_TOO_MANY = f"has more than {MAX_NODES} values once its aliases are written out"
_TOO_DEEP = "is nested too deeply"
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Source:
    r"""A configuration as it was written: its values and their places.

    Args:
        file: The file, as the user named it.
        data: What it says, in plain values: mappings, lists, text, numbers, true, false and null.
        places: Where each value was written; for the value of a mapping that is the place of its key.

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

    def place(self, path: SettingPath) -> Place:
        """Return where the value at `path` was written, or else the nearest value around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.file))

    def value(self, path: SettingPath) -> Any:
        """Return the value at `path`, or None where there is none."""
        value: Any = self.data
        for part in path:
            value = _inside(value, part)
        return value

    def is_overridden(self, path: SettingPath) -> bool:
        """Return whether the value at `path` was given by `override`."""
        return path in self.places and self.places[path].line is None

    def override(self, setting: str) -> Source:
        """Return the source with one value replaced, as `--set` does.

        Args:
            setting: `key=value`; the key is dotted, with numbers for list elements, and the value is YAML.

        Raises:
            ConfigError: If there is no `=`, the value does not parse, or the key leads nowhere.
        """
        place = Place(f"--set {setting}")
        key, equals, text = setting.partition("=")
        path = _way(self.data, key.strip().split("."))
        if not equals or "" in path:
            raise ConfigError(
                [LocatedProblem(place, (), "is not of the form key=value, such as trainer.max_epochs=20")]
            )
        builder = _Builder(lambda _: place)
        value = _built(text, place, path, builder)
        kept = {known: where for known, where in self.places.items() if known[: len(path)] != path}
        around = {path[:length]: place for length in range(1, len(path))}  # what had to be made on the way
        return replace(self, data=_replaced(self.data, path, value, place), places=around | kept | builder.places)

    def without(self, path: SettingPath) -> Source:
        """Return the source without the value at `path`, whose last part is a key of a mapping."""
        inner = {key: value for key, value in self.value(path[:-1]).items() if key != path[-1]}
        kept = {known: where for known, where in self.places.items() if known[: len(path)] != path}
        return replace(self, data=_replaced(self.data, path[:-1], inner, Place(self.file)), places=kept)


def read(path: str | Path) -> Source:
    """Return what the YAML file at `path` says.

    Raises:
        ConfigError: If the file cannot be read, is too large, is not UTF-8, does not parse, or is not a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _unreadable(path, f"has more than {MAX_BYTES} bytes, which is no configuration")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        beside = Path(path).parent
        names = [each.name for each in beside.glob("*.y*ml")] if beside.is_dir() else []
        raise _unreadable(path, f"no such file{suggest(Path(path).name, names)}") from None
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise _unreadable(path, (error.strerror or str(error)).lower()) from None
    return parse(text, str(path))


def parse(text: str, file: str) -> Source:
    r"""Return what the YAML `text` of `file` says.

    Numbers, true, false and null are those of YAML 1.2: `1e-3` is a number; `on`, `off`, `yes`, `no` and dates are
    text.

    Raises:
        ConfigError: If the text does not parse, a key is given twice, or it is not a mapping.

    Example:
        >>> parse("lr: 1e-3\nmode: on", "a.yaml").data
        {'lr': 0.001, 'mode': 'on'}
    """
    builder = _Builder(lambda node: Place(file, node.start_mark.line + 1))
    data = _built(text, Place(file), (), builder)
    if not isinstance(data, dict):
        shown = "is empty" if data is None else "is not a mapping"
        raise ConfigError([LocatedProblem(Place(file, 1), (), f"{shown}; expected sections such as `trainer:`")])
    return Source(file, data, builder.places)


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of the YAML 1.2 core schema instead of those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own design
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; in Python each takes a hundred times the room that it has in the text."""
        self.composed += 1
        if self.composed > 2 * MAX_NODES:  # keys are nodes, too
            raise _TooManyError
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


class _TooManyError(NoetherError):
    """There are more nodes than a document may have."""


SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    (f"{_TAG}bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (f"{_TAG}int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        f"{_TAG}float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    (f"{_TAG}null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (f"{_TAG}merge", r"<<", ["<"]),  # recognised in order to be refused
)
"""Tag, pattern and first characters of the scalars of YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3.2)."""

for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)

_SURROGATE = re.compile("[\ud800-\udfff]")
_RADIX = {"0o": 8, "0x": 16}
_SCALARS: dict[str, Callable[[str], object]] = {
    f"{_TAG}str": lambda text: text.encode().decode(),  # half of a surrogate pair is no text
    f"{_TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    # By way of decimals, for Python refuses to write out numbers that have too many of them.
    f"{_TAG}int": lambda text: int(str(int(text, _RADIX.get(text[:2], 10)))),
    f"{_TAG}float": lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower())),
    f"{_TAG}null": lambda _: None,
}


@dataclass
class _Builder:
    """Turns nodes into values, and notes down their places."""

    where: Callable[[yaml.Node], Place]
    places: dict[SettingPath, Place] = field(default_factory=dict)
    problems: list[LocatedProblem] = field(default_factory=list)
    nodes: int = 0

    def value(self, node: yaml.Node, path: SettingPath, around: tuple[yaml.Node, ...] = ()) -> object:
        self.nodes += 1
        place = self.places.setdefault(path, self.where(node))
        if self.nodes > MAX_NODES:
            raise ConfigError([LocatedProblem(place, (), _TOO_MANY)])
        if len(around) > MAX_LEVELS:
            raise ConfigError([LocatedProblem(place, (), _TOO_DEEP)])
        if any(node is each for each in around):
            return self.problem(node, path, "an alias stands inside of what it stands for")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, path, (*around, node))
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(each, (*path, index), (*around, node)) for index, each in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: SettingPath, around: tuple[yaml.Node, ...]) -> dict[str, object]:
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag == f"{_TAG}merge":
                self.problem(key_node, path, "`<<` is not part of YAML 1.2; write these settings out")
            elif key_node.tag != f"{_TAG}str" or not isinstance(key, str) or _SURROGATE.search(key):
                self.problem(key_node, path, f"the key {_shown(key_node)} is not text; put it in quotes")
            elif key in values:
                first = self.places[*path, key]
                self.problem(key_node, (*path, key), f"is given twice, first in line {first.line}")
            else:
                self.places[*path, key] = self.where(key_node)
                values[key] = self.value(value_node, (*path, key), around)
        return values

    def scalar(self, node: yaml.Node, path: SettingPath) -> object:
        convert = _SCALARS.get(node.tag)
        if convert is None or not isinstance(node, yaml.ScalarNode):
            tag = node.tag.replace(_TAG, "!!")
            return self.problem(node, path, f"the tag {tag} is refused; a configuration is plain values")
        try:
            return convert(node.value)
        except (ValueError, KeyError):
            return self.problem(node, path, f"{_shown(node)} does not fit its tag {node.tag.replace(_TAG, '!!')}")

    def problem(self, node: yaml.Node, path: SettingPath, message: str) -> object:
        """Note a problem down, and return what stands for the value."""
        self.problems.append(LocatedProblem(self.where(node), path, message))
        return None


def _shown(node: yaml.Node) -> str:
    text = node.value if isinstance(node, yaml.ScalarNode) else "[...]"
    return repr(text if len(text) <= 40 else f"{text[:40]}...")  # noqa: PLR2004 - a line of an error stays a line


def _built(text: str, place: Place, path: SettingPath, builder: _Builder) -> object:
    """Return the value of `text`, or raise everything that is wrong with it."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else builder.value(node, path)
        builder.places.setdefault(path, place)
    except RecursionError:
        raise ConfigError([LocatedProblem(place, (), _TOO_DEEP)]) from None
    except _TooManyError:
        raise ConfigError([LocatedProblem(place, (), _TOO_MANY)]) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_unparsed(error, place)]) from None
    except yaml.reader.ReaderError as error:
        line = None if place.origin.startswith("--set") else text.count("\n", 0, error.position) + 1
        message = f"does not parse: the character {chr(int(error.character))!r} is not allowed"
        raise ConfigError([LocatedProblem(replace(place, line=line), (), message)]) from None
    if builder.problems:
        raise ConfigError(builder.problems)
    return value


def _unparsed(error: yaml.MarkedYAMLError, place: Place) -> LocatedProblem:
    said = ", ".join(filter(None, [error.context, error.problem]))
    mark = error.problem_mark or error.context_mark
    if mark is None or place.origin.startswith("--set"):
        return LocatedProblem(place, (), f"does not parse: {said}")
    return LocatedProblem(replace(place, line=mark.line + 1), (), f"column {mark.column + 1}: does not parse: {said}")


def _way(data: Any, parts: Iterable[str]) -> SettingPath:
    """Return `parts` as a path into `data`: a number is an index where there is a list, and a key anywhere else."""
    way: list[str | int] = []
    for part in parts:
        index = int(part) if isinstance(data, list) and part.isdecimal() else part
        way.append(index)
        data = _inside(data, index)
    return tuple(way)


def _inside(data: Any, part: str | int) -> Any:
    """Return the value at one key or index, or None where there is none."""
    if isinstance(data, dict):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None


def _replaced(data: Any, path: SettingPath, value: object, place: Place, done: SettingPath = ()) -> Any:
    """Return `data` with the value at `path` replaced; mappings that are missing on the way are made."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(data, list):
        if head not in range(len(data)):
            raise ConfigError(
                [LocatedProblem(place, (*done, head), f"there is no such element; the list has {len(data)}")]
            )
        changed = _replaced(data[int(head)], rest, value, place, (*done, head))
        return [changed if index == head else each for index, each in enumerate(data)]
    if data is not None and not isinstance(data, dict):
        raise ConfigError([LocatedProblem(place, done, f"is {data!r}, which has no settings inside")])
    inner = data or {}
    return inner | {head: _replaced(inner.get(head), rest, value, place, (*done, head))}


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


def _unreadable(path: str | Path, message: str) -> ConfigError:
    return ConfigError([LocatedProblem(Place(str(path)), (), message)])
