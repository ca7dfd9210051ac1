"""The reference of the configuration: each section and setting with its type, default, range and documentation.

All texts come from the docstrings of the settings classes.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, final

from noether.config.bounds import find_bounds
from noether.config.changes import MAY_CHANGE
from noether.config.compatibility import SECTIONS, TRAINER
from noether.config.docstrings import SECTION, Setting, argument_texts, docstring_of, make_setting
from noether.config.errors import InvalidValueError
from noether.config.objects.kinds import Kind
from noether.config.references import VARS
from noether.config.schema import Config
from noether.config.structure.signatures import parameters
from noether.config.trainer_settings import CheckpointSettings, EvaluateSettings
from noether.core.errors import suggest

_VARIABLES: Final = Setting(
    VARS, "mapping", "{}", "Values that only references such as `${vars.width}` in other settings read."
)


@final
@dataclass(frozen=True)
class Entry:
    """A section or a setting of the configuration.

    Args:
        name: Its dotted name, as after `--set`; `NAME` stands for a key that the user chooses, `N` for an index.
        setting: Its name in its section, type, default, text and range.
        settings: What is in it; empty for a setting.
    """

    name: str
    setting: Setting
    settings: tuple[Entry, ...] = ()

    @property
    def may_change(self) -> bool:
        """Whether a resumed run may change it, or every setting in it."""
        return any(f"{self.name}.".startswith(f"{each}.") for each in MAY_CHANGE)


def read_sections() -> tuple[Entry, ...]:
    """Return all sections of the configuration.

    Example:
        >>> [section.name for section in read_sections()]
        ['run', 'model', 'data', 'optimizer', 'trainer', 'callbacks', 'vars']
    """
    return (*_entries(Config, ""), Entry(VARS, _VARIABLES))


def find_entry(name: str) -> Entry:
    """Return the section or setting with a dotted name.

    Args:
        name: The dotted name; a part that the user chooses, such as the key of a dataset, may be any text.

    Raises:
        InvalidValueError: If it does not exist; the message has the nearest name, or what replaces an older setting.

    Example:
        >>> find_entry("trainer.max_batch_size").setting.bounds
        'at least 1'
        >>> find_entry("trainer.max_bacth_size")
        Traceback (most recent call last):
        noether.config.errors.InvalidValueError: no setting 'trainer.max_bacth_size'; did you mean
        'trainer.max_batch_size'?
    """
    entries, found = read_sections(), None
    for part in name.replace("[", ".").replace("]", "").split("."):
        if found is not None and "list" in found.setting.type and (part.isdigit() or part == _INDEX):
            continue
        fits = [each for name in (part, _KEY) for each in entries if each.setting.name == name]
        found = fits[0] if fits else None
        if found is None:
            raise InvalidValueError(f"no setting {name!r}{_explain_older(name) or _suggest_nearest(name)}")
        entries = found.settings
    return typing.cast("Entry", found)


def walk(entries: tuple[Entry, ...] | None = None) -> Iterator[Entry]:
    """Yield each section and setting, a section before its settings."""
    for each in read_sections() if entries is None else entries:
        yield each
        yield from walk(each.settings)


_KEY: Final = "NAME"
_INDEX: Final = "N"


def fields_in_yaml(section: type) -> dict[str, tuple[str, Any]]:
    """Return the field and the annotation of each setting of a section, by its name in YAML.

    Example:
        >>> fields_in_yaml(CheckpointSettings)["async"]
        ('asynchronous', <class 'bool'>)
    """
    renamed = {CheckpointSettings: {"asynchronous": "async"}, EvaluateSettings: {"datasets": _KEY}}.get(section, {})
    left_out = {"batch_size", "source"} if section is Config else set()
    known = parameters(section)
    names = [each.name for each in dataclasses.fields(section) if each.name not in left_out]
    return {renamed.get(name, name): (name, known[name].annotation) for name in names}


def _entries(section: type, name: str) -> tuple[Entry, ...]:
    """Return the settings of a section, required ones and optional ones in the order of the class."""
    known, texts = parameters(section), argument_texts(docstring_of(section))
    return tuple(
        _entry(f"{name}.{key}" if name else key, make_setting(known[field].replace(name=field), texts), section, field)
        for key, (field, _) in fields_in_yaml(section).items()
    )


def _entry(name: str, setting: Setting, section: type, field: str) -> Entry:
    annotation = parameters(section)[field].annotation
    key = name.rpartition(".")[2]
    inner = section_in(annotation)
    default = setting.default
    setting = dataclasses.replace(setting, text=re.sub(r"\bNone\b", "null", setting.text))
    if section is Config and key == "callbacks":
        setting, default = dataclasses.replace(setting, type="list of callbacks"), "default"
    if inner is None:
        if section is EvaluateSettings and key == _KEY:
            setting = dataclasses.replace(setting, type="list of metrics")
        bounds = str(find_bounds(section, field, annotation))
        setting = dataclasses.replace(setting, name=key, default=default, bounds=bounds)
        return Entry(name, setting, _open_settings(name))
    listed = typing.get_origin(annotation) is tuple
    default = default if default in {None, "null", "[]"} else "{}"
    setting = dataclasses.replace(setting, name=key, type="list of sections" if listed else "section", default=default)
    return Entry(name, setting, _entries(inner, f"{name}.{_INDEX}" if listed else name))


def _open_settings(name: str) -> tuple[Entry, ...]:
    """Return the entries in a section whose keys the user chooses: the datasets, and `data.batch_size`."""
    if name != "data":
        return ()
    texts = argument_texts(docstring_of(Config))
    count = make_setting(parameters(Config)["batch_size"], texts)
    dataset = Setting(_KEY, "a dataset: `kind` and settings", None, "A dataset; training uses `train`.")
    kind = Setting("kind", "dotted path", None, "Dotted path of a class or function; its settings are beside it.")
    return (Entry("data.batch_size", count), Entry("data.NAME", dataset, (Entry("data.NAME.kind", kind),)))


def section_in(annotation: Any) -> type | None:
    """Return the settings class in an annotation, such as that of an optional section or a list of sections.

    Example:
        >>> section_in(EvaluateSettings | None).__name__
        'EvaluateSettings'
    """
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) in (Annotated, Mapping):
        return None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return next((found for each in inside if (found := section_in(each))), None)
    is_section = isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and annotation is not Kind
    return annotation if is_section else None


def section_text(name: str) -> str:
    """Return the documentation of the settings class of a section, without its lists of arguments."""
    section: Any = Config
    for part in name.split("."):
        fields = {} if part == _INDEX else fields_in_yaml(section)
        section = section_in(fields[part][1]) if part in fields else section
        if section is None:
            return ""
    return SECTION.sub("", docstring_of(section)).strip()


def _suggest_nearest(name: str) -> str:
    names = [each.name for each in walk()]
    same = [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"; did you mean {' or '.join(map(repr, same))}?" if same else suggest(name, names)


def _explain_older(name: str) -> str:
    """Return what replaces a setting of the class-based framework, for a message, or an empty text."""
    section, _, key = name.rpartition(".")
    for translation, prefix in ((TRAINER, "trainer"), (SECTIONS, "")):
        if section not in {prefix, ""}:
            continue
        if key in translation.renamed:
            return f": it is an older name of {prefix}.{translation.renamed[key]}"
        if key in translation.ignored:
            return f": it has no effect here: {translation.ignored[key]}"
        if key in translation.replaced:
            return f": {translation.replaced[key]}"
    return ""
