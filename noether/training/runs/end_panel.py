"""The panel at the end of a configured run, with the commands that evaluate and continue it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from noether.effects.console.next_commands import suggest_commands
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
        run: The run as it ended.
        experiment: The experiment that was built for it.
        begin: The iteration at which this process began.
        phases: Seconds of this process per phase, as `PhaseTimes.read` returns them.
        summary: The entries of the summary.
        pointers: The tag that each pointer to a checkpoint names.
        allow: Prefixes of modules that the configuration may import; the commands allow them again.
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
    commands = suggest_commands(
        run.directory,
        run.status,
        config=experiment.run.config,
        pointers=pointers,
        at=run.state.iteration,
        allow=allow,
    )
    shown = [each for each in commands.items() if each[0] != "resume"]  # `noether train` prints it below the panel
    return end.describe_end(ended, summary, pointers, shown)
