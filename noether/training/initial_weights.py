"""The first weights of a run from a checkpoint or a file: matches their names, and says which were taken."""

from __future__ import annotations

import json
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.errors import Problem, raise_problems, suggest
from noether.core.tensors.live.buffers import find_none_buffers, find_reshaped_buffers, register_forward_buffers
from noether.core.tensors.live.weights import (
    compare_tensors,
    find_tied_differences,
    join_problems,
    match_names,
)
from noether.core.tensors.module import device_of
from noether.core.tensors.tied_names import EXTRA_STATE, add_tied, extra_state_name, list_modules, names_below
from noether.core.tensors.tree import freeze, move_to_device, pack
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.weight_files import read_weights

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from torch import nn

    from noether.config.init_settings import InitSettings
    from noether.core.state import TrainState

_WRAPPERS: Final = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""First parts of names that DDP, `torch.compile`, FSDP and activation checkpointing add."""
_SHOWN: Final = 6


def load_weights(state: TrainState, settings: InitSettings, model: nn.Module) -> tuple[TrainState, str]:
    """Return `state` with the weights that the settings choose, on its device, and a line that says which these are.

    A tensor of a narrower dtype than the model has is converted; no other conversion is made. Non-persistent buffers
    are as the constructor made them. Buffers that the model makes or reshapes in forward are taken as they were saved.

    Args:
        state: The state of the model, as initialized.
        settings: Where the weights are, and which to take.
        model: The model, in which places of buffers that its forward registers are prepared.

    Raises:
        CheckpointError: If they cannot be read, or do not fit the model; the message lists what to write.
        SettingsError: If a prefix or a pattern matches nothing, with the setting.
    """
    try:
        saved = read_weights(Path(settings.path), settings.key)
    except CheckpointError as error:
        raise CheckpointError(f"{settings.path!r}: {error}") from error
    own = _named_values(state)
    every = add_tied(own, state.tied_names)
    below = _names_below(settings.into, every)
    values = _select_prefix(saved.values, settings.prefix, below)
    outside = len(saved.values) - len(values)
    if settings.into:
        values = {_join(settings.into, name): value for name, value in values.items()}
        own = {name: own[name] for name in names_below(own, [settings.into], state.tied_names).values()}
    omitted = _find_omitted(settings.leave_out, [*every, *values])
    _check_tied(omitted, state.tied_names)
    values = {name: value for name, value in values.items() if name not in {*omitted, *state.non_persistent}}
    reshaped = set() if saved.state is None or settings.into else find_reshaped_buffers(model, saved.state)
    late = {name: values.pop(name) for name in reshaped | find_none_buffers(state.constructed or {}) if name in values}
    expected = {name: value for name, value in own.items() if name not in {*omitted, *late}}
    taken = late | _fit(state, settings, expected, values, saved.source)
    if saved.state is not None and not settings.into:
        register_forward_buffers(model, saved.state.replace(buffers=late))
    key = "" if saved.key is None else f" ({saved.key!r} in it)"
    parts = [
        f"starts from {settings.path}{key}: {len(taken)} tensors taken",
        *_list_names("left as initialized", [name for name in _named_values(state) if name not in taken]),
        *_list_names("left out of the file", [name for name in omitted if name not in every]),
        *([f"{outside} outside of the prefix"] if outside else []),
    ]
    return _replace_weights(state, taken), "; ".join(parts)


def _named_values(state: TrainState) -> dict[str, Any]:
    """Return params, buffers and extra state of a state by name."""
    extra = {extra_state_name(path): value for path, value in state.extra_state.items()}
    return {**state.params, **state.buffers, **extra}


def _join(path: str, name: str) -> str:
    return f"{path.rstrip('.')}.{name}"


def _names_below(path: str, names: Collection[str]) -> Collection[str]:
    """Return the names below a sub-module as they are in it; all names if the path is empty."""
    if not path:
        return names
    start = _join(path, "")
    below = [name.removeprefix(start) for name in names if name.startswith(start)]
    if not below:
        message = f"{path!r} names no sub-module with weights; {list_modules(path, names)}"
        raise_problems([Problem("into", message)])
    return below


def _select_prefix(values: Mapping[str, Any], prefix: str, names: Collection[str]) -> dict[str, Any]:
    """Return the values below a prefix, without it and without what wrappers add to all names."""
    prefix = prefix.rstrip(".") + "." if prefix else ""
    if not any(name.startswith(prefix) for name in values):
        values = _unwrap(values, names)
    below = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    if not below:
        first = sorted({name.partition(".")[0] + "." for name in values})
        hint = f"names in it start with {', '.join(first[:_SHOWN])}{suggest(prefix, first)}"
        raise_problems([Problem("prefix", f"no name in the file starts with {prefix!r}; {hint}")])
    return _unwrap(below, names)


def _unwrap(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return values without a first part of a wrapper that all names have, and no name of the model."""
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in values) and not any(name.startswith(wrapper) for name in names):
            return _unwrap({name.removeprefix(wrapper): value for name, value in values.items()}, names)
    return dict(values)


