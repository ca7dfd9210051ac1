"""From a file to a configuration: read, override, structure; whatever is wrong anywhere is said in one error."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args, get_origin

from cattrs.errors import ClassValidationError

from noether.config.compatibility import ConfigWarning, translate_settings
from noether.config.errors import ConfigError, LocatedProblem
from noether.config.function_callback import FunctionCallbackFactory
from noether.config.kinds import CALLBACK, FUNCTION, OPTIMIZER, Kind, Role, resolve
from noether.config.schema import (
    ENDS,
    INTERVALS,
    Callback,
    CheckpointSettings,
    Config,
    EvaluateSettings,
    Metric,
    OptimizerSettings,
)
from noether.config.source import apply_overrides, read
from noether.config.structure import (
    InvalidValueError,
    arguments,
    construct,
    make_converter,
    noted,
    parameters,
    structure,
)
from noether.core.errors import Problem, SettingsError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cattrs import Converter

    from noether.config.errors import SettingPath
    from noether.config.source import Source

_CALLED: Final[tuple[object, ...]] = (Callable, type)
_OWN: Final = tuple(field.name for field in dataclasses.fields(OptimizerSettings) if field.name != "kind")


def load(
    path: str | Path, overrides: Iterable[str] = (), allow: Sequence[str] = (), run_dir: Path | None = None
) -> Config:
    """Return the configuration in a YAML file.

    Args:
        path: The file.
        overrides: `key=value` each, as after `--set`, e.g. `trainer.max_epochs=20`. An end replaces the file's end.
        allow: Prefixes of modules that `kind` may name beside noether, torch and modules under the working directory.
        run_dir: Directory of the run that the file is of. It may have come from anywhere, with modules in it that are
            not the user's own, wherever it lies; they are not imported.

    Raises:
        ConfigError: With everything that is wrong, each with file and line.
    """
    return from_source(apply_overrides(read(path), overrides), allow, run_dir)


def from_source(source: Source, allow: Sequence[str] = (), run_dir: Path | None = None) -> Config:
    """Return the configuration in a source that is read already.

    Raises:
        ConfigError: With everything that is wrong, each with its place.
    """
    source = _one_end(source)
    config: Config = _structured(source, (), Config, make_config_converter(allow, source, run_dir))
    return config


def load_callbacks(path: str | Path, allow: Sequence[str] = ()) -> Any:
    """Return the callbacks in a YAML file as one callback, for a loop that is not ours.

    Args:
        path: A file with a list under `callbacks`; its other sections, if there are any, are not looked at.
        allow: As for `load`.

    Raises:
        ConfigError: With everything that is wrong with the callbacks, each with file and line.
    """
    from noether.core.reducer import compose

    return compose(*(kind.build() for kind in _listed(read(path), allow)))


def replace_callbacks(config: Config, path: str | Path, allow: Sequence[str] = ()) -> Config:
    """Return a configuration with the callbacks of another file in the place of its own.

    Args:
        config: The configuration.
        path: A file with a list under `callbacks`; its other sections, if there are any, are not looked at.
        allow: As for `load`.

    Raises:
        ConfigError: With everything that is wrong with the callbacks, each with file and line.
    """
    source = read(path)
    return dataclasses.replace(config, callbacks=_listed(source, allow), source=source)


def _listed(source: Source, allow: Sequence[str]) -> tuple[Kind, ...]:
    if "callbacks" not in source.data:
        message = f"has no list of `callbacks`{suggest('callbacks', source.data)}"
        raise ConfigError([LocatedProblem(source.place(()), (), message)])
    listed: tuple[Kind, ...] = _structured(
        source, ("callbacks",), tuple[Callback, ...], make_config_converter(allow, source)
    )
    return listed


def make_config_converter(allow: Sequence[str], source: Source, run_dir: Path | None = None) -> Converter:
    """Return the strict converter that also knows the kinds and the sections that hold more than their fields."""
    made = make_converter()
    kinds = _Kinds(made, tuple(allow), source, run_dir)
    made.register_structure_hook(EvaluateSettings, lambda value, _: _evaluate(made, value))
    made.register_structure_hook(CheckpointSettings, lambda value, _: _checkpoints(made, value))
    made.register_structure_hook(OptimizerSettings, lambda value, _: _optimizer(kinds, value))
    made.register_structure_hook(Config, lambda value, _: construct(made, Config, value, source=source))
    made.register_structure_hook_func(lambda kind: get_origin(kind) in _CALLED, lambda value, _: kinds.called(value))
    made.register_structure_hook_func(_role, lambda value, kind: kinds.role(value, *get_args(kind)))
    return made


@dataclass(frozen=True)
class _Kinds:
    """Structures what names an object of the user's."""

    using: Converter
    allow: tuple[str, ...]
    source: Source
    run_dir: Path | None

    def role(self, value: object, kind: type, role: Role | str) -> object:
        if kind is Kind and isinstance(role, Role):
            return self.callback(value) if role is CALLBACK else self.kind(value, role)
        path: str = self.using.structure(value, str)
        # A metric without a dot is one of ours, by name: the callback that measures it knows them.
        if isinstance(role, Role) or "." in path:
            self.resolve(path, role if isinstance(role, Role) else FUNCTION)
        return path

    def called(self, value: object) -> object:
        return self.resolve(value, dataclasses.replace(FUNCTION, fits=callable, expected="something to call"))

    def resolve(self, path: object, role: Role) -> Any:
        return resolve(path, role, self.allow, self.run_dir)

    def kind(self, value: object, role: Role) -> Kind:
        path, target, rest = self.split(value, role)
        settings, errors = arguments(self.using, target, rest, given=role.given)
        if errors:
            raise ClassValidationError("settings", errors, Kind)
        return Kind(path, target, settings)

    def callback(self, value: object) -> Kind:
        """Return a callback, made once so that its constructor has judged the settings."""
        path, target, rest = self.split(value, CALLBACK)
        target = target if isinstance(target, type) else FunctionCallbackFactory(target)
        if "name" not in parameters(target):
            rest.pop("name", None)  # a label for the reader
        if isinstance(target, type):
            rest, ignored = translate_settings(target, rest)
            for problem in ignored:
                self.warn(value, problem)
        construct(self.using, target, rest)
        return Kind(path, target, arguments(self.using, target, rest)[0])

    def warn(self, callback: object, problem: Problem) -> None:
        """Warn of a setting of one of the callbacks, with its place."""
        listed = self.source.data.get("callbacks", [])
        path = ("callbacks", next(index for index, each in enumerate(listed) if each is callback), problem.setting)
        warnings.warn(str(LocatedProblem(self.source.place(path), path, problem.message)), ConfigWarning, stacklevel=2)

    def split(self, value: object, role: Role) -> tuple[str, Any, dict[str, object]]:
        """Return the path in an entry, what it stands for, and the settings beside it."""
        if not isinstance(value, dict):
            raise InvalidValueError(f"{value!r} is not a mapping with a `kind`")
        rest = {name: each for name, each in value.items() if name != "kind"}
        try:
            if "kind" not in value:
                raise InvalidValueError(f"is missing; expected {role.expected}")  # noqa: TRY301 - noted as every error here
            return value["kind"], self.resolve(value["kind"], role), rest
        except InvalidValueError as error:
            raise ClassValidationError("kind", [noted(error, "kind")], Kind) from None


