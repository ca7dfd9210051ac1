# The public names of the room, listed once: type checkers read this file, and `__init__.py` reads it at run time.

from noether.config.errors import ConfigError as ConfigError
from noether.config.loading import load as load
from noether.config.loading import load_callbacks as load_callbacks
from noether.config.schema import Config as Config
