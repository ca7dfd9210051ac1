"""Effects without a handler that callbacks request but do not declare, found by calling the callbacks."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING

from noether.config.objects.callables import is_from
from noether.core.callback import leaves_of
from noether.core.effect import Effect
from noether.core.run import Run
from noether.effects.handled_effects import describe_unhandled
from noether.planning.planned_callback import plan_callback, split_composed
from noether.planning.requests import Probe
from noether.training.configured_callbacks import find_handled, raise_located

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from noether.config import Config
    from noether.config.errors import SettingPath
    from noether.core.callback import Callback
    from noether.planning.planned_callback import PlannedCallback
    from noether.training.experiment import Experiment


def find_unhandled_requests(config: Config, planned: Iterable[PlannedCallback]) -> Iterator[tuple[SettingPath, str]]:
    """Yield the setting and a message for each requested type of effect that has no handler.

    Args:
        config: The configuration, whose handlers count.
        planned: The callbacks, as the plan called them.
    """
    handled = find_handled(config)
    for each in planned:
        missing = [kind for kind in each.effects if kind not in handled]
        yield from ((each.path, text) for text in describe_unhandled(each.name, missing))


def check_requests(experiment: Experiment) -> None:
    """Refuse callbacks of the user's that request effects without a handler, as far as a few calls of them show.

    The calls are those of a plan, with the initial state; a callback that fails without training is not checked. What
    they print goes to the standard error.

    Args:
        experiment: The run.

    Raises:
        ConfigError: With each callback, the type of effect and what to write.
    """
    config, initial = experiment.config, experiment.state
    theirs = [each for each in split_composed(experiment.callbacks) if not _is_shipped(each.callback)]
    if not theirs:
        return
    state = initial.replace(callback_states=experiment.reducer.init(initial))
    probe = Probe(state=state, initial=state, run=experiment.run)
    with redirect_stdout(sys.stderr):
        planned = [plan_callback(each, probe, evaluate_first=config.trainer.evaluate_first) for each in theirs]
    raise_located(config, find_unhandled_requests(config, planned))


def check_start_requests(experiment: Experiment) -> None:
    """Refuse the same at the start of a run, where callbacks are called only if a type of effect lacks a handler.

    Args:
        experiment: The run.

    Raises:
        ConfigError: As `check_requests`.
    """
    alone = Run()  # the calls exchange nothing with other ranks
    run = experiment.run.replace(rank=alone.rank, world_size=alone.world_size, gather=alone.gather)
    if not find_handled(experiment.config).issuperset(_known_effects(Effect)):
        check_requests(replace(experiment, run=run))


def _known_effects(base: type[Effect]) -> Iterator[type[Effect]]:
    """Yield the types of effects of the user's that are defined, which are those that callbacks can request."""
    for kind in base.__subclasses__():
        yield from _known_effects(kind)
        if not is_from(kind, "noether"):
            yield kind


def _is_shipped(callback: Callback) -> bool:
    return all(is_from(leaf, "noether") for leaf in leaves_of(callback))
