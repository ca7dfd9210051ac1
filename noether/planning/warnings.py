"""What of a plan will bite: each caution says which setting, and what would be right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.callback import declaration_of
from noether.core.callbacks.early_stopping import FixedUpdateEarlyStopping
from noether.core.callbacks.periodic import INTERVALS, PeriodicCallback
from noether.core.schedules.forecast import Occasions, firings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.config import Config
    from noether.config.errors import LocatedProblem, SettingPath
    from noether.core.run import Run
    from noether.planning.plan import PlannedCallback
    from noether.planning.requests import Ask

_CHECKPOINTS: Final = "noether.core.callbacks.CheckpointCallback"


def cautions(config: Config, planned: Sequence[PlannedCallback], run: Run) -> Iterator[LocatedProblem]:
    """Yield what will bite in the run that is planned.

    Args:
        config: Where settings were written.
        planned: The callbacks.
        run: The run.
    """
    for each in planned:
        if each.misasked is not None:
            why = each.misasked.removeprefix("model_names: ")
            path = each.path if why == each.misasked else (*each.path, "model_names")
            yield _located(config, path, f"what {each.name} asks for cannot be saved: {why}")
        if _in_vain(each, run):
            yield _never(config, each, run)
    if not any(each.unasked or each.misasked for each in planned):
        yield from _unsaved(config, planned, run)


def _located(config: Config, path: SettingPath, message: str) -> LocatedProblem:
    (located,) = config.error(path, message).problems
    return located


def _in_vain(planned: PlannedCallback, run: Run) -> bool:
    """Return whether a callback never fires, or is given an interval that never comes and fires at the end only."""
    gate = declaration_of(planned.callback).gate
    if gate is None or gate.at_end:
        return not planned.firings.count
    return not firings(Occasions(gate.schedule), run).count


def _never(config: Config, planned: PlannedCallback, run: Run) -> LocatedProblem:
    end = f"the run ends at {run.final}"
    fires = f"{planned.name} fires at the end only" if planned.firings.count else f"{planned.name} never fires"
    setting, value = _setting(planned)
    if setting is None:
        return _located(config, planned.path, f"{fires}: {end}")
    counter = setting.removeprefix("every_n_").removeprefix("stop_at_").removesuffix("s")
    reached = getattr(run.final, counter)
    right = f"give at most {reached}" if reached else "give it in updates"
    listed = planned.path[0] == "callbacks"
    if listed and isinstance(planned.callback, PeriodicCallback) and not planned.firings.count:
        right += ", or at_end: true"
    path = planned.path if listed else planned.path[:-1]  # evaluations share an interval
    return _located(config, (*path, setting), f"{value} never comes, so {fires}: {end}; {right}")


def _setting(planned: PlannedCallback) -> tuple[str | None, int | None]:
    """Return name and value of the setting that says when a callback fires."""
    names: tuple[str, ...] = ()
    if isinstance(planned.callback, FixedUpdateEarlyStopping):
        names = ("stop_at_epoch", "stop_at_update", "stop_at_sample")
    elif isinstance(planned.callback, PeriodicCallback):
        names = tuple(INTERVALS)
    given = ((name, getattr(planned.callback, name)) for name in names)
    return next(((name, value) for name, value in given if value is not None), (None, None))


def _unsaved(config: Config, planned: Sequence[PlannedCallback], run: Run) -> Iterator[LocatedProblem]:
    """Yield what leaves the weights at the end of training unsaved."""
    weighing = [(each, ask) for each in planned for ask in each.asks if ask.save.weights]
    certain = [(_last_update(ask, run), each) for each, ask in weighing if ask.certain]
    last, saver = max(certain, key=lambda item: item[0], default=(0, None))
    if not weighing:
        message = f"nobody saves the weights, so that nothing is left of the run; add {_CHECKPOINTS}"
        yield _located(config, ("callbacks",), message)
    elif saver is None:
        message = f"what is saved is decided in training, so that its end may be lost; add {_CHECKPOINTS}"
        yield _located(config, weighing[-1][0].path, message)
    elif last < run.final.update:
        lost = f"the {run.final.update - last} updates after it are not saved: the run ends at {run.final}"
        right = f"set at_end: true, or add {_CHECKPOINTS}"
        message = f"{saver.name} saves for the last time at {run.iteration_after(last)}, and {lost}; {right}"
        yield _located(config, saver.path, message)


def _last_update(ask: Ask, run: Run) -> int:
    last = firings(ask.occasions, run).last
    return 0 if last is None else last.iteration.update
