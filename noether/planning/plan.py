"""The plan of a run, from its configuration: what fires, what is saved and what is evaluated, before anything is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from noether.core.callback import declaration_of, label_of, listens_to
from noether.core.callbacks.early_stopping import FixedUpdateEarlyStopping, MetricEarlyStopping
from noether.core.callbacks.nan_guard import NanGuardCallback
from noether.core.callbacks.summaries import param_counts
from noether.core.event import EVENTS, AfterTraining, AtEval, BeforeTraining
from noether.core.reducer import Reducer
from noether.core.schedules.forecast import Occasions, firings, occasions_of
from noether.core.schedules.schedule import At
from noether.planning.requests import MISASKED, PROBES, Answers, Stage, UnaskedError
from noether.planning.saves import checkpoints
from noether.planning.shapes import shapes
from noether.planning.warnings import cautions
from noether.training.experiment import Placed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.config import Config
    from noether.config.errors import LocatedProblem, SettingPath
    from noether.core.callback import Callback
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.schedules.forecast import Firings
    from noether.planning.requests import Ask
    from noether.planning.saves import Checkpoints


@final
@dataclass(frozen=True)
class Evaluations:
    """What a callback reads of a dataset.

    Args:
        dataset: Key of the dataset.
        weights: Whose weights it evaluates; None for those in training.
        count: How often.
        samples: How many samples in all.
    """

    dataset: str
    weights: str | None
    count: int
    samples: int


@final
@dataclass(frozen=True, kw_only=True)
class PlannedCallback:
    """What one callback will do, if nothing stops the run early.

    Args:
        callback: The callback.
        path: The section that describes it.
        occasions: When it fires: where its gate opens, and before and after training where it asks for a checkpoint; a
            callback without a gate fires at every event that it listens to, accumulation steps aside.
        firings: How often, from when to when.
        asks: The checkpoints that it asks for.
        checkpoints: What would come of them alone; None if there are none.
        evaluations: What it reads; None if it iterates no dataset.
        stops: Whether it may stop the run before its end, at a point that the plan does not know.
        unasked: Why it could not be asked what it saves; None if it could.
        misasked: Why what it asks for cannot be saved; None if it can.
    """

    callback: Callback
    path: SettingPath
    occasions: Occasions
    firings: Firings
    asks: tuple[Ask, ...]
    checkpoints: Checkpoints | None
    evaluations: Evaluations | None
    stops: bool
    unasked: str | None
    misasked: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return label_of(self.callback)

    @property
    def when(self) -> str | None:
        """Its schedule, such as `E1` or `U100|at_U1`; None if it has none."""
        gate = declaration_of(self.callback).gate
        return None if gate is None else "|".join(map(str, gate.schedule.members))


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do, if nothing stops it early.

    Args:
        config: What it was made from.
        run: The run; its end is where a callback stops it at a fixed point, if one does.
        trainable_params: How many parameters are trained.
        frozen_params: How many are not.
        callbacks: What each callback will do, in their order.
        checkpoints: What comes of all requests for checkpoints together.
        cautions: What will bite, each with the place of the setting.
        notes: What the plan does not know, and why.
    """

    config: Config
    run: Run
    trainable_params: int
    frozen_params: int
    callbacks: tuple[PlannedCallback, ...]
    checkpoints: Checkpoints
    cautions: tuple[LocatedProblem, ...]
    notes: tuple[str, ...]

    @property
    def evaluations(self) -> tuple[Evaluations, ...]:
        """What each callback reads that iterates a dataset."""
        return tuple(each.evaluations for each in self.callbacks if each.evaluations is not None)


def make_plan(config: Config) -> Plan:
    """Return the plan of the run that `config` describes; nothing is trained and nothing written.

    Datasets are made, for their lengths; of the model only shapes. The time that it takes does not depend on how long
    the run is, but for schedules that unite several numbers of samples; see `Schedule.count`.

    Raises:
        ConfigError: If what only the made objects can tell is wrong, as `build` does.
    """
    experiment, updated, notes = shapes(config)
    callbacks = list(_one_by_one(experiment.callbacks))
    run = _ended(experiment.run, [placed.callback for placed in callbacks])
    stage = Stage(state=updated, begun=experiment.state, run=run)
    first = config.trainer.evaluate_first
    planned = tuple(planned_callback(each, stage, evaluate_first=first) for each in callbacks)
    counts = param_counts(experiment.state.params, run.frozen)
    return Plan(
        config=config,
        run=run,
        trainable_params=counts["params/trainable"],
        frozen_params=counts["params/frozen"],
        callbacks=planned,
        checkpoints=checkpoints([ask for each in planned for ask in each.asks], run),
        cautions=tuple(cautions(config, planned, run)),
        notes=(*notes, *_unknown(config, planned)),
    )