def _find_omitted(patterns: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return the names that the patterns leave out, each with its pattern."""
    names = list(dict.fromkeys(names))
    omitted: dict[str, str] = {}
    problems = []
    for index, pattern in enumerate(patterns):
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            module = pattern.rstrip(".") + "."
            is_module = any(name.startswith(module) for name in names)
            hint = (
                f"; write {module + '*'!r} for all below it"
                if is_module
                else suggest(pattern.rstrip("*"), names) or f"; there are {', '.join(names[:_SHOWN])}, ..."
            )
            problems.append(
                Problem(f"leave_out.{index}", f"{pattern!r} matches no name in the model or in the file{hint}")
            )
        omitted |= dict.fromkeys(found, pattern)
    raise_problems(problems)
    return omitted


def _check_tied(omitted: Collection[str], tied: Mapping[str, str]) -> None:
    """Refuse to leave out one of several names of a tensor."""
    for other, name in tied.items():
        if (other in omitted) != (name in omitted):
            one, two = (other, name) if other in omitted else (name, other)
            message = f"{one!r} is tied to {two!r} in the model, which is not left out: leave out both or none"
            raise_problems([Problem("leave_out", message)])


def _fit(
    state: TrainState, settings: InitSettings, expected: Mapping[str, Any], values: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Return the values under the names of the state, if they are what the model expects.

    Raises:
        CheckpointError: If they are not, with each difference and what to write.
    """
    found = _match(values, expected, state.tied_names)
    problems = [*find_tied_differences(_tensors(values), state.tied_names)]
    problems += _find_problems(state, expected, found, source)
    if problems:
        raise CheckpointError(
            f"{settings.path!r}: {join_problems(problems)}; {_describe_fix(settings, expected, found)}"
        )
    if expected.keys().isdisjoint(found):
        raise CheckpointError(f"{settings.path!r}: leave_out leaves nothing to take; remove init_from")
    return {name: found[name] for name in expected if name in found}


def _match(values: Mapping[str, Any], expected: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, Any]:
    """Return values under the names of the state, without what wrappers of sub-modules add, in the model's dtypes."""
    known = add_tied(dict(expected), tied)
    inner = {name: value for name, value in values.items() if name in known or not name.startswith(_WRAPPERS)}
    others = {name: value for name, value in values.items() if name not in inner}
    matched = {**match_names(inner, expected, tied), **others}
    return {name: _convert_dtype(value, expected.get(name)) for name, value in matched.items()}


def _tensors(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the values without extra state."""
    return {name: value for name, value in values.items() if not name.endswith(EXTRA_STATE)}


def _find_problems(
    state: TrainState, expected: Mapping[str, Any], found: Mapping[str, Any], source: str
) -> Iterator[str]:
    """Yield each difference between the values that the model needs and those that were found."""
    ours, theirs = _tensors(expected), _tensors(found)
    buffers = state.buffers.keys()
    for kind, names in (("parameter", (ours.keys() | theirs.keys()) - buffers), ("buffer", buffers)):
        needed, given = ({name: each for name, each in tensors.items() if name in names} for tensors in (ours, theirs))
        yield from compare_tensors(kind, needed, given, (), source)
    for name in sorted(found.keys() - theirs.keys() - expected.keys()):
        yield f"extra state {name!r} is not in the model"


def _wrong_names(expected: Mapping[str, Any], found: Mapping[str, Any]) -> set[str]:
    """Return the names that only one of the two has, or both with different shapes; missing extra state is no error."""
    ours, theirs = _tensors(expected), _tensors(found)
    shapes = {name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape}
    return shapes | (ours.keys() - theirs.keys()) | (found.keys() - expected.keys())


def _convert_dtype(value: Any, ours: Any) -> Any:
    """Return a tensor in the dtype of the model, if that has all values of the other."""
    if isinstance(value, torch.Tensor) and isinstance(ours, torch.Tensor) and value.dtype != ours.dtype:
        same_kind = value.is_floating_point() == ours.is_floating_point() and value.is_complex() == ours.is_complex()
        if same_kind and torch.promote_types(value.dtype, ours.dtype) == ours.dtype:
            return value.to(ours.dtype)
    return value


def _make_patterns(wrong: Collection[str], right: Collection[str]) -> list[str]:
    """Return patterns for all of the wrong names and none of the right ones, as short as modules allow.

    Example:
        >>> _make_patterns({"head.0.weight", "head.0.bias", "scale"}, {"body.weight"})
        ['head.*', 'scale']
    """
    patterns: dict[str, None] = {}
    for name in sorted(wrong):
        parts = name.split(".")
        modules = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        free = (module for module in modules if not any(each.startswith(module) for each in right))
        patterns[next((f"{module}*" for module in free), name)] = None
    return list(patterns)


def _describe_fix(settings: InitSettings, expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return what to write in place of the settings."""
    wrong = _wrong_names(expected, found)
    if not wrong:
        return "convert the file, or build the model as it was saved"
    prefix, into, purposes = settings.prefix, settings.into, []
    missing, extra = ({name: values[name] for name in sorted(wrong) if name in values} for values in (expected, found))
    if not prefix and not into:
        if prefix := _find_start(extra, missing):
            purposes.append(f"take the names that start with {prefix!r}")
            found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        elif start := _find_start(missing, extra):
            into = start.rstrip(".")
            purposes.append(f"take them into {into!r}")
            expected = {name: value for name, value in expected.items() if name.startswith(start)}
            found = {start + name: value for name, value in found.items()}
        wrong = _wrong_names(expected, found)
    patterns = _make_patterns(wrong, {*expected, *found} - wrong)
    if patterns:
        purposes.append("start without these" if len(purposes) == 0 else f"start without {', '.join(patterns)}")
    leave_out = [*settings.leave_out, *patterns]
    more = {"key": settings.key, "prefix": prefix, "into": into, "leave_out": leave_out}
    written = [f"path: {settings.path}", *(f"{name}: {json.dumps(value)}" for name, value in more.items() if value)]
    return f"to {' and '.join(purposes)}, write init_from: {{{', '.join(written)}}}"


def _find_start(longer: Mapping[str, Any], shorter: Mapping[str, Any]) -> str:
    """Return what one mapping has before most names of the other, where the values have the same shape; else "".

    Example:
        >>> _find_start({"net.bias": torch.ones(2), "net.scale": torch.ones(1)}, {"bias": torch.zeros(2)})
        'net.'
    """
    starts = Counter(
        long.removesuffix(short)
        for long, value in longer.items()
        for short, other in shorter.items()
        if long.endswith(f".{short}") and getattr(value, "shape", None) == getattr(other, "shape", None)
    )
    (start, count), (_, next_count) = [*starts.most_common(2), ("", 0), ("", 0)][:2]
    return start if count > next_count and 2 * count > len(shorter) else ""


def _replace_weights(state: TrainState, taken: Mapping[str, Any]) -> TrainState:
    """Return the state with the values taken, on the device of the state."""
    device = device_of(state.params.values())
    fields: dict[str, Mapping[str, Any]] = {}
    late = [name for name in taken if name not in state.params and not name.endswith(EXTRA_STATE)]
    for field, names in (("params", state.params), ("buffers", dict.fromkeys([*state.buffers, *late]))):
        ours = getattr(state, field)
        fields[field] = {name: taken[name].to(device, copy=True) if name in taken else ours[name] for name in names}
    extra = {
        path: move_to_device(device, freeze(pack("it", taken[name]))) if name in taken else value
        for path, value in state.extra_state.items()
        for name in [extra_state_name(path)]
    }
    return state.replace(**fields, extra_state=extra)


def _list_names(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]
