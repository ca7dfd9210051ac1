"""Which parameters belong to which group of an optimizer, and with which settings."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from noether.config.optimizer_settings import DEFAULT_GROUP
from noether.core.errors import Problem, raise_problems, suggest
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from noether.config.optimizer_settings import ParamGroup


class Layout(NamedTuple):
    """The groups of an optimizer for parameters of given names.

    Args:
        members: Names of the parameters of each group, by group.
        trainable: Names of all trained parameters, in the order of the parameters.
        entries: Settings of each group, by group, as in `param_groups` of a new instance.
        attributes: Attributes of a new instance.
    """

    members: dict[str, tuple[str, ...]]
    trainable: tuple[str, ...]
    entries: dict[str, dict[str, Any]]
    attributes: dict[str, Any]

    def check(
        self, grads: Mapping[str, Tensor], opt_state: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Check that gradients, memory and settings belong to trained parameters.

        Raises:
            ValueError: If one does not, naming the nearest name.
        """
        trainable = set(self.trainable)
        _check_names("gradient", grads.keys() - trainable, self.trainable)
        _check_names("optimizer state", opt_state.get("state", {}).keys() - trainable, self.trainable)
        groups = {group for group, entries in opt_state.get("groups", {}).items() if entries}
        _check_names("optimizer state of the group", groups - self.entries.keys(), self.entries)
        _check_names("settings of the group", settings.keys() - self.entries.keys(), self.entries)
        for group, values in settings.items():
            _check_names(f"setting of {group!r}", values.keys() - self.entries[group].keys(), self.entries[group])


class UpdateCopies(NamedTuple):
    """Copies that one update may write to.

    Args:
        layout: Groups and their members.
        settings: All settings of each group for this update, by group.
        params: The trained parameters by name.
        memory: The optimizer's memory of each parameter, by name.
        grads: Gradients by name; the caller's, not copies.
    """

    layout: Layout
    settings: dict[str, dict[str, Any]]
    params: dict[str, Tensor]
    memory: dict[str, dict[str, Any]]
    grads: dict[str, Tensor]


def assign_groups(
    names: Sequence[str],
    groups: Sequence[ParamGroup],
    frozen: frozenset[str],
    tied: Mapping[str, str] = FrozenDict(),
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Return the names of the parameters of each group that has any, and of all trained parameters.

    Args:
        names: Names of all parameters.
        groups: The first that matches a name wins; the group of all other parameters comes last.
        frozen: Names of parameters that are not trained.
        tied: The one of `names` for each other name of a parameter; patterns match any of its names.

    Raises:
        SettingsError: If a pattern matches no parameter, no parameter is trained, or two groups match different names
            of one parameter.
    """
    others = {name: [name] for name in names}
    for other, name in tied.items():
        if name in others:  # not a buffer
            others[name].append(other)
    raise_problems(list(_find_unmatched([each for every in others.values() for each in every], groups, frozen)))
    group_of = {name: None if name in frozen else _group_of(every, groups) for name, every in others.items()}
    order = [*(group.name for group in groups if not group.frozen), DEFAULT_GROUP]
    members = {group: tuple(name for name in names if group_of[name] == group) for group in order}
    members = {group: params for group, params in members.items() if params}
    if not members:
        raise_problems([Problem("groups", f"all {len(names)} parameters are frozen; leave at least one to train")])
    return members, tuple(name for name in names if group_of[name] is not None)


def _group_of(names: Sequence[str], groups: Sequence[ParamGroup]) -> str | None:
    """Return the name of the group of a parameter with these names, or None if its group is frozen.

    Raises:
        SettingsError: If the first group that matches one of the names, and a later group, match different names.
    """
    matched = [(group, {name for name in names if _matches(group, name)}) for group in groups]
    matched = [(group, found) for group, found in matched if found]
    if not matched:
        return DEFAULT_GROUP
    first, found = matched[0]
    for other, others in matched[1:]:
        if found.isdisjoint(others):
            one, two = min(found), min(others)
            message = (
                f"matches {two!r}, and the group {first.name!r} matches {one!r}, but the model has one parameter under "
                f"both names (tied weights): let only one of the two groups match it"
            )
            raise_problems([Problem(f"groups.{other.name}.match", message)])
    return None if first.frozen else first.name


def _matches(group: ParamGroup, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in group.match)


def _find_unmatched(names: Sequence[str], groups: Sequence[ParamGroup], frozen: frozenset[str]) -> Iterator[Problem]:
    for group in groups:
        for pattern in group.match:
            if not any(fnmatchcase(name, pattern) for name in names):
                yield Problem(f"groups.{group.name}.match", _no_match(pattern, names))
    for name in sorted(frozen - set(names)):
        yield Problem("frozen", _no_match(name, names))


def _no_match(pattern: str, names: Sequence[str]) -> str:
    close = get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f"{pattern!r} matches no parameter" + (f"; the nearest is {close[0]!r}" if close else "")


def _check_names(what: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    for name in sorted(unknown):
        raise ValueError(f"{what} {name!r} does not match any trained parameter{suggest(name, known)}")
