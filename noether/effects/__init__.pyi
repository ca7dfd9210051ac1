# The public names of the room, listed once: type checkers read this file, and `__init__.py` reads it at run time.

from noether.effects.checkpoints.listing import CheckpointError as CheckpointError
from noether.effects.checkpoints.store import CheckpointStore as CheckpointStore
from noether.effects.console.console import Console as Console
from noether.effects.disk.lock import LockedError as LockedError
from noether.effects.disk.path_checks import RunMovedError as RunMovedError
from noether.effects.interpreter import Interpreter as Interpreter
from noether.effects.interpreter import UnhandledEffectError as UnhandledEffectError
from noether.effects.logs.resumption import LogError as LogError
from noether.effects.run_access import RunClosedError as RunClosedError
from noether.effects.run_directory import RunDirectory as RunDirectory
from noether.effects.run_directory import open_run as open_run
