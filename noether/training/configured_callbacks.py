"""The callbacks that a configuration describes, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from noether.config.errors import ConfigError
from noether.config.objects.functions import build_metric
from noether.config.objects.import_policy import import_path
from noether.config.repeated_callbacks import find_repeated, warn_of_repeated
from noether.core.callback import declaration_of, init_of
from noether.core.callbacks.evaluation import EvaluateCallback
from noether.core.declarations import DeclarationError, check_declarations
from noether.core.metric_keys import keys_overlap
from noether.core.schedules.schedule import INTERVALS
from noether.effects.handled_effects import HANDLED_EFFECTS, find_unhandled
from noether.training.error_locations import locate_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from noether.config.errors import SettingPath
    from noether.config.schema import Config
    from noether.core.callback import Callback
    from noether.core.effect import Effect
    from noether.core.run import Run
    from noether.core.state import TrainState


@final
@dataclass(frozen=True)
class ConfiguredCallback:
    """A callback, and the path of the section that describes it."""

    callback: Callback
    path: SettingPath


def build_callbacks(
    config: Config, state: TrainState, run: Run, before: Sequence[Callback] = ()
) -> list[ConfiguredCallback]:
    """Return the configured callbacks, with those of `trainer.evaluate` before the first callback that reads them.

    Args:
        config: A checked configuration.
        state: The initial state; of its tensors only names, shapes and dtypes matter.
        run: The facts that stay fixed during the run.
        before: Callbacks that run before the configured ones.

    Raises:
        ConfigError: If the callbacks do not fit together, or do not fit the model.
    """
    listed = [kind.build() for kind in config.callbacks]
    repeated = find_repeated(listed, run)
    warn_of_repeated(listed, repeated, config.source)
    configured = [ConfiguredCallback(each, ("callbacks",)) for each in before]
    configured += [ConfiguredCallback(each, ("callbacks", i)) for i, each in enumerate(listed) if i not in repeated]
    for evaluation in _build_evaluations(config):
        readers = (index for index, each in enumerate(configured) if _reads(each.callback, evaluation))
        section = ("trainer", "evaluate", evaluation.dataset_key)
        configured.insert(next(readers, len(configured)), ConfiguredCallback(evaluation, section))
    for each in configured:
        with locate_errors(config, each.path):
            init_of(each.callback, state)  # some callbacks can check their settings only against the model
        key = getattr(each.callback, "dataset_key", None)
        if key is not None and key not in run.data:
            message = f"{key!r} is the stream that the run trains on; evaluate another dataset"
            raise config.error((*each.path, "dataset_key"), message)
    _check_declarations(config, configured, state, run)
    return configured


def find_handled(config: Config) -> frozenset[type[Effect]]:
    """Return the types of effects that have a handler in a run of `config`."""
    return frozenset({*HANDLED_EFFECTS, *map(import_path, config.run.handlers)})


def check_handlers(config: Config, configured: Sequence[ConfiguredCallback]) -> None:
    """Refuse callbacks that declare effects without a handler.

    Raises:
        ConfigError: With each callback, the type of effect and what to write.
    """
    handled = find_handled(config)
    raise_located(
        config,
        [(each.path, text) for each in configured for text in find_unhandled(each.callback, handled.__contains__)],
    )


def raise_located(config: Config, problems: Iterable[tuple[SettingPath, str]]) -> None:
    """Raise one ConfigError with all problems, each at its setting; return if there are none."""
    located = [problem for path, text in problems for problem in config.error(path, text).problems]
    if located:
        raise ConfigError(located)


def produced_keys(configured: Iterable[ConfiguredCallback]) -> dict[str, list[str]]:
    """Return the patterns of metric keys that callbacks declare, by the path of their section, such as `callbacks.0`.

    The summary of a run has them, so that a report of the run needs no code of its callbacks.
    """
    declared = {".".join(map(str, each.path)): declaration_of(each.callback).produces for each in configured}
    return {path: list(patterns) for path, patterns in declared.items() if patterns}


def _build_evaluations(config: Config) -> list[EvaluateCallback]:
    """Return one callback for each dataset of `trainer.evaluate`."""
    evaluate = config.trainer.evaluate
    if evaluate is None:
        return []
    intervals = {name: getattr(evaluate, name) for name in INTERVALS}
    evaluations = []
    for key, measures in evaluate.datasets.items():
        with locate_errors(config, ("trainer", "evaluate", key)):
            functions = tuple(map(build_metric, measures))
            evaluations.append(EvaluateCallback(dataset_key=key, measures=functions, **intervals))
    return evaluations


def _reads(callback: Callback, producer: EvaluateCallback) -> bool:
    """Return whether `callback` reads a metric that `producer` logs."""
    consumed = declaration_of(callback).consumes
    return any(keys_overlap(pattern, key) for key in consumed for pattern in producer.produces)


def _check_declarations(config: Config, configured: Sequence[ConfiguredCallback], state: TrainState, run: Run) -> None:
    """Raise a ConfigError that locates each callback that does not fit the others."""
    try:
        check_declarations([each.callback for each in configured], state, run)
    except DeclarationError as error:
        paths = {id(each.callback): each.path for each in configured}
        errors = [config.error(paths[id(misfit.callback)], misfit.message) for misfit in error.misfits]
        raise ConfigError([problem for each in errors for problem in each.problems]) from error
