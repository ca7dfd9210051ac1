"""The command line as one of several processes: an error is printed once, and the launcher gets the first one."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from noether.cli.output import discard_unwritten, print_line
from noether.distributed.launch import launched_rank, launched_world_size, write_error_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


def announce(error: BaseException) -> str | None:
    """Report an error to the other ranks and to the launcher.

    Returns:
        The text that this process prints before the error, such as `rank 1: `; None if another rank prints an error.
    """
    if launched_world_size() == 1:
        return ""
    text, time_s, prefix = f"{type(error).__name__}: {error}", time.time(), None if launched_rank() else ""
    from noether.distributed.ranks import current_ranks
    from noether.distributed.startup import startup_failures

    ranks = current_ranks()
    failures = ranks.failures if ranks.are_several else startup_failures()
    first = failures.report(error, is_of_all=isinstance(error, click.UsageError))
    if first is not None and first.reporter != launched_rank():
        # torchrun takes the earliest second as the root cause, and this rank ended in the same one.
        text, time_s, prefix = str(first), first.time_s + 1, None
    elif first is not None:
        text, time_s, prefix = str(first), first.time_s, _prefix(error, launched_rank())
    write_error_file(text, time_s)
    return prefix


@contextmanager
def announce_exit() -> Iterator[None]:
    """Print a `sys.exit` of the user's code in the block, which ends all of several ranks."""
    try:
        yield
    except SystemExit as error:
        if launched_world_size() > 1 and (prefix := announce(error)) is not None:
            print_line(f"{prefix}Error: SystemExit: {error.code}", err=True)
        raise


def _prefix(error: BaseException, rank: int) -> str:
    """Return the rank of an error as `rank 1: `; empty if the error names its rank, or if all ranks raise it alike."""
    from noether.config.errors import ConfigError
    from noether.distributed.failures import RankError
    from noether.distributed.launch import LaunchError

    is_of_all = rank == 0 and isinstance(error, ConfigError | click.UsageError)
    return "" if is_of_all or isinstance(error, RankError | LaunchError) else f"rank {rank}: "


class Commands(click.Group):
    """Commands that several processes may run at once."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command as click does; as one of several processes, print its errors once and then end at once."""
        run: Callable[..., Any] = super().main
        if not standalone_mode or launched_world_size() == 1:
            return run(*args, standalone_mode=standalone_mode, **extra)
        signal.signal(signal.SIGTERM, _end_unless_failed)
        if launched_rank():
            logging.getLogger("noether").setLevel(logging.ERROR)  # rank 0 logs the same
            warnings.simplefilter("ignore")
        try:
            code = run(*args, standalone_mode=False, **extra)
        except click.UsageError as error:  # of all ranks alike
            if (prefix := announce(error)) is not None:
                click.echo(prefix, nl=False, err=True)
                error.show()
            code = error.exit_code
        except click.ClickException as error:  # which reports itself
            error.show()
            code = error.exit_code
        except click.Abort:
            code = 1
        except SystemExit as end:
            code = end.code
        except Exception as error:  # noqa: BLE001  # an error of noether, whose traceback is shown
            if (prefix := announce(error)) is not None:
                print_line(f"{prefix}{''.join(traceback.format_exception(error))}", err=True)
            code = 1
        return end_process(code)


def _end_unless_failed(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # signature of signal handlers
    """End at a signal, but not if a rank has failed: then torchrun ends all, and rank 0 may still save."""
    if not _has_failed():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _has_failed() -> bool:
    """Return whether a rank has reported a failure, as far as this process can have met it."""
    joined, startup = (sys.modules.get(f"noether.distributed.{name}") for name in ("ranks", "startup"))
    return (joined is not None and joined.current_ranks().failures.first() is not None) or (
        startup is not None and startup.find_startup_failure() is not None
    )


def end_process(code: Any) -> NoReturn:
    """End this process; after a failure of a rank, without waiting for collectives that are under way."""
    if _has_failed():
        discard_unwritten()
        logging.shutdown()
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)
