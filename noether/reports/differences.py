"""The differences between runs: settings of their configurations, and the code and machine that trained them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.reports.setting_paths import comparable_settings, walk_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.reports.reading.run_record import RunRecord

_COMPARED: Final = ("git", "python", "platform", "host", "devices", "packages", "seed", "samples")
_NOT_COMPARED: Final = ("git.untracked", "git.problem")


def find_run_differences(runs: Sequence[RunRecord]) -> dict[str, tuple[Any, ...]]:
    """Return the settings and facts in which runs differ, each with its value in every run; None if a run lacks it.

    A setting is named by its dotted path as in `--set`; a path in a callback begins with the name of the callback. A
    fact about the process that trained a run last is named by its path in the entry `processes`, such as `git.commit`.

    Args:
        runs: The runs, at least two.
    """
    described = [{**comparable_settings(run.config), **_describe_process(run)} for run in runs]
    names = dict.fromkeys(name for each in described for name in each)
    values = {name: tuple(each.get(name) for each in described) for name in names}
    return {name: each for name, each in values.items() if len(set(map(repr, each))) > 1}


def merge_missing_callbacks(found: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Return differences with one entry for a callback that some runs do not have, in place of all its settings.

    Args:
        found: What `find_run_differences` returns.

    Example:
        >>> found = {"callbacks[my.Stop].kind": ("my.Stop", None), "callbacks[my.Stop].after": (3, None)}
        >>> merge_missing_callbacks({"run.seed": (0, 1), **found})
        {'run.seed': (0, 1), 'callbacks[my.Stop]': ('present', None)}
    """
    merged: dict[str, tuple[Any, ...]] = {}
    for name, values in found.items():
        callback, is_callback, setting = name.partition("].")
        if not (is_callback and f"{callback}].kind" in found):
            merged[name] = values
        elif setting == "kind":  # it differs only where it is missing: the name of a callback contains it
            merged[f"{callback}]"] = tuple(None if value is None else "present" for value in values)
        elif len({repr(value) for value in values if value is not None}) > 1:
            merged[name] = values
    return merged


def _describe_process(run: RunRecord) -> Mapping[str, Any]:
    *_, last = [{}, *run.provenance.values()]
    facts = dict(walk_settings({name: last[name] for name in _COMPARED if last.get(name) is not None}))
    return {name: value for name, value in facts.items() if not name.startswith(_NOT_COMPARED)}
