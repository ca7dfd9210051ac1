"""Reads YAML text as plain values and records the place where each was written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.config.yaml_values import MAX_BYTES, build_value
from noether.core.errors import suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from noether.config.errors import SettingPath


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
        value, written = build_value(text, place, path, lambda _: place)
        around = {path[:length]: place for length in range(1, len(path))}  # of mappings that the override creates
        places = around | self._places_outside(path) | written
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
    data, places = build_value(text, Place(file), (), lambda node: Place(file, node.start_mark.line + 1))
    if not isinstance(data, dict):
        problem = "is empty" if data is None else "is not a mapping"
        raise ConfigError([LocatedProblem(Place(file, 1), (), f"{problem}; expected sections such as `trainer:`")])
    return Source(file, data, places)


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
