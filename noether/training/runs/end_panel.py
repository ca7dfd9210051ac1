"""The panel at the end of a configured run, with the commands that evaluate and continue it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from noether.config.schema import ENDS
from noether.core.callback import listens_to
from noether.core.event import AtEval
from noether.session.panels import end

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.iteration import TrainingIteration
    from noether.effects.console.run_panels import RunPanel
    from noether.training.experiment import Experiment
    from noether.training.runs.execution import TrainedRun


def describe_end(
    run: TrainedRun,
    experiment: Experiment,
    begin: TrainingIteration,
    phases: Mapping[str, Any],
    summary: Mapping[str, Any],
    pointers: Mapping[str, str],
    *,
    allow: Sequence[str] = (),
) -> RunPanel:
    """Return the panel at the end of a process that trained a run.

    Args:
        run: The run.
        experiment: The same run, as it was built.
        begin: Where this process began.
        phases: Its seconds per phase, as `PhaseTimes.read` returns them.
        summary: The entries of the summary.
        pointers: The tag that each pointer to a checkpoint names.
        allow: Prefixes of modules that `kind` may name, for the commands.
    """
    ended = end.RunEnd(
        directory=run.directory,
        status=run.status,
        ending=run.ending,
        begin=begin,
        state=run.state,
        reducer=experiment.reducer,
        phases=phases,
    )
    return end.describe_end(ended, summary, pointers, suggest_commands(run, experiment, pointers, allow))


def suggest_commands(
    run: TrainedRun, experiment: Experiment, pointers: Mapping[str, str], allow: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return the commands that make sense after a run, by what they do."""
    path = str(run.directory)
    allowed = [word for prefix in allow for word in ("--allow", prefix)]
    commands = {"show": ["noether", "show", path], "report": ["noether", "report", path, "--to", "report.html"]}
    evaluated = _evaluate(experiment, pointers)
    if evaluated is not None:
        commands = {"evaluate": ["noether", "eval", path, *evaluated, *allowed], **commands}
    if run.finished and pointers:
        commands["continue"] = ["noether", "train", "--resume", path, *_continue(run, experiment), *allowed]
    return [(name, shlex.join(command)) for name, command in commands.items()]


def _evaluate(experiment: Experiment, pointers: Mapping[str, str]) -> list[str] | None:
    """Return the options that evaluate the best checkpoint on test data; None if nothing can be evaluated."""
    has_test = "test" in experiment.run.data
    if not pointers or not (has_test or listens_to(experiment.reducer, AtEval)):
        return None
    best = next((name for name in pointers if name.startswith("best_model.")), None)
    options = [] if best is None else ["--checkpoint", best]
    return [*options, *(["--data", "test"] if has_test else [])]


def _continue(run: TrainedRun, experiment: Experiment) -> list[str]:
    if run.state.stop is not None and not run.state.iteration.reached(experiment.run.end):
        return ["--continue"]
    trainer = experiment.config.trainer
    name = next(name for name in ENDS if getattr(trainer, name) is not None)
    return ["--set", f"trainer.{name}={2 * getattr(trainer, name)}"]