def _evaluate(using: Converter, value: object) -> object:
    if not isinstance(value, dict):
        raise InvalidValueError(f"{value!r} is not a mapping such as {{val: [loss, accuracy], every_n_epochs: 1}}")
    intervals = {name: each for name, each in value.items() if name in INTERVALS}
    datasets: dict[str, object] = {}
    errors: list[Exception] = []
    for name in (name for name in value if name not in INTERVALS):
        # A list that is refused counts as one, so that the constructor does not refuse it again.
        datasets[name] = ("loss",)
        with _collecting(errors, name):
            if not isinstance(value[name], list):
                message = f"{value[name]!r} is not a list such as [loss, accuracy]{suggest(name, INTERVALS)}"
                raise InvalidValueError(message)
            datasets[name] = using.structure(value[name], tuple[Metric, ...])
    with _collecting(errors):
        made = construct(using, EvaluateSettings, intervals, datasets=datasets)
    return _unless(errors, lambda: made)


def _checkpoints(using: Converter, value: object) -> object:
    """Return the section in which `async`, which no field of Python's can be called, stands for `asynchronous`."""
    if not isinstance(value, dict) or "async" not in value:
        return construct(using, CheckpointSettings, value)
    rest = {name: each for name, each in value.items() if name != "async"}
    errors: list[Exception] = []
    given = True
    with _collecting(errors, "async"):
        given = using.structure(value["async"], bool)
    with _collecting(errors):
        made = construct(using, CheckpointSettings, rest, asynchronous=given)
    return _unless(errors, lambda: made)


def _optimizer(kinds: _Kinds, value: object) -> object:
    """Return the optimizer's section, of which every key that is not a field is a setting of the class."""
    path, target, rest = kinds.split(value, OPTIMIZER)
    section = {name: each for name, each in rest.items() if name in _OWN}
    others = {name: each for name, each in rest.items() if name not in _OWN}
    settings, errors = arguments(kinds.using, target, others, given=OPTIMIZER.given, beside=_OWN)
    with _collecting(errors):
        made = construct(kinds.using, OptimizerSettings, section, kind=Kind(path, target, settings))
    errors.extend(_unknown_to_class(section, target))
    return _unless(errors, lambda: made)


def _unknown_to_class(section: Mapping[str, Any], target: type) -> Iterator[Exception]:
    """Yield what is set, for all parameters or for a group of them, and no setting of the optimizer's class."""
    taken = [name for name in parameters(target) if name not in OPTIMIZER.given]
    asked = {name: name for name in ("lr", "weight_decay") if section.get(name) is not None}
    groups = section.get("groups")
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        own = group.get("settings") if isinstance(group, dict) else None
        asked |= {f"groups.{index}.settings.{name}": name for name in (own if isinstance(own, dict) else ())}
    for setting, name in asked.items():
        if name not in taken:
            yield SettingsError([Problem(setting, f"is no setting of {target.__qualname__}{suggest(name, taken)}")])


@contextmanager
def _collecting(errors: list[Exception], part: str | None = None) -> Iterator[None]:
    """Collect what is raised inside, with the key that it lies under."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a constructor raises is a problem of its settings
        errors.append(error if part is None else noted(error, part))


def _unless(errors: list[Exception], made: Callable[[], object]) -> object:
    if errors:
        raise ClassValidationError("settings", errors, object)
    return made()


def _role(kind: object) -> bool:
    return get_origin(kind) is Annotated


def _one_end(source: Source) -> Source:
    """Return `source` with the ends of the file dropped where an override gives one."""
    given = [("trainer", name) for name in ENDS if name in (source.value(("trainer",)) or {})]
    if any(map(source.is_overridden, given)):
        for path in given:
            source = source if source.is_overridden(path) else source.without(path)
    return source


def _structured(source: Source, path: SettingPath, target: Any, using: Converter) -> Any:
    problems: list[LocatedProblem] = []
    made = structure(source, path, target, problems, using)
    if problems:
        raise ConfigError(problems)
    return made
