"""What the section `run` adds to a run directory: TensorBoard, Weights & Biases, and handlers of the user's."""

from __future__ import annotations

import functools
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from noether.config.objects.functions import build_function
from noether.config.objects.import_policy import import_path
from noether.core.callables import takes_by_name
from noether.core.tensors.stored_weights import name_in_tags
from noether.effects import open_run
from noether.effects.checkpoints.joint_saves import ALONE
from noether.effects.disk.files import make_directories
from noether.effects.logs.tensorboard import TensorBoard
from noether.effects.logs.wandb import WeightsAndBiases
from noether.effects.run_logs import LOG_EFFECTS
from noether.training.error_locations import locate_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from noether.config import Config
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects import Interpreter, RunDirectory
    from noether.effects.checkpoints.joint_saves import SavingRanks
    from noether.effects.interpreter import Handler
    from noether.effects.run_logs import LogService


def check_services(config: Config) -> None:
    """Refuse services that are not installed.

    Raises:
        ConfigError: With the setting, and the command that installs the service.
    """
    services = {"tensorboard": config.run.tensorboard, "wandb": config.run.wandb is not None}
    for name, is_used in services.items():
        if is_used and not _is_installed(name):
            raise config.error(("run", name), f"{name} is not installed; run: pip install 'noether[{name}]'")


def _is_installed(name: str) -> bool:
    spec = find_spec(name)
    # A folder of that name, such as the one that wandb creates, is a package without a file.
    return spec is not None and spec.origin is not None


def open_directory(
    path: Path, config: Config, *, with_services: bool = True, ranks: SavingRanks = ALONE
) -> RunDirectory:
    """Open the directory of a run with the settings and services of its configuration; rank 0 logs and saves there."""
    with_services = with_services and ranks.rank == 0
    return open_run(
        path,
        ranks=ranks,
        asynchronous=config.trainer.checkpoints.asynchronous,
        borrowed=False,  # the trainer never writes to the tensors of a state, so saves need no copy
        on_error=config.trainer.checkpoints.on_error,
        services=_services(path, config) if with_services else (),
    )


def add_handlers(
    interpreter: Interpreter,
    config: Config,
    find_folder: Callable[[], Path],
    services: Mapping[str, LogService],
    guard: Callable[[str, Handler], Handler] = lambda _, handler: handler,
) -> Interpreter:
    """Return the interpreter with the handlers of `run.handlers` added.

    A handler with a keyword parameter `directory` or `services` gets the folder, or the services.

    Args:
        interpreter: The interpreter.
        config: The configuration.
        find_folder: Returns the folder in which handlers may write, when one is called that takes it.
        services: The log services in use, by name.
        guard: Wraps handlers of logs by name, so that their failures do not stop training.
    """
    for effect_type, entry in config.run.handlers.items():
        with locate_errors(config, ("run", "handlers", effect_type)):
            kind, handler = import_path(effect_type), build_function(entry)
        handler = _pass_by_name(handler, {"directory": find_folder, "services": lambda: services})
        handler = guard(str(getattr(entry, "path", entry)), handler) if issubclass(kind, LOG_EFFECTS) else handler
        interpreter = interpreter.with_handlers(kind, handler)
    return interpreter


def _pass_by_name(handler: Handler, parts: Mapping[str, Callable[[], Any]]) -> Handler:
    """Return the handler, called with those parts that it has a keyword parameter for."""
    taken = {name: read for name, read in parts.items() if takes_by_name(handler, name)}
    if not taken:
        return handler

    @functools.wraps(handler)  # it may be marked as one that all ranks call
    def handle(effect: Any, state: TrainState, event: Event) -> None:
        handler(effect, state, event, **{name: read() for name, read in taken.items()})

    return handle


def _services(path: Path, config: Config) -> list[LogService]:
    path = path.resolve()  # as the run itself: the working directory may change
    services: list[LogService] = []
    if config.run.tensorboard:
        services.append(TensorBoard(path / "tensorboard"))
    if config.run.wandb is not None:
        run_id = f"{config.run.name}-{path.name}"
        services.append(WeightsAndBiases(path / "wandb", run_id, **vars(config.run.wandb)))
    return services


def evaluation_services(path: Path, config: Config, weights: str | None) -> tuple[list[LogService], list[str]]:
    """Return the services that receive an evaluation, and the names of those that are not installed.

    In each service evaluations are a separate run beside that of training, whose charts stay as they are: `eval`, or
    `eval.ema=0.999` for stored weights. The values have the keys of training, at the update of the checkpoint.

    Args:
        path: The run directory.
        config: The configuration of the run.
        weights: Name of the stored weights that are evaluated; None for those in training.
    """
    path, name = path.resolve(), "eval" if weights is None else f"eval.{name_in_tags(weights)}"
    services: list[LogService] = []
    missing: list[str] = []
    if config.run.tensorboard:
        if _is_installed("tensorboard"):
            _make_parent(path / "tensorboard")
            services.append(TensorBoard(path / "tensorboard" / name))
        else:
            missing.append("tensorboard")
    if config.run.wandb is not None:
        if _is_installed("wandb"):
            run_id, settings = f"{config.run.name}-{path.name}", vars(config.run.wandb)
            _make_parent(path / "wandb")
            evaluation = {"run_id": f"{run_id}-{name}", "group": run_id, "job_type": "eval"}
            services.append(WeightsAndBiases(path / "wandb" / name, **evaluation, **settings))
        else:
            missing.append("wandb")
    return services, missing


def _make_parent(path: Path) -> None:
    with suppress(OSError):  # the service reports why it cannot write there
        make_directories(path)
