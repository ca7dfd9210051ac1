"""What each field of an event may be, and the check of events that a loop constructs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from torch import Tensor

from noether.core.errors import Problem, is_number, raise_problems
from noether.core.run import Run
from noether.core.tensors.losses import separate_weights
from noether.core.tensors.means import Mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.event import Event


class FieldRule(NamedTuple):
    """What a field of an event may be.

    Args:
        accepts: Whether it may be a value.
        expected: What it may be, in words.
        example: What to write.
        name: Name of the field.
        default: Its default, which is not checked.
    """

    accepts: Callable[[Any], bool]
    expected: str
    example: str
    name: str = ""
    default: Any = None


def check_fields(event_type: type[Event], fields: Mapping[str, Any]) -> None:
    """Raise an error for the fields that are not what the event documents; defaults are not checked.

    Args:
        event_type: The type of the event. Fields that a subclass adds or declares again are not checked.
        fields: The value of each field.

    Raises:
        SettingsError: With each wrong field, its value and what to write instead.

    Example:
        >>> from noether import AfterUpdate
        >>> check_fields(AfterUpdate, {"lr": 0.003})
        Traceback (most recent call last):
        noether.core.errors.SettingsError: AfterUpdate.lr: 0.003 is not a mapping from parameter group to number; write
        e.g. {'default': 0.003}
    """
    rules = _rules_of(event_type)
    wrong = [
        name
        for name, value in fields.items()
        if name in rules and value is not rules[name].default and not rules[name].accepts(value)
    ]
    if wrong:
        raise_problems(_find_problem(event_type, rules[name], fields[name]) for name in wrong)


def separate_means(event_type: type[Event], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `losses` and `loss_weights` of an event whose losses have a `Mean` among them; else no fields.

    Raises:
        SettingsError: If a weight is not one finite number >= 0.

    Example:
        >>> from noether import AfterUpdate, Mean
        >>> separate_means(AfterUpdate, {"losses": {"ce": Mean(0.5, weight=12)}})["loss_weights"]
        {'ce': 12}
    """
    losses = fields.get("losses")
    if not isinstance(losses, (dict, Mapping)) or Mean not in map(type, losses.values()):
        return {}
    rules = _rules_of(event_type)
    if "losses" not in rules:
        return {}
    try:
        separated = separate_weights(losses)
    except ValueError as error:
        raise_problems([Problem(f"{event_type.__name__}.losses", str(error))])
    given = fields.get("loss_weights", {})
    if "loss_weights" not in rules or not isinstance(given, Mapping):
        return {"losses": separated}
    return {"losses": separated, "loss_weights": {**given, **separated.weights}}


_RULES_OF: Final[dict[type[Event], dict[str, FieldRule]]] = {}


def _rules_of(event_type: type[Event]) -> dict[str, FieldRule]:
    """Return the rule of each field that the type inherits from noether's events as it is."""
    rules = _RULES_OF.get(event_type)
    if rules is None:
        ours: Any = next(base for base in event_type.__mro__ if base.__module__ == _EVENTS)
        inherited = [
            field
            for name, field in event_type.__dataclass_fields__.items()
            if ours.__dataclass_fields__.get(name) is field
        ]
        rules = _RULES_OF[event_type] = {
            field.name: _RULES[field.name]._replace(name=field.name, default=field.default)
            for field in inherited
            if field.name in _RULES
        }
    return rules


def _find_problem(event_type: type[Event], rule: FieldRule, value: Any) -> Problem:
    shown = _show(value)
    if isinstance(value, Mapping):
        refused = (f"{{{key!r}: {_show(part)}}}" for key, part in value.items() if not rule.accepts({key: part}))
        shown = next(refused, shown)
    return Problem(f"{event_type.__name__}.{rule.name}", f"{shown} is not {rule.expected}; write e.g. {rule.example}")


def _show(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{value!r:.80}" if shape is None else f"a {type(value).__name__} of shape {tuple(shape)}"


def _is_one_value(value: Any) -> bool:
    """Return whether a value is a scalar of numpy or a 0-dimensional tensor of any library."""
    return getattr(value, "shape", None) == ()


def _is_number(value: Any) -> bool:
    return type(value) is float or is_number(value) or _is_one_value(value)


def _is_duration(value: Any) -> bool:
    return _is_number(value) and bool(0 <= value < math.inf)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_named_numbers(value: Any) -> bool:
    if not isinstance(value, (dict, Mapping)):  # testing for a dict is faster
        return False
    return _TEXT.issuperset(map(type, value)) and all(map(_is_number, value.values()))


def _is_named_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return _TEXT.issuperset(map(type, value)) and all(isinstance(each, Tensor) for each in value.values())


_TEXT: Final = frozenset({str})
_FLAG: Final = FieldRule(_is_flag, "True or False", "True")
_BY_GROUP: Final = "a mapping from parameter group to number"
_OPTIONAL_DURATION: Final = FieldRule(
    lambda value: value is None or _is_duration(value), "a finite number of seconds >= 0, or None", "0.5"
)
_RULES: Final = {
    "run": FieldRule(lambda value: isinstance(value, Run), "a Run", "Run(run_id='first')"),
    "time_s": FieldRule(
        lambda value: _is_number(value) and bool(-math.inf < value < math.inf),
        "a finite number of seconds since 1970",
        "time.time()",
    ),
    "resumed": _FLAG,
    "samples": FieldRule(_is_count, "a whole number >= 0", "len(batch)"),
    "losses": FieldRule(
        _is_named_numbers,
        "a mapping from name to number, 0-dimensional tensor or Mean",
        "{'total': loss.mean().detach()}",
    ),
    "loss_weights": FieldRule(_is_named_numbers, "a mapping from name of a loss to number", "{'ce': 12}"),
    "accumulated": FieldRule(
        lambda value: type(value) is tuple and all(map(_is_count, value)),
        "a tuple with the samples of each accumulation step",
        "(4, 4)",
    ),
    "accumulation_step": FieldRule(_is_count, "a whole number >= 0 that is less than accumulation_steps", "0"),
    "accumulation_steps": FieldRule(lambda value: _is_count(value) and value > 0, "a whole number >= 1", "1"),
    "lr": FieldRule(_is_named_numbers, _BY_GROUP, "{'default': 0.003}"),
    "weight_decay": FieldRule(_is_named_numbers, _BY_GROUP, "{'default': 0.01}"),
    "grad_norm": FieldRule(
        lambda value: value is None or _is_number(value),
        "a number, a 0-dimensional tensor or None",
        "torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])",
    ),
    "gradients": FieldRule(
        lambda value: value is None or _is_named_tensors(value),
        "a mapping from name of a parameter to tensor, or None",
        "{name: parameter.grad.clone() for name, parameter in model.named_parameters()}",
    ),
    "finite": FieldRule(
        lambda value: value is None or _is_flag(value) or _is_one_value(value),
        "True, False, a 0-dimensional tensor or None",
        "loss.isfinite()",
    ),
    "skipped": _FLAG,
    "duration_s": FieldRule(_is_duration, "a finite number of seconds >= 0", "0.5"),
    **dict.fromkeys(("data_s", "step_s", "forward_s", "backward_s", "optimizer_s"), _OPTIONAL_DURATION),
}
_EVENTS: Final = "noether.core.event"
