"""Effects: the only code that does I/O. The interpreter runs the effects that callbacks return.

A line here may touch files, streams and devices; it reads the state and never changes it.
"""

from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.store import CheckpointStore
from noether.effects.console.console import Console
from noether.effects.disk.lock import LockedError
from noether.effects.disk.path_checks import RunMovedError
from noether.effects.interpreter import Interpreter, UnhandledEffectError
from noether.effects.logs.resumption import LogError
from noether.effects.run_access import RunClosedError
from noether.effects.run_directory import RunDirectory, open_run

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "Console",
    "Interpreter",
    "LockedError",
    "LogError",
    "RunClosedError",
    "RunDirectory",
    "RunMovedError",
    "UnhandledEffectError",
    "open_run",
]
