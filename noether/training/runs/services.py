"""What the section `run` adds to a run directory: TensorBoard, Weights & Biases, and handlers of the user's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from noether.config.objects.import_policy import import_path
from noether.effects import open_run
from noether.effects.logs.tensorboard import TensorBoard
from noether.effects.logs.wandb import WeightsAndBiases
from noether.effects.run_logs import LOG_EFFECTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from noether.config import Config
    from noether.effects import Interpreter, RunDirectory
    from noether.effects.interpreter import Handler
    from noether.effects.run_logs import LogService


def check_services(config: Config) -> None:
    """Refuse services that are not installed.

    Raises:
        ConfigError: With the setting, and the command that installs the service.
    """
    services = {"tensorboard": config.run.tensorboard, "wandb": config.run.wandb is not None}
    for name, is_used in services.items():
        spec = find_spec(name)
        # A folder of that name, such as the one that wandb creates, is a package without a file.
        if is_used and (spec is None or spec.origin is None):
            raise config.error(("run", name), f"{name} is not installed; run: pip install 'noether[{name}]'")


def open_directory(path: Path, config: Config, *, with_services: bool = True) -> RunDirectory:
    """Open the directory of a run with the settings and services of its configuration."""
    return open_run(
        path,
        asynchronous=config.trainer.checkpoints.asynchronous,
        borrowed=False,  # the trainer never writes to the tensors of a state, so saves need no copy
        on_error=config.trainer.checkpoints.on_error,
        services=_services(path, config) if with_services else (),
    )


def add_handlers(
    interpreter: Interpreter,
    config: Config,
    guard: Callable[[str, Handler], Handler] = lambda _, handler: handler,
) -> Interpreter:
    """Return the interpreter with the handlers of `run.handlers` added.

    Args:
        interpreter: The interpreter.
        config: The configuration.
        guard: Wraps handlers of logs by name, so that their failures do not stop training.
    """
    for effect_type, path in config.run.handlers.items():
        kind, handler = import_path(effect_type), import_path(path)
        handler = guard(path, handler) if issubclass(kind, LOG_EFFECTS) else handler
        interpreter = interpreter.with_handlers(kind, handler)
    return interpreter


def _services(path: Path, config: Config) -> list[LogService]:
    path = path.resolve()  # as the run itself: the working directory may change
    services: list[LogService] = []
    if config.run.tensorboard:
        services.append(TensorBoard(path / "tensorboard"))
    if config.run.wandb is not None:
        run_id = f"{config.run.name}-{path.name}"
        services.append(WeightsAndBiases(path / "wandb", run_id, **vars(config.run.wandb)))
    return services
