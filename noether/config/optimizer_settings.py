"""Settings of the optimizer: parameter groups, and schedules of the learning rate and the weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping  # noqa: TC003  # cattrs reads the annotations when it structures YAML
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, final

from noether.config.errors import InvalidValueError
from noether.config.objects.functions import Function, build_function
from noether.config.objects.kinds import FACTOR, Kind
from noether.core.errors import Problem, check_choice, check_whole, is_number, raise_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

ScheduleKind: TypeAlias = Annotated[Function, FACTOR]

DEFAULT_GROUP: Final = "default"
"""The group of every parameter that no `ParamGroup` matches."""


@final
@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Settings of a group of parameters, chosen by their names.

    Args:
        name: What logs and checkpoints call the group; `default` is the group of all other parameters.
        match: Patterns as in `fnmatch` (`*` also matches dots). A parameter is in the first group of which one pattern
            matches its name, or one of its names if it is tied.
        lr: Learning rate of the group, at least 0; None for that of the optimizer.
        weight_decay: Weight decay of the group, at least 0; None for that of the optimizer.
        frozen: Whether the parameters are excluded from training.
        settings: Other settings of the optimizer for this group, e.g. `{"betas": (0.9, 0.95)}`.

    Raises:
        SettingsError: If a value is out of range, or a frozen group has optimizer settings.

    Example:
        >>> ParamGroup(name="no_decay", match=("*.bias", "*norm*"), weight_decay=0.0).weight_decay
        0.0
        >>> ParamGroup(name="backbone", match=("backbone.*",), frozen=True, lr=0.1)
        Traceback (most recent call last):
        noether.core.errors.SettingsError: frozen: a frozen group is not trained, so lr has no effect; drop one
    """

    name: str
    match: tuple[str, ...]
    lr: float | None = None
    weight_decay: float | None = None
    frozen: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def overrides(self) -> dict[str, Any]:
        """Return the settings in which this group differs from the optimizer.

        Example:
            >>> ParamGroup(name="head", match=("head.*",), lr=0.1, settings={"eps": 1e-6}).overrides()
            {'lr': 0.1, 'eps': 1e-06}
        """
        named = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {key: value for key, value in named.items() if value is not None} | dict(self.settings)

    def _problems(self) -> Iterator[Problem | None]:
        if not self.name:
            yield Problem("name", "is empty; logs and checkpoints need a name for the group")
        if self.name == DEFAULT_GROUP:
            yield Problem("name", f"{self.name!r} is the name for all parameters that no group matches; choose another")
        if not self.match or not isinstance(self.match, (tuple, list)):  # text would be read as a list of letters
            yield Problem("match", f"{self.match!r} is not a list of patterns such as ['*.bias']")
        for key in ("lr", "weight_decay"):
            if getattr(self, key) is not None:
                yield check_number(key, getattr(self, key))
            if key in self.settings:
                yield Problem(f"settings.{key}", f"is a field of the group itself: write {key}: {self.settings[key]}")
        if self.frozen and self.overrides():
            names = ", ".join(self.overrides())
            yield Problem("frozen", f"a frozen group is not trained, so {names} has no effect; drop one")


