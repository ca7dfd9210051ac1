"""A smoke test of a configuration: everything once, in a temporary directory."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterTraining, AtEval
from noether.core.iteration import TrainingIteration
from noether.core.loop import dispatch
from noether.session.processes import refuse_several_processes
from noether.training.experiment import build
from noether.training.runs.execution import make_trainer
from noether.training.runs.services import add_handlers, open_directory

if TYPE_CHECKING:
    from noether.config import Config


def smoke_test(config: Config) -> None:
    """Make one update, one evaluation and one save that is loaded again; nothing stays on the disk."""
    refuse_several_processes()
    experiment = build(config, run_id="smoke")
    run = experiment.run.replace(end=TrainingIteration(update=1))
    with (
        closing(experiment),
        tempfile.TemporaryDirectory() as folder,
        open_directory(Path(folder) / "smoke", config, with_services=False) as directory,
    ):
        interpreter = add_handlers(directory.interpreter, config, directory.guard_log)
        state = make_trainer(experiment, interpreter, lambda: False, run)(experiment.state)
        state = dispatch(state, AtEval(run=run), experiment.reducer, interpreter)
        interpreter([SaveCheckpoint(tag="smoke")], state, AfterTraining(run=run))
        directory.wait()
        experiment.to_device(directory.checkpoints.load(directory.checkpoints.find("smoke")))
