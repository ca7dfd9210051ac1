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
from noether.distributed.ranks import leave_at_end
from noether.training.experiment import build
from noether.training.runs.agreement import accept_all, agree_to_start, ask_rank_0, join_ranks, open_on_ranks
from noether.training.runs.execution import make_trainer
from noether.training.runs.services import add_handlers

if TYPE_CHECKING:
    from noether.config import Config
    from noether.training.runs.agreement import CheckExperiment


@leave_at_end()
def smoke_test(config: Config, check: CheckExperiment = accept_all) -> None:
    """Make one update, one evaluation and one save that is loaded again; nothing stays on the disk.

    Of several ranks, rank 0 has the folder and loads from it.

    Args:
        config: The configuration.
        check: Refuses the run before anything is written, as in `agree_to_start`.
    """
    ranks = join_ranks(config)
    experiment = build(config, run_id="smoke", ranks=ranks)
    agree_to_start(experiment, check)
    run = experiment.run.replace(end=TrainingIteration(update=1))
    with closing(experiment), tempfile.TemporaryDirectory() as own:
        folder = Path(ask_rank_0(ranks, "folder of the smoke test", lambda: own))
        with open_on_ranks(folder / "smoke", config, ranks, with_services=False) as directory:
            interpreter = add_handlers(
                directory.interpreter, config, directory.path.resolve, directory.services, directory.guard_log
            )
            state = make_trainer(experiment, interpreter, lambda: False, run)(experiment.state)
            state = dispatch(state, AtEval(run=run), experiment.reducer, interpreter)
            interpreter([SaveCheckpoint(tag="smoke")], state, AfterTraining(run=run))
            directory.wait()
            if ranks.is_first:
                experiment.to_device(directory.checkpoints.load(directory.checkpoints.find("smoke")))
