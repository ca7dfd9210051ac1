"""Errors of objects built from a configuration, located at the section that describes the object."""

from __future__ import annotations

import inspect
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.config.errors import ConfigError
from noether.config.objects.functions import build_function
from noether.core.errors import NoetherError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.config.errors import SettingPath
    from noether.config.objects.functions import Function
    from noether.config.schema import Config


_TORCH: Final = str(Path(inspect.getfile(torch)).parent)
"""The folder of torch, whose lines are of no use in a message."""


def describe_error(error: BaseException) -> str:
    """Return an error in one line: the message, after the type where the message does not explain itself.

    Example:
        >>> describe_error(KeyError("height")), describe_error(OSError("disk full"))
        ("KeyError: 'height'", 'disk full')
    """
    message = " ".join(str(error).split())
    if message and isinstance(error, (NoetherError, OSError, FloatingPointError)):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def locate_errors(config: Config, path: SettingPath) -> Iterator[None]:
    """Raise errors of the block as a `ConfigError` at the section at `path`.

    Args:
        config: Gives the file and line of each section.
        path: The section that describes the object that the block builds.

    Raises:
        ConfigError: If the block raises an error. Its message says in which line, unless it is one that explains
            itself: a SettingsError, ValueError, TypeError or RuntimeError, which torch raises for impossible sizes.
    """
    try:
        yield
    except SettingsError as error:
        errors = [config.error((*path, *_setting_path(config, each.setting)), each.message) for each in error.problems]
        raise ConfigError([problem for each in errors for problem in each.problems]) from error
    except (NotImplementedError, RecursionError) as error:  # RuntimeErrors whose messages do not say what failed
        raise config.error(path, _with_line(error)) from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise config.error(path, str(error)) from error
    except Exception as error:
        raise config.error(path, _with_line(error)) from error


def _with_line(error: Exception) -> str:
    """Return an error in one line, with the place in the code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if not frame.filename.startswith(_TORCH)), frames[-1])
    return f"{describe_error(error)}, raised at {last.filename}:{last.lineno}"


def build_located_function(config: Config, path: SettingPath, function: Function) -> Any:
    """Return the function or object that a setting names; an error of its constructor names the setting."""
    with locate_errors(config, path):
        return build_function(function)


def _setting_path(config: Config, setting: str) -> SettingPath:
    """Return the dotted name of a setting as a path; the optimizer names its groups, the YAML numbers them."""
    for index, group in enumerate(config.optimizer.groups):
        prefix = f"groups.{group.name}."
        if f"{setting}.".startswith(prefix):
            return ("groups", index, *_setting_path(config, f"{setting}.".removeprefix(prefix).removesuffix(".")))
    return tuple(int(part) if part.isdecimal() else part for part in setting.split(".")) if setting else ()
