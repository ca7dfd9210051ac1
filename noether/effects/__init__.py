"""The effects layer: what callbacks ask for, carried out."""

from noether.effects.checkpoints import CheckpointStore
from noether.effects.console import Console
from noether.effects.interpreter import Interpreter, UnhandledEffectError
from noether.effects.lines import LogError
from noether.effects.listing import CheckpointError
from noether.effects.lock import LockedError
from noether.effects.run_directory import RunDirectory, open_run

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "Console",
    "Interpreter",
    "LockedError",
    "LogError",
    "RunDirectory",
    "UnhandledEffectError",
    "open_run",
]