def _ended(run: Run, callbacks: Iterable[Callback]) -> Run:
    """Return the run with the earliest of its end and the points at which callbacks stop it."""
    points = [run.end, *(each.point for each in callbacks if isinstance(each, FixedUpdateEarlyStopping))]
    return min((run.replace(end=point) for point in points), key=lambda ended: ended.final.update)


def _one_by_one(callbacks: Iterable[Placed]) -> Iterator[Placed]:
    """Yield every callback by itself; a section may describe several as one."""
    for placed in callbacks:
        members = placed.callback.members if isinstance(placed.callback, Reducer) else (placed.callback,)
        yield from (Placed(member, placed.path) for member in members)


def planned_callback(placed: Placed, stage: Stage, *, evaluate_first: bool = False) -> PlannedCallback:
    """Return what one callback will do.

    Args:
        placed: The callback, and the section that describes it.
        stage: What it is asked with.
        evaluate_first: Whether an evaluation comes before the first update.
    """
    callback, run = placed.callback, stage.run
    listened = tuple(kind for kind in EVENTS if listens_to(callback, kind) and (kind is not AtEval or evaluate_first))
    occasions = _occasions(callback, listened, run)
    answers, unasked, misasked = Answers((), stops=False), None, None
    try:
        occasions, answers = _asked(callback, occasions, listened, stage)
    except UnaskedError as error:
        unasked = str(error)
    except MISASKED as error:
        misasked = str(error)
    return PlannedCallback(
        callback=callback,
        path=placed.path,
        occasions=occasions,
        firings=firings(occasions, run),
        asks=answers.asks,
        checkpoints=checkpoints(answers.asks, run) if answers.asks else None,
        evaluations=_evaluations(callback, occasions, run),
        stops=_stops(callback, answers),
        unasked=unasked,
        misasked=misasked,
    )


def _asked(
    callback: Callback, occasions: Occasions, listened: tuple[type[Event], ...], stage: Stage
) -> tuple[Occasions, Answers]:
    """Return when a callback fires, and what it asks for; where it has a gate it may still save at both ends."""
    answers = stage.asks(callback, occasions)
    beside = [kind for kind in (BeforeTraining, AfterTraining) if kind in listened and kind not in occasions.once]
    more = stage.asks(callback, Occasions(None, tuple(beside)))
    saving = dict.fromkeys(kind for ask in more.asks for kind in ask.occasions.once)
    occasions = replace(occasions, once=(*occasions.once, *saving))
    return occasions, Answers((*answers.asks, *more.asks), stops=answers.stops or more.stops)


def _stops(callback: Callback, answers: Answers) -> bool:
    if isinstance(callback, FixedUpdateEarlyStopping):  # the plan ends there
        return False
    return answers.stops or isinstance(callback, (MetricEarlyStopping, NanGuardCallback))


def _occasions(callback: Callback, listened: tuple[type[Event], ...], run: Run) -> Occasions:
    if isinstance(callback, FixedUpdateEarlyStopping):  # it listens to everything, and acts once
        return Occasions(At(callback.point))
    declared = declaration_of(callback)
    occasions = occasions_of(declared, listened, run)
    if declared.gate is not None and AtEval in listened:
        return replace(occasions, once=(AtEval, *occasions.once))
    return occasions


def _evaluations(callback: Callback, occasions: Occasions, run: Run) -> Evaluations | None:
    key = getattr(callback, "dataset_key", None)
    if key is None or key not in run.data:
        return None
    count = firings(occasions, run).count
    return Evaluations(key, getattr(callback, "weights", None), count, count * len(run.data[key]))


def _unknown(config: Config, planned: Sequence[PlannedCallback]) -> Iterator[str]:
    """Yield what the plan does not know."""
    for each in planned:
        if each.unasked is not None:
            yield f"{each.name} could not be asked what it saves, which is not counted: {each.unasked}"
        if each.stops:
            yield f"{each.name} may stop the run early; the plan then holds up to there"
    often = [each.name for each in planned if each.firings.count > PROBES + 1 and _is_of_a_user(config, each)]
    if often:
        yield (
            f"{', '.join(often)}: asked at the first {PROBES} firings and the last; "
            "a checkpoint that is asked for only in between is not counted"
        )


def _is_of_a_user(config: Config, planned: PlannedCallback) -> bool:
    section, index, *_ = planned.path
    return section == "callbacks" and not config.callbacks[int(index)].path.startswith("noether.")
