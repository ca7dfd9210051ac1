"""The effects layer: what callbacks ask for, carried out."""

from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.store import CheckpointStore
from noether.effects.disk.lock import LockedError
from noether.effects.interpreter import Interpreter, UnhandledEffectError
from noether.effects.logs.console import Console
from noether.effects.logs.jsonl import LogError
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
