"""`noether train`: starts, resumes and tries runs from the command line."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from noether.cli.output import echo
from noether.config import load
from noether.training.runs.interruption import Interruption
from noether.training.runs.resumption import resume_run
from noether.training.runs.smoke import smoke_test
from noether.training.runs.train import start_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from noether.training.runs.execution import TrainedRun


def start(config_path: Path, settings: Sequence[str], allow: Sequence[str]) -> int:
    """Train a configuration file in a new run directory; return the exit code.

    Raises:
        ConfigError: If the configuration is wrong; this creates no directory.
    """
    interruption = Interruption(second_kills=True)
    config = load(config_path, settings, allow)
    return _finish(start_run(config, interruption=interruption, notify=echo), interruption, allow)


def resume(
    run_dir: Path,
    settings: Sequence[str],
    allow: Sequence[str],
    drop_memory: Sequence[str],
    *,
    continue_stopped: bool,
) -> int:
    """Resume a run from its newest checkpoint; return the exit code.

    Raises:
        ConfigError: If `run_dir` is not the directory of a run, or a setting is changed that may not change.
        UnclaimedMemoryError: If the run holds memory that no callback claims and that is not dropped.
    """
    interruption = Interruption(second_kills=True)
    run = resume_run(
        run_dir,
        settings,
        allow,
        drop_memory,
        continue_stopped=continue_stopped,
        interruption=interruption,
        notify=echo,
    )
    return _finish(run, interruption, allow)


def smoke(config_path: Path, settings: Sequence[str], allow: Sequence[str]) -> None:
    """Try a configuration file: one update, one evaluation and one save, in a temporary directory."""
    smoke_test(load(config_path, settings, allow))
    echo(f"{config_path}: one update, one evaluation and one save succeeded")


def _finish(run: TrainedRun, interruption: Interruption, allow: Sequence[str]) -> int:
    if run.finished:
        return 0
    prefixes = [word for prefix in allow for word in ("--allow", prefix)]
    echo(f"resume with: {shlex.join(['noether', 'train', '--resume', str(run.directory), *prefixes])}")
    return interruption.exit_code
