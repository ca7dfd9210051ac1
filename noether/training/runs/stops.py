"""Whether a run that a callback stopped continues when it is resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.config.serialization import resolve_config
from noether.core.callback import label_of, leaves_of
from noether.core.callbacks.early_stopping import FixedUpdateEarlyStopping
from noether.core.loop import Move, next_move
from noether.core.reducer import compose
from noether.training.experiment import configured_end

if TYPE_CHECKING:
    from noether.config import Config
    from noether.core.state import TrainState
    from noether.training.experiment import Experiment


def clear_stop(
    state: TrainState, old: Config, experiment: Experiment, *, continue_stopped: bool
) -> tuple[TrainState, list[str]]:
    """Return the state without its stop if the resumed run continues, and lines about it for the user.

    The run continues if its end or the settings of the callback that stopped it changed, or if the user says so. The
    callback keeps its memory. The same state is returned if no callback stopped the run, or if its end is reached.

    Args:
        state: The state that the run resumes from.
        old: The configuration with which the run stopped.
        experiment: The resumed run.
        continue_stopped: Whether the user asks to continue.

    Raises:
        ConfigError: If a `FixedUpdateEarlyStopping` would stop the run again at once.
    """
    changed = _is_changed(state.stopped_by, old, experiment.config)
    same_end = experiment.run.replace(end=configured_end(old)).final == experiment.run.final
    if state.stop is None or (same_end and not changed and not continue_stopped):
        return state, []
    cleared = state.replace(stop=None, stopped_by=None)
    if next_move(cleared, experiment.run) is Move.NOTHING:
        return state, []
    _refuse_reached_stops(cleared, experiment)
    lines = [f"continuing a run that {state.stopped_by or 'a callback'} stopped: {state.stop}"]
    if not changed and state.stopped_by is not None:
        lines.append(f"{state.stopped_by} has the same settings as before, so it may soon stop the run again")
    return cleared, lines


def _is_changed(label: str | None, old: Config, new: Config) -> bool:
    """Return whether the callback with a label changed or is gone; any callback, if the label is unknown."""
    before, after = resolve_config(old)["callbacks"], resolve_config(new)["callbacks"]
    built = [compose(kind.build()) for kind in old.callbacks]
    labels = [set(map(label_of, (*each.members, *leaves_of(each)))) for each in built]
    named = [section for section, names in zip(before, labels, strict=True) if label in names]
    return any(section not in after for section in named or before)


def _refuse_reached_stops(state: TrainState, experiment: Experiment) -> None:
    for configured in experiment.callbacks:
        fixed = [each for each in leaves_of(configured.callback) if isinstance(each, FixedUpdateEarlyStopping)]
        for callback in (each for each in fixed if state.iteration.reached(each.point)):
            setting, _, count = callback.name_parts()[0].partition("=")
            message = f"{count} is reached at {state.iteration} already, so training would stop again at once; "
            path = (*configured.path, setting)
            raise experiment.config.error(path, f"{message}set a later point, or remove this callback")