@final
@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Schedule of a hyperparameter over a run; its factors multiply the base value.

    Args:
        kind: `constant`, `linear`, `cosine`, `polynomial` (to `end_factor` at the end of the run) or `step`; or the
            dotted path of a pure function from progress, which grows from 0 to 1 over the length, to a factor of at
            least 0. In YAML the settings of that function are beside the path. In Python the function itself is
            possible.
        length: Updates from the start of the run to the end of all but `constant` and `step`, warm-up included; after
            it the value stays. None for the length of the run, which changes if a resumed run gets another end.
        warmup_updates: Length of a linear warm-up in updates; 0 for no warm-up.
        warmup_epochs: Length of the warm-up in epochs; give at most one of the two.
        warmup_start_factor: Factor at the start of the warm-up, at least 0; None is 0.
        end_factor: Factor at the end of `linear`, `cosine` and `polynomial`, at least 0; None is 0. Above 1 the value
            grows.
        power: Exponent of `polynomial`, above 0; None is 1.
        milestone_epochs: Increasing epochs, counted from the run's start, after which `step` multiplies by `gamma`.
        milestone_updates: The same in updates; give exactly one of the two.
        gamma: Factor of `step`, above 0; None is 0.1.

    Raises:
        SettingsError: With every value that is out of range or is not a setting of the kind.

    Example:
        >>> ScheduleSettings(kind="cosine", warmup_epochs=5, end_factor=0.01).kind
        'cosine'
        >>> ScheduleSettings(kind="cosin", gamma=0)
        Traceback (most recent call last):
        noether.core.errors.SettingsError: kind: 'cosin' is not one of 'constant', 'linear', 'cosine', 'step',
        'polynomial'; did you mean 'cosine'?
        gamma: 0 is not a number above 0
    """

    kind: ScheduleKind = "constant"
    length: int | None = None
    warmup_updates: int = 0
    warmup_epochs: int = 0
    warmup_start_factor: float | None = None
    end_factor: float | None = None
    power: float | None = None
    milestone_epochs: tuple[int, ...] = ()
    milestone_updates: tuple[int, ...] = ()
    gamma: float | None = None

    def __post_init__(self) -> None:
        raise_problems([*self._value_problems(), *self._kind_problems(), *self._warmup_problems()])

    @property
    def has_length(self) -> bool:
        """Whether the schedule runs to an end, which `length` or the end of the run gives."""
        return "length" in self._settings_of_kind

    @property
    def label(self) -> str:
        """The kind for messages: its name, or the dotted path of a function."""
        return self.kind if isinstance(self.kind, str) else getattr(self.kind, "path", None) or repr(self.kind)

    @cached_property
    def factor(self) -> Callable[[float], float] | None:
        """The function of progress, if the kind is one."""
        if isinstance(self.kind, str) and "." not in self.kind:
            return None
        factor: Callable[[float], float] = build_function(self.kind)
        return factor

    @property
    def _settings_of_kind(self) -> tuple[str, ...]:
        return ("length",) if self.factor is not None else SETTINGS_OF_KIND.get(self.label, ())

    def _value_problems(self) -> Iterator[Problem | None]:
        if self.factor is None:
            yield check_choice("kind", self.kind, SETTINGS_OF_KIND)
        else:
            try:
                for progress in (0.0, 0.5, 1.0):
                    call_factor(self.factor, progress, self.label)
            except InvalidValueError as error:
                yield Problem("kind", str(error))
        for name, above in (("warmup_start_factor", False), ("end_factor", False), ("power", True), ("gamma", True)):
            if getattr(self, name) is not None:
                yield check_number(name, getattr(self, name), above=above)
        yield None if self.length is None else check_whole("length", self.length)
        yield _check_increasing("milestone_epochs", self.milestone_epochs)
        yield _check_increasing("milestone_updates", self.milestone_updates)

    def _kind_problems(self) -> Iterator[Problem]:
        if self.factor is None and self.kind not in SETTINGS_OF_KIND:
            return
        for name in ("length", "end_factor", "power", "gamma", "milestone_epochs", "milestone_updates"):
            if name not in self._settings_of_kind and getattr(self, name) not in (None, ()):
                kinds = " and ".join(kind for kind, names in SETTINGS_OF_KIND.items() if name in names)
                yield Problem(name, f"is a setting of {kinds}, and kind is {self.label}; remove it or change kind")
        if self.kind == "step" and bool(self.milestone_epochs) == bool(self.milestone_updates):
            yield Problem("milestone_epochs", "step needs either milestone_epochs or milestone_updates, e.g. [30, 60]")

    def _warmup_problems(self) -> Iterator[Problem | None]:
        yield check_whole("warmup_updates", self.warmup_updates, at_least=0)
        yield check_whole("warmup_epochs", self.warmup_epochs, at_least=0)
        if self.warmup_updates and self.warmup_epochs:
            yield Problem("warmup_epochs", "give the warm-up in updates or in epochs, not in both")
        if self.warmup_start_factor is not None and not (self.warmup_updates or self.warmup_epochs):
            yield Problem("warmup_start_factor", "there is no warm-up; give warmup_updates or warmup_epochs")


SETTINGS_OF_ALL: Final = ("length", "warmup_updates", "warmup_epochs", "warmup_start_factor")
"""Settings beside the dotted path of a function that are not those of the function."""

SETTINGS_OF_KIND: Final[Mapping[str, tuple[str, ...]]] = {
    "constant": (),
    "linear": ("length", "end_factor"),
    "cosine": ("length", "end_factor"),
    "step": ("gamma", "milestone_epochs", "milestone_updates"),
    "polynomial": ("length", "end_factor", "power"),
}
"""Settings beside the name of a kind of schedule that are not those of all schedules."""


def call_factor(factor: Callable[[float], float], progress: float, label: str) -> float:
    """Return the factor that a function returns for a progress in [0, 1].

    Raises:
        InvalidValueError: If the function, called `label`, raises an error, or returns no finite number of at least 0.

    Example:
        >>> call_factor(lambda progress: -progress, 0.5, "mine.halves")
        Traceback (most recent call last):
        noether.config.errors.InvalidValueError: mine.halves returned -0.5 at progress 0.5, not a finite number >= 0
    """
    try:
        value = factor(progress)
    except Exception as error:
        raise InvalidValueError(f"{label} raised {type(error).__name__} at progress {progress}: {error}") from error
    if check_number(label, value) is not None:
        raise InvalidValueError(f"{label} returned {value!r} at progress {progress}, not a finite number >= 0")
    return value


def check_number(setting: str, value: object, *, above: bool = False) -> Problem | None:
    """Return the problem of `value` as a finite number of at least 0, or above 0, or None.

    Example:
        >>> print(check_number("lr", float("nan")))
        lr: nan is not a number of at least 0
    """
    if is_number(value) and math.isfinite(value) and (value > 0 if above else value >= 0):
        return None
    return Problem(setting, f"{value!r} is not a number {'above 0' if above else 'of at least 0'}")


def _check_increasing(setting: str, value: tuple[int, ...]) -> Problem | None:
    if any(check_whole(setting, item) for item in value) or any(late <= early for early, late in pairwise(value)):
        return Problem(setting, f"{value!r} is not an increasing list of whole numbers of at least 1")
    return None


@final
@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer. In YAML the settings of its class are written beside the fields.

    Args:
        kind: Subclass of `torch.optim.Optimizer` with its settings, except the fields below.
        lr: Base learning rate, at least 0, which `schedule` multiplies.
        weight_decay: Base weight decay, at least 0; None for the default of the class.
        schedule: Schedule of the learning rate; None for constant.
        weight_decay_schedule: Schedule of the weight decay; None for constant.
        groups: Groups of parameters with different settings.

    Raises:
        SettingsError: If a value is out of range.
    """

    kind: Kind
    lr: float
    weight_decay: float | None = None
    schedule: ScheduleSettings | None = None
    weight_decay_schedule: ScheduleSettings | None = None
    groups: tuple[ParamGroup, ...] = ()

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        yield check_number("lr", self.lr)
        yield None if self.weight_decay is None else check_number("weight_decay", self.weight_decay)
        names = [getattr(group, "name", None) for group in self.groups]
        for index, name in enumerate(names):
            if name is not None and name in names[:index]:
                yield Problem(f"groups.{index}.name", f"{name!r} is the name of an earlier group too; rename one")
