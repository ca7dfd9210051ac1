"""`noether train`: starts, resumes and tries runs from the command line."""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Final

from rich.console import Console

from noether.cli.output import echo, print_line
from noether.cli.ranks import announce, announce_exit
from noether.config import load
from noether.distributed.failures import RankError
from noether.distributed.launch import launched_rank
from noether.effects.console.next_commands import suggest_commands, wrap_command
from noether.effects.console.tables import wrap_words
from noether.planning.unhandled_effects import check_start_requests
from noether.planning.warnings import find_start_warnings
from noether.training.error_locations import describe_error
from noether.training.runs.ending import failure_of
from noether.training.runs.interruption import Interruption
from noether.training.runs.resumption import resume_run
from noether.training.runs.smoke import smoke_test
from noether.training.runs.train import start_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from noether.training.runs.ending import Failure
    from noether.training.runs.execution import TrainedRun

_RESUME: Final = "resume with: "


def start(config_path: Path, settings: Sequence[str], allow: Sequence[str]) -> int:
    """Train a configuration file in a new run directory; return the exit code.

    Raises:
        ConfigError: If the configuration is wrong; this creates no directory.
    """
    config = load(config_path, settings, allow)
    training = partial(start_run, config, allow, find_warnings=find_start_warnings, check=check_start_requests)
    return _run(training, allow)


def resume(
    run_dir: Path,
    settings: Sequence[str],
    allow: Sequence[str],
    drop_memory: Sequence[str],
    *,
    continue_stopped: bool,
    checkpoint: str | None = None,
    into: Path | None = None,
) -> int:
    """Resume a run from its newest checkpoint, or start a new one at a checkpoint of it; return the exit code.

    Raises:
        ConfigError: If `run_dir` is not the directory of a run, or a setting is changed that may not change.
        UnclaimedMemoryError: If the run holds memory that no callback claims and that is not dropped.
    """
    continuing = partial(
        resume_run,
        run_dir,
        settings,
        allow,
        drop_memory,
        continue_stopped=continue_stopped,
        checkpoint=checkpoint,
        into=into,
        find_warnings=find_start_warnings,
        check=check_start_requests,
    )
    return _run(continuing, allow)


def smoke(config_path: Path, settings: Sequence[str], allow: Sequence[str]) -> None:
    """Try a configuration file: one update, one evaluation and one save, in a temporary directory."""
    config = load(config_path, settings, allow)
    with announce_exit():
        smoke_test(config, check_start_requests)
    echo(f"{config_path}: one update, one evaluation and one save succeeded")


def _run(train: Callable[..., TrainedRun], allow: Sequence[str]) -> int:
    """Call `train` and say how the run ended and how it can be resumed; return the exit code."""
    interruption = Interruption(second_kills=True)
    try:
        run = train(interruption=interruption, notify=print_line)
    except BaseException as error:
        failure = failure_of(error)
        if failure is None:
            raise
        _print_failure(error, failure, allow)
        if isinstance(error, KeyboardInterrupt):  # raised by the user's code
            return 128 + signal.SIGINT
        return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if run.finished:
        return 0
    if run.rank == 0:
        if run.world_size > 1:
            print_line("under torchrun, any number of ranks can resume it")
        _print_resume(run.directory, allow)
    return interruption.exit_code


def _print_failure(error: BaseException, failure: Failure, allow: Sequence[str]) -> None:
    """Print what was raised and where, what is saved, where the traceback is, and how to resume.

    Of several ranks, the first that failed prints what it raised, and rank 0 what it saved.
    """
    prefix = announce(error)
    lines = [] if prefix is None else [f"{prefix}Error: {', '.join([describe_error(error), *failure.places])}"]
    lines += failure.outcome
    console = Console(stderr=True)
    for line in lines:
        print_line("\n".join(wrap_words(line, console.width)) if console.is_terminal else line, err=True)
    if failure.directory.is_dir() and _prints_resume(error, is_shown=prefix is not None):
        _print_resume(failure.directory, allow, err=True)


def _prints_resume(error: BaseException, *, is_shown: bool) -> bool:
    """Return whether this process prints how to resume: rank 0, or the rank that shows that rank 0 hangs or ended."""
    if not isinstance(error, RankError):
        return launched_rank() == 0
    failure = error.failure
    return is_shown or (launched_rank() == 0 and failure.rank == failure.reporter)


def _print_resume(directory: Path, allow: Sequence[str], *, err: bool = False) -> None:
    """Print the command that resumes a run; on a terminal in lines that a shell makes one command again."""
    command, console = suggest_commands(directory, "interrupted", config={}, allow=allow)["resume"], Console(stderr=err)
    lines = wrap_command(command, console.width - len(_RESUME)) if console.is_terminal else [command]
    print_line(_RESUME + "\n".join(lines), err=err)
