"""Effects without a handler that callbacks request but do not declare, found by calling the callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.config.objects.callables import is_from
from noether.core.callback import leaves_of
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

    The calls are those of a plan, with the initial state; a callback that fails without training is not checked.

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
    planned = [plan_callback(each, probe, evaluate_first=config.trainer.evaluate_first) for each in theirs]
    raise_located(config, find_unhandled_requests(config, planned))


def _is_shipped(callback: Callback) -> bool:
    return all(is_from(leaf, "noether") for leaf in leaves_of(callback))
