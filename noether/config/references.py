r"""References in a configuration: `${section.setting}` for another setting, `${env:NAME}` for an environment variable.

The syntax is that of OmegaConf, without its other resolvers and without expressions:

| written | stands for |
|---|---|
| `${trainer.max_epochs}`, `${callbacks.0.every_n_epochs}` | the value written there, of any type |
| `${.width}`, `${..seed}` | a setting beside this one, or beside the section around it |
| `${env:NAME}`, `${oc.env:NAME}` | the variable's value, read as YAML; kept as text where the setting is a text |
| `${env:NAME,default}` | the default if the environment has no such variable; `null` for no value |
| `runs/${run.name}-${env:USER}` | text with the values in it |
| `$${name}` | the text `${name}`; of several dollars before a brace, the first is removed |

The name or the default in a reference may contain references. References are resolved after `--set`. They read values
in the file, not the defaults of settings; the section `vars` is for values that are no settings. The `config.yaml` of
a run contains the resolved values, those of the environment too, so that a resume does not depend on it: keep secrets
in variables that your own code reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from noether.config.errors import ConfigError, InvalidValueError, LocatedProblem, format_path
from noether.config.yaml_values import MAX_BYTES, MAX_LEVELS, MAX_NODES, EnvironmentText
from noether.core.errors import suggest

if TYPE_CHECKING:
    from noether.config.errors import SettingPath
    from noether.config.source import Source

VARS: Final = "vars"
"""The section of values that only references read."""

_OPENING: Final = re.compile(r"(?<!\$)\$++\{")
_SPECIAL: Final = re.compile(r"(?<!\$)\$++\{|\}")
_ENVIRONMENT: Final = ("env", "oc.env")


def resolve_references(
    source: Source, section: str | None = None, environment: Mapping[str, str] | None = None
) -> Source:
    r"""Return `source` with each reference replaced by what it stands for, and without its section `vars`.

    Args:
        source: Values with references.
        section: The only section in which references are resolved; None for all.
        environment: Environment variables; None for those of the process.

    Raises:
        ConfigError: With each reference that stands for nothing, at the place where it is written.

    Example:
        >>> from noether.config.source import parse
        >>> source = parse("epochs: 5\nevery: ${epochs}\nname: run-${env:ID,1}", "a.yaml")
        >>> resolve_references(source, environment={"ID": "7"}).data
        {'epochs': 5, 'every': 5, 'name': 'run-7'}
        >>> resolve_references(parse("epochs: 5\nevery: ${epoch}", "a.yaml"))
        Traceback (most recent call last):
        noether.config.errors.ConfigError: a.yaml:2: every: ${epoch}: nothing is written at epoch; did you mean
        'epochs'?
    """
    resolution = _Resolution(source, os.environ if environment is None else environment)
    if section is None:
        values = resolution.resolve(source.data, ())
        resolution.check_vars()
    else:
        values = {**source.data, section: resolution.resolve(source.data[section], (section,))}
    if resolution.problems:
        raise ConfigError(resolution.problems)
    data = {key: each for key, each in values.items() if key != VARS}
    return replace(source, data=data, references={**source.references, **resolution.texts})


def escape_references(value: Any) -> Any:
    """Return plain values in which no text is a reference, so that `resolve_references` returns `value`.

    Example:
        >>> escape_references({"a": ["${b}", "c"]})
        {'a': ['$${b}', 'c']}
    """
    if isinstance(value, Mapping):
        return {key: escape_references(each) for key, each in value.items()}
    if isinstance(value, list):
        return [escape_references(each) for each in value]
    return _OPENING.sub(lambda found: f"${found[0]}", value) if isinstance(value, str) else value


@dataclass
class _Resolution:
    """Resolves the references of one source; each value once."""

    source: Source
    environment: Mapping[str, str]
    problems: list[LocatedProblem] = field(default_factory=list)
    texts: dict[SettingPath, str] = field(default_factory=dict)
    _values: dict[SettingPath, Any] = field(default_factory=dict)
    _open: dict[SettingPath, None] = field(default_factory=dict)
    _size: int = 0
    _read: set[SettingPath] = field(default_factory=set)

    def resolve(self, value: Any, path: SettingPath) -> Any:
        """Return the value at `path` without references; None after recording a problem."""
        if path not in self._values:
            self._open[path] = None
            try:
                self._values[path] = self._resolve(value, path)
            finally:
                del self._open[path]
        return self._values[path]

    def _resolve(self, value: Any, path: SettingPath) -> Any:
        if isinstance(value, dict):
            for key in filter(_OPENING.search, value):
                message = "is a key, which cannot be a reference; write the name itself"
                self.problems.append(LocatedProblem(self.source.place((*path, key)), (*path, key), message))
            return {key: self.resolve(each, (*path, key)) for key, each in value.items()}
        if isinstance(value, list):
            return [self.resolve(each, (*path, index)) for index, each in enumerate(value)]
        if not isinstance(value, str) or not _OPENING.search(value):
            return value
        self.texts[path] = value
        try:
            parts, _ = _split(value)
            return self._limit(self._join(parts, path), len(path))
        except InvalidValueError as error:
            self.problems.append(LocatedProblem(self.source.place(path), path, str(error)))
            return None

    def _limit(self, value: Any, depth: int) -> Any:
        """Return `value`; refuse it if references expand to more values than a document may have."""
        self._size += len(value) * MAX_NODES // MAX_BYTES if isinstance(value, str) else 1
        if self._size > MAX_NODES or depth > MAX_LEVELS:
            raise InvalidValueError("the references expand to too many values, or too long a text, for a configuration")
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self._limit(each, depth + 1)
        return value

    def _join(self, parts: list[str | _Reference], path: SettingPath) -> Any:
        """Return the value of a single reference, or the text that several parts make together."""
        if len(parts) == 1:
            return parts[0] if isinstance(parts[0], str) else self._find(parts[0], path)
        return "".join(part if isinstance(part, str) else self._text_of(part, path) for part in parts)

    def _text_of(self, reference: _Reference, path: SettingPath) -> str:
        value = self._find(reference, path)
        if isinstance(value, (dict, list)):
            kind = "mapping" if isinstance(value, dict) else "list"
            raise InvalidValueError(f"{reference.text}: is a {kind}, which cannot be a part of a text")
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: "null"}[value]
        return str(value)

    def _find(self, reference: _Reference, path: SettingPath) -> Any:
        head = reference.parts[0] if reference.parts and isinstance(reference.parts[0], str) else ""
        resolver, colon, rest = head.partition(":")
        if not colon:
            return self._find_setting(reference, str(self._join(["", *reference.parts], path)).strip(), path)
        if resolver.strip() not in _ENVIRONMENT:
            raise InvalidValueError(
                f"{reference.text}: {resolver.strip()!r} is not known; write ${{section.setting}} or ${{env:NAME}}, "
                "and compute other values in code"
            )
        return self._find_variable(reference, [rest, *reference.parts[1:]], path)

    def _find_variable(self, reference: _Reference, parts: list[str | _Reference], path: SettingPath) -> Any:
        comma = next((i for i, part in enumerate(parts) if isinstance(part, str) and "," in part), None)
        name_parts, default = parts, None
        if comma is not None:
            before, _, after = str(parts[comma]).partition(",")
            name_parts, default = [*parts[:comma], before], [after, *parts[comma + 1 :]]
        name = str(self._join(["", *name_parts], path)).strip()
        if name in self.environment:
            return EnvironmentText(self.environment[name])
        if default is None:
            hint = suggest(name, self.environment)
            raise InvalidValueError(
                f"{reference.text}: the environment has no variable {name!r}{hint}; set it, or write a default: "
                f"${{env:{name},default}}"
            )
        return self._read_default([each for each in default if not isinstance(each, str) or each.strip()], path)

    def _read_default(self, parts: list[str | _Reference], path: SettingPath) -> Any:
        value = self._join(parts, path) if parts else ""
        if not isinstance(value, str) or not all(isinstance(part, str) for part in parts):
            return value
        text = value.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            return text[1:-1]
        return None if text == "null" else EnvironmentText(text)

    def _find_setting(self, reference: _Reference, name: str, path: SettingPath) -> Any:
        dots = len(name) - len(name.lstrip("."))
        keys = [*path[: max(0, len(path) - dots)]] if dots else []
        keys += re.sub(r"\[(\w+)\]", r".\1", name[dots:]).split(".")
        if "" in keys or dots > len(path):
            raise InvalidValueError(
                f"{reference.text}: is no reference; write ${{section.setting}} or ${{env:NAME}}, or $${{ for the text "
                "${"
            )
        value: Any = self.source.data
        walked: SettingPath = ()
        is_resolved = False
        for key in keys:
            if isinstance(value, str) and not is_resolved:  # a reference to the section
                value, is_resolved = self._enter(value, walked, reference), True
            index: Any = int(key) if isinstance(value, list) and str(key).isdecimal() else key
            if index not in (
                range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
            ):
                at = format_path((*walked, index))
                raise InvalidValueError(f"{reference.text}: nothing is written at {at}{_hint(key, value)}")
            value, walked = value[index], (*walked, index)
        is_chosen = any(isinstance(part, _Reference) for part in reference.parts)  # it may name any value beside it
        self._read.add(walked[:1] if is_chosen else walked[:2])
        return value if is_resolved else self._enter(value, walked, reference)

    def _enter(self, value: Any, path: SettingPath, reference: _Reference) -> Any:
        """Return the value at another path, unless it is being resolved, which needs this reference."""
        if path in self._open:
            way = [*list(self._open)[list(self._open).index(path) :], path]
            refers = " -> ".join(format_path(each) for each in way if each == path or each in self.texts)
            raise InvalidValueError(f"{reference.text}: refers to itself: {refers}")
        if len(self._open) > MAX_LEVELS:
            raise InvalidValueError(
                f"{reference.text}: too many references follow one another; at most {MAX_LEVELS} may"
            )
        return self.resolve(value, path)

    def check_vars(self) -> None:
        """Record a problem for each value in `vars` that no reference reads; an override may have replaced one."""
        values = self.source.data.get(VARS, {})
        if not isinstance(values, dict):
            message = "is not a mapping of values that references read, such as {width: 32}"
            self.problems.append(LocatedProblem(self.source.place((VARS,)), (VARS,), message))
        is_overridden = any(place.line is None for place in self.source.places.values())
        for name in values if isinstance(values, dict) and not is_overridden else ():
            path = (VARS, name)
            if path not in self._read and (VARS,) not in self._read:
                message = f"no reference reads it; write ${{vars.{name}}} where the value belongs, or remove it"
                self.problems.append(LocatedProblem(self.source.place(path), path, message))


@dataclass(frozen=True)
class _Reference:
    """A reference as it is written, and the text and references between its braces."""

    text: str
    parts: list[str | _Reference]


def _split(text: str, start: int = 0, level: int = 0) -> tuple[list[str | _Reference], int]:
    """Return literal text and references from `start` on, to the end or to the brace that closes, and that position."""
    if level > MAX_LEVELS:
        raise InvalidValueError("references are nested too deeply")
    parts: list[str | _Reference] = []
    literal, position = "", start
    while True:
        found = _SPECIAL.search(text, position)
        end = len(text) if found is None else found.start()
        literal += text[position:end]
        if found is None or (level and found[0] == "}"):
            return [*parts, *([literal] if literal or not parts else [])], end
        position = found.end()
        if found[0] == "}" or len(found[0]) > len("${"):
            literal += found[0].removeprefix("$")
            continue
        inside, closing = _split(text, position, level + 1)
        if closing == len(text):
            raise InvalidValueError(
                f"{text[end : end + 40]}: the brace is not closed; write }}, or $${{ for the text ${{"
            )
        parts += [*([literal] if literal else []), _Reference(text[end : closing + 1], inside)]
        literal, position = "", closing + 1


def _hint(key: str | int, value: Any) -> str:
    """Return which keys or elements a value has instead of `key`."""
    if isinstance(value, list):
        return f"; the list has {len(value)}, numbered from 0"
    if not isinstance(value, dict):
        return ""
    return suggest(str(key), value) or f"; known are {', '.join(value) or 'no settings'}"
