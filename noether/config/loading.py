"""Reads a YAML file, applies overrides and returns the configuration; every problem is in one error."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from noether.config.default_callbacks import list_callbacks
from noether.config.errors import ConfigError, LocatedProblem
from noether.config.older_layout import read_older_layout
from noether.config.references import VARS, resolve_references
from noether.config.repeated_callbacks import find_repeated, warn_of_repeated
from noether.config.schema import Callback, Config
from noether.config.source import apply_overrides, read
from noether.config.structure.converter import structure
from noether.config.structure.hooks import make_config_converter
from noether.config.trainer_settings import ENDS
from noether.core.errors import suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from cattrs import Converter

    from noether.config.errors import SettingPath
    from noether.config.objects.kinds import Kind
    from noether.config.source import Source


def load(
    path: str | Path, overrides: Iterable[str] = (), allow: Sequence[str] = (), run_dir: Path | None = None
) -> Config:
    """Return the configuration in a YAML file, with its references such as `${trainer.max_epochs}` resolved.

    References may also name environment variables, whose values are then part of the configuration and of the
    `config.yaml` of its run; `noether.config.references` describes the syntax.

    Args:
        path: The file.
        overrides: `key=value` each, as after `--set`, e.g. `trainer.max_epochs=20`. An end replaces the file's end.
        allow: Prefixes of modules that `kind` may name, beside noether, torch and modules under the working directory.
        run_dir: Directory of the run that the file belongs to. It may come from a stranger, so modules in it are not
            imported even if it is under the working directory.

    Raises:
        ConfigError: With every problem, each with file and line.
    """
    return from_source(apply_overrides(read(path), overrides), allow, run_dir)


def from_source(source: Source, allow: Sequence[str] = (), run_dir: Path | None = None) -> Config:
    """Return the configuration in a source that was read already.

    Raises:
        ConfigError: With every problem, each with its place.
    """
    source = read_older_layout(resolve_references(_drop_replaced_ends(source)))
    if "callbacks" in source.data:
        source = list_callbacks(source)
    try:
        config: Config = _structure_or_raise(source, (), Config, make_config_converter(allow, source, run_dir))
    except ConfigError as error:
        raise ConfigError([_name_vars(each, source) for each in error.problems]) from None
    if "callbacks" in source.data:
        return config
    source = list_callbacks(source)  # after the other sections, because the default callbacks import torch
    return dataclasses.replace(config, callbacks=_structure_list(source, allow), source=source)


def load_callbacks(path: str | Path, allow: Sequence[str] = ()) -> Any:
    """Return the callbacks in a YAML file as one callback, for a loop other than noether's trainer.

    Args:
        path: A file with a list under `callbacks`; its other sections are ignored.
        allow: As for `load`.

    Raises:
        ConfigError: With every problem of the callbacks, each with file and line.
    """
    from noether.core.reducer import compose
    from noether.core.run import Run

    source = read(path)
    callbacks = [kind.build() for kind in _structure_callbacks(source, allow)]
    repeated = find_repeated(callbacks, Run())
    warn_of_repeated(callbacks, repeated, source)
    return compose(*(each for index, each in enumerate(callbacks) if index not in repeated))


def replace_callbacks(config: Config, path: str | Path, allow: Sequence[str] = ()) -> Config:
    """Return a configuration with its callbacks replaced by those of another file.

    Args:
        config: The configuration.
        path: A file with a list under `callbacks`; its other sections are ignored.
        allow: As for `load`.

    Raises:
        ConfigError: With every problem of the callbacks, each with file and line.
    """
    source = read(path)
    return dataclasses.replace(config, callbacks=_structure_callbacks(source, allow), source=source)


def _structure_callbacks(source: Source, allow: Sequence[str]) -> tuple[Kind, ...]:
    source = read_older_layout(source)
    if "callbacks" not in source.data:
        message = f"has no list of `callbacks`{suggest('callbacks', source.data)}"
        raise ConfigError([LocatedProblem(source.place(()), (), message)])
    return _structure_list(list_callbacks(resolve_references(source, "callbacks")), allow)


def _structure_list(source: Source, allow: Sequence[str]) -> tuple[Kind, ...]:
    callbacks: tuple[Kind, ...] = _structure_or_raise(
        source, ("callbacks",), tuple[Callback, ...], make_config_converter(allow, source)
    )
    return callbacks


def _drop_replaced_ends(source: Source) -> Source:
    """Return `source` without the ends that the file gives, if an override gives an end."""
    trainer = source.value(("trainer",))
    given = [("trainer", name) for name in ENDS if isinstance(trainer, Mapping) and name in trainer]
    if any(map(source.is_overridden, given)):
        for path in given:
            source = source if source.is_overridden(path) else source.without(path)
    return source


def _name_vars(problem: LocatedProblem, source: Source) -> LocatedProblem:
    """Return a problem; if it is a name beside the sections that references read, say where such values belong."""
    name = ".".join(map(str, problem.path))
    is_read = any(re.search(rf"\$\{{\s*{re.escape(name)}\s*[.}}\[]", each) for each in source.references.values())
    if len(problem.path) != 1 or not problem.message.startswith("unknown setting") or not is_read:
        return problem
    message = f"is no section; values that only references read belong in {VARS}: write ${{{VARS}.{name}}} for them"
    return dataclasses.replace(problem, message=message)


def _structure_or_raise(source: Source, path: SettingPath, target: Any, converter: Converter) -> Any:
    problems: list[LocatedProblem] = []
    value = structure(source, path, target, problems, converter)
    if problems:
        raise ConfigError(problems)
    return value
