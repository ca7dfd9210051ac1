"""Errors and warnings as messages of the command line, with exit codes."""

from __future__ import annotations

import signal
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from noether.cli.output import echo, printable
from noether.cli.ranks import announce
from noether.core.errors import CallNote, NoetherError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONFIG_ERROR = 2


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Show errors that a user can fix as messages with an exit code; other errors are bugs and show tracebacks."""
    from noether.config.errors import ConfigError

    try:
        with _config_warnings_as_lines():
            yield
    except ConfigError as error:
        raise _CommandError(error, _CONFIG_ERROR) from error
    except KeyboardInterrupt:  # before or after training; a run catches the signal
        echo("interrupted", err=True)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        raise  # the reader closed the pipe, as `head` does: click exits without a message
    except (NoetherError, OSError, FloatingPointError) as error:
        raise _CommandError(error, 1) from error
    except Exception as error:
        if CallNote not in map(type, getattr(error, "__notes__", ())):
            raise
        raise _CommandError(error, 1) from error


@contextmanager
def _config_warnings_as_lines() -> Iterator[None]:
    """Show each warning about a configuration once, as a line on the standard error; leave other warnings alone."""
    from noether.config.compatibility import ConfigWarning

    with warnings.catch_warnings():
        warnings.simplefilter("once", ConfigWarning)
        show_other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, ConfigWarning):
                echo(f"Warning: {message}", err=True)
            else:
                show_other(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]  # Python calls this hook with positional arguments
        yield


class _CommandError(NoetherError, click.ClickException):
    """A message on the standard error, and an exit code."""

    def __init__(self, error: Exception, exit_code: int) -> None:
        is_plain = isinstance(error, (NoetherError, OSError, FloatingPointError)) and str(error)
        text = str(error) if is_plain else f"{type(error).__name__}: {error}".removesuffix(": ")
        message = "\n  ".join([text, *getattr(error, "__notes__", ())])
        super().__init__(printable(message))
        self._error = error
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it on the class and reads it on the instance

    def show(self, file: Any = None) -> None:
        """Print the message, unless another of several processes prints it."""
        if (prefix := announce(self._error)) is not None:
            click.echo(f"{prefix}Error: {self.format_message()}", file=file, err=file is None)
