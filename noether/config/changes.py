"""Which settings differ between two configurations, and which of them a resumed run may change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from noether.config.errors import ConfigError, LocatedProblem
from noether.config.serialization import resolve_config
from noether.config.trainer_settings import ENDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.config.schema import Config

MAY_CHANGE = (
    "run.output",
    "run.handlers",
    "run.tensorboard",
    "run.wandb",
    *(f"trainer.{end}" for end in ENDS),
    "trainer.max_hours",
    "trainer.device",
    "trainer.parallel",
    "trainer.rank_timeout_s",
    "trainer.num_workers",
    "trainer.evaluate",
    "trainer.checkpoints",
    "trainer.record",
    "optimizer.schedule.length",
    "optimizer.weight_decay_schedule.length",
    "callbacks",
)
"""Settings that may differ in a resumed run; the name of a section covers every setting in it."""


def changed_settings(old: Config, new: Config) -> tuple[str, ...]:
    """Return the dotted names of all settings that differ, in the order of the sections; a list is one setting."""
    return tuple(".".join(path) for path, _, _ in find_differences(resolve_config(old), resolve_config(new)))


def refuse_changes(old: Config, new: Config) -> None:
    """Raise if a run of `old` cannot resume as `new`, because a setting outside of `MAY_CHANGE` differs.

    Raises:
        ConfigError: With each such setting, at the place where its new value was written.
    """
    problems = [
        LocatedProblem(new.place(path), path, f"{_quote(before)} cannot become {_quote(after)} in a resumed run")
        for path, before, after in find_differences(resolve_config(old), resolve_config(new))
        if not any(f"{'.'.join(path)}.".startswith(f"{name}.") for name in MAY_CHANGE)
    ]
    if problems:
        raise ConfigError(problems)


def _quote(value: object) -> str:
    return "nothing" if value is None else repr(value)


def find_differences(
    old: object, new: object, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the path, the old and the new value of each setting that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from find_differences(old.get(key), new.get(key), (*path, key))
    elif repr(old) != repr(new):  # by their text, so that NaN equals itself and True differs from 1
        yield path, old, new
