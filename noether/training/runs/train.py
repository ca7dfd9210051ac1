"""Training from a configuration: `train` for Python, `start_run` for callers that have loaded it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from noether.config.loading import from_source
from noether.config.references import escape_references
from noether.config.serialization import dump
from noether.config.source import apply_overrides, read
from noether.config.values import source_from_values
from noether.distributed.ranks import leave_at_end
from noether.distributed.restarts import Restart
from noether.effects.console.console import Console
from noether.effects.disk.files import make_directories, replace_text
from noether.effects.run_files import CONFIG_FILE
from noether.training.experiment import build
from noether.training.runs.agreement import (
    accept_all,
    agree_to_start,
    ask_rank_0,
    describe_ranks,
    join_ranks,
    notify_once,
    open_on_ranks,
)
from noether.training.runs.ending import describe_resume
from noether.training.runs.execution import execute
from noether.training.runs.interruption import Interruption
from noether.training.runs.resumption import resume_run
from noether.training.runs.services import check_services
from noether.training.runs.start_panel import no_warnings, show_building

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.config import Config
    from noether.training.runs.agreement import CheckExperiment
    from noether.training.runs.execution import TrainedRun
    from noether.training.runs.start_panel import FindWarnings

_LOGGER: Final = logging.getLogger(__name__)


def train(  # noqa: PLR0913  # all but one are keywords, as the options of the command line
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    resume: str | Path | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    drop_memory: Sequence[str] = (),
    continue_stopped: bool = False,
    checkpoint: str | None = None,
    into: str | Path | None = None,
    allow: Sequence[str] = (),
) -> TrainedRun:
    """Train a configured run, or resume one; the same as `noether train` on the command line.

    A new run is written to `OUTPUT/NAME/RUN_ID`. Relative paths in the configuration start at the working directory.

    During training the first Ctrl-C (SIGINT), SIGTERM or SIGHUP saves the run after the current update, or before the
    next batch of an evaluation, and `train` returns it with `finished=False`; a second one has its usual effect, such
    as KeyboardInterrupt. Python delivers signals to the main thread only: in another thread none interrupts the run.
    `trainer.max_hours`, counted from this call, saves and returns it in the same way.

    An error of a callback, the model, the data or the disk is raised unchanged, after the last settled state and the
    logs are saved. Its notes say where it was raised, what is saved, where the traceback is, and how to resume.

    Args:
        config: Path of a YAML file, or the same sections as a dict of plain values. Leave it out to resume a run.
        resume: Directory of the run to resume, such as `runs/digits/20260102-030405`, in place of `config`.
        overrides: Settings as after `--set`, such as `trainer.max_epochs=20`.
        output: Folder of all runs, in place of `run.output`; a resumed run moves there.
        drop_memory: With `resume`: names of callback memories to drop although no callback claims them.
        continue_stopped: With `resume`: whether the run continues if a callback stopped it. It does so too if its end
            or the settings of that callback change.
        checkpoint: With `resume`: the checkpoint at which the run resumes, such as `E30`, `best` or `latest`; None for
            the newest. An older one needs `into`.
        into: With `resume`: directory of a new run that starts exactly at the checkpoint, with the log up to it; the
            run in `resume` stays as it is.
        allow: Prefixes of modules that `kind` may name besides noether, torch and modules in the working directory.

    Returns:
        The run: its directory, final state and last metrics.

    Raises:
        TypeError: If neither or both of `config` and `resume` are given.
        ConfigError: If the configuration is wrong, with the path of each wrong setting; this creates no directory.
        TimeLimitError: If `trainer.max_hours` passed before an update was completed.
        LockedError: If another process trains the run.

    Example:
        >>> import noether, tempfile
        >>> digits = {"kind": "noether.examples.digits.Digits", "split": "val"}
        >>> config = {
        ...     "run": {"name": "digits"},
        ...     "model": {"kind": "noether.examples.digits.ConvNet", "width": 2},
        ...     "data": {"train": digits},
        ...     "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
        ...     "trainer": {"max_updates": 2, "effective_batch_size": 8,
        ...                 "loss": "noether.examples.digits.cross_entropy"},
        ...     "callbacks": [],  # left out, or "default": losses, learning rate, progress, and checkpoints
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(config, output=folder)
        directory  ...
        >>> run.ending, run.directory.parent.name
        ('ended at E0_U2_S16', 'digits')
    """
    if (config is None) == (resume is None):
        raise TypeError("give either a config or resume=RUN_DIR")
    if drop_memory and resume is None:
        raise TypeError("drop_memory needs resume=RUN_DIR")
    if continue_stopped and resume is None:
        raise TypeError("continue_stopped needs resume=RUN_DIR")
    if resume is None and (checkpoint is not None or into is not None):
        raise TypeError(f"{'into' if checkpoint is None else 'checkpoint'} needs resume=RUN_DIR")
    if output is not None:
        overrides = [*overrides, f"run.output={json.dumps(escape_references(str(output)))}"]
    interruption, notify = Interruption(), _LOGGER.info
    if resume is not None:
        run = resume_run(
            Path(resume),
            overrides,
            allow,
            drop_memory,
            continue_stopped=continue_stopped,
            checkpoint=checkpoint,
            into=None if into is None else Path(into),
            interruption=interruption,
            notify=notify,
        )
    else:
        source = source_from_values(config) if isinstance(config, Mapping) else read(config or "")
        loaded = from_source(apply_overrides(source, overrides), allow)
        run = start_run(loaded, allow, interruption=interruption, notify=notify)
    if not run.finished and run.rank == 0:
        with suppress(OSError, ValueError):  # the standard output is closed
            print(describe_resume(run.directory, allow))  # noqa: T201  # below the panel
    return run


@leave_at_end()
def start_run(
    config: Config,
    allow: Sequence[str] = (),
    *,
    interruption: Interruption,
    notify: Callable[[str], None],
    find_warnings: FindWarnings = no_warnings,
    check: CheckExperiment = accept_all,
) -> TrainedRun:
    """Train a configuration in a new run directory; a process that torchrun restarts resumes the run that it began.

    Args:
        config: The configuration.
        allow: Further prefixes of modules that `kind` may name.
        interruption: Receives signals during training.
        notify: Receives lines for the user.
        find_warnings: Returns what may be wrong with the plan of the run.
        check: Refuses the run before anything is written, as in `agree_to_start`.

    Raises:
        ConfigError: If the configuration is wrong; this creates no directory.
    """
    ranks = join_ranks(config)
    notify = notify_once(ranks, notify)
    restart = Restart(f"train {dump(config)}")
    interruption.count_from(ask_rank_0(ranks, "time before a restart", restart.elapsed_s))
    if (begun := ask_rank_0(ranks, "run before a restart", restart.find)) is not None:
        return resume_run(Path(begun), (), allow, (), interruption=interruption, notify=notify)
    check_services(config)
    planned = Path(config.run.output) / config.run.name / time.strftime("%Y%m%d-%H%M%S")
    with show_building(Console() if ranks.is_first else None, planned):
        experiment = build(config, ranks=ranks)
    agree_to_start(experiment, check)
    if ranks.are_several:
        notify(f"training{describe_ranks(ranks)}")
    for note in experiment.notes:
        notify(note)
    path = Path(ask_rank_0(ranks, "run directory", lambda: str(_make_run_directory(planned))))
    experiment = replace(experiment, run=experiment.run.replace(run_id=path.name))
    with open_on_ranks(path, config, ranks) as directory:
        if ranks.is_first:
            replace_text(directory.path / CONFIG_FILE, dump(config))
            restart.note(str(directory.path.resolve()))
        state = experiment.state
        return execute(
            experiment,
            directory,
            state,
            resumed=False,
            interruption=interruption,
            notify=notify,
            allow=allow,
            find_warnings=find_warnings,
        )


def _make_run_directory(planned: Path) -> Path:
    """Make the directory of a new run and return it; two runs that start in one second get different ones."""
    make_directories(planned.parent)
    for number in count(1):
        path = planned if number == 1 else planned.with_name(f"{planned.name}-{number}")
        with suppress(FileExistsError):
            path.mkdir()
            break
    return path
