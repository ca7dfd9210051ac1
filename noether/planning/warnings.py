"""Warnings about a planned run: each names the setting and says what to write instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.callback import declaration_of
from noether.core.callbacks.early_stopping import FixedUpdateEarlyStopping
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.schedules.forecast import Occasions, firings
from noether.core.schedules.schedule import INTERVALS
from noether.core.text import count_of
from noether.planning.planned_callback import plan_firings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.config import Config
    from noether.config.errors import LocatedProblem, SettingPath
    from noether.core.run import Run
    from noether.planning.planned_callback import PlannedCallback
    from noether.planning.requests import SaveRequest
    from noether.training.experiment import Experiment

_CHECKPOINTS: Final = "noether.core.callbacks.CheckpointCallback"


def find_warnings(config: Config, planned: Sequence[PlannedCallback], run: Run) -> Iterator[LocatedProblem]:
    """Yield the likely mistakes in a planned run.

    Args:
        config: The configuration, which knows where settings were written.
        planned: The callbacks.
        run: The run.
    """
    for each in planned:
        if each.save_error is not None:
            why = each.save_error.removeprefix("model_names: ")
            path = each.path if why == each.save_error else (*each.path, "model_names")
            yield warning_at(config, path, f"{each.name} requests a checkpoint that cannot be saved: {why}")
    yield from _setting_warnings(config, planned, run)
    if not any(each.probe_error or each.save_error for each in planned):
        yield from _unsaved_weights_warnings(config, planned, run)


def find_start_warnings(experiment: Experiment) -> list[str]:
    """Return the warnings about a run that need no call of a callback, for the start of the run.

    Args:
        experiment: The run.
    """
    config, run = experiment.config, experiment.run
    planned = [plan_firings(each, run, evaluate_first=config.trainer.evaluate_first) for each in experiment.callbacks]
    return [str(each) for each in _setting_warnings(config, planned, run)]


def _setting_warnings(config: Config, planned: Sequence[PlannedCallback], run: Run) -> Iterator[LocatedProblem]:
    for each in planned:
        if not _interval_is_reached(each, run):
            yield _interval_warning(config, each, run)
    yield from _schedule_warnings(config, run)


def warning_at(config: Config, path: SettingPath, message: str) -> LocatedProblem:
    """Return a warning with the place of its setting."""
    (located,) = config.error(path, message).problems
    return located


def _schedule_warnings(config: Config, run: Run) -> Iterator[LocatedProblem]:
    for section in ("schedule", "weight_decay_schedule"):
        length = getattr(getattr(config.optimizer, section), "length", None)
        if length is not None and length > run.final.update:
            message = f"the run ends after {count_of(run.final.update, 'update')}, before the schedule reaches its end"
            yield warning_at(config, ("optimizer", section, "length"), message)


def _interval_is_reached(planned: PlannedCallback, run: Run) -> bool:
    """Return whether the callback fires where its interval says; with `at_end: true`, whether it fires at all."""
    gate = declaration_of(planned.callback).gate
    if gate is None or gate.at_end:
        return bool(planned.firings.count)
    return bool(firings(Occasions(gate.schedule), run).count)


def _interval_warning(config: Config, planned: PlannedCallback, run: Run) -> LocatedProblem:
    fires = f"{planned.name} {'fires only at the end' if planned.firings.count else 'never fires'}"
    end = f"the run ends at {run.final}"
    name, value = _interval_setting(planned)
    if name is None:
        return warning_at(config, planned.path, f"{fires}: {end}")
    counter = name.removeprefix("every_n_").removeprefix("stop_at_").removesuffix("s")
    largest = getattr(run.final, counter)
    fix = f"write at most {largest}" if largest else "count in updates instead"
    is_listed = planned.path[0] == "callbacks"
    if is_listed and isinstance(planned.callback, PeriodicCallback) and not planned.firings.count:
        fix += ", or at_end: true"
    path = planned.path if is_listed else planned.path[:-1]  # all evaluations share one interval
    return warning_at(config, (*path, name), f"the run does not reach {counter} {value}, so {fires}: {end}; {fix}")


def _interval_setting(planned: PlannedCallback) -> tuple[str | None, int | None]:
    """Return name and value of the setting that says when the callback fires."""
    names: tuple[str, ...] = ()
    if isinstance(planned.callback, FixedUpdateEarlyStopping):
        names = ("stop_at_epoch", "stop_at_update", "stop_at_sample")
    elif isinstance(planned.callback, PeriodicCallback):
        names = tuple(INTERVALS)
    settings = ((name, getattr(planned.callback, name)) for name in names)
    return next(((name, value) for name, value in settings if value is not None), (None, None))


def _unsaved_weights_warnings(config: Config, planned: Sequence[PlannedCallback], run: Run) -> Iterator[LocatedProblem]:
    """Yield a warning if the weights at the end of training are not saved, or not for sure."""
    saving = [(each, request) for each in planned for request in each.requests if request.save.weights]
    if config.trainer.checkpoints.at_end:
        if not saving and config.trainer.checkpoints.every_n_minutes is None:
            message = f"no callback saves checkpoints, so a run that is killed starts again; add {_CHECKPOINTS}"
            yield warning_at(config, ("callbacks",), message)
        return
    certain = [(_last_update(request, run), each) for each, request in saving if request.certain]
    last, saver = max(certain, key=lambda item: item[0], default=(0, None))
    if not saving:
        yield warning_at(config, ("callbacks",), f"no callback saves the weights; add {_CHECKPOINTS}")
    elif saver is None:
        message = f"a metric decides whether weights are saved, so the last ones may be lost; add {_CHECKPOINTS}"
        yield warning_at(config, saving[-1][0].path, message)
    elif last < run.final.update:
        missed = run.final.update - last
        lost = f"the {count_of(missed, 'update')} up to the end at {run.final} {'is' if missed == 1 else 'are'} lost"
        fix = f"write at_end: true, or add {_CHECKPOINTS}"
        yield warning_at(config, saver.path, f"{saver.name} saves last at {run.iteration_after(last)}; {lost}; {fix}")


def _last_update(request: SaveRequest, run: Run) -> int:
    last = firings(request.occasions, run).last
    return 0 if last is None else last.iteration.update
