"""`noether`: plan, train, resume, evaluate and check, from a YAML file."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SET = click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Override a setting, e.g. trainer.max_epochs=20."
)
_ALLOW = click.option(
    "--allow", metavar="PREFIX", multiple=True, help="Let `kind` name modules that begin with PREFIX."
)
_CONFIG_ERROR = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="noether")
def main() -> None:
    """Train PyTorch models with callbacks that are pure functions."""


@main.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--resume", metavar="RUN_DIR", type=click.Path(path_type=Path), help="Go on with the run in RUN_DIR.")
@click.option("--smoke", is_flag=True, help="One update, one evaluation, one save, in a temporary directory.")
@click.option("--drop-memory", metavar="NAME", multiple=True, help="With --resume: forget the memory NAME.")
@_SET
@_ALLOW
def train(  # one parameter per option
    config: Path | None,
    resume: Path | None,
    smoke: bool,  # noqa: FBT001  # click passes it by name
    drop_memory: tuple[str, ...],
    settings: tuple[str, ...],
    allow: tuple[str, ...],
) -> None:
    """Train what CONFIG describes, or go on with a run."""
    if (config is None) == (resume is None):
        raise click.UsageError("give either CONFIG or --resume RUN_DIR")
    if resume is not None and smoke:
        raise click.UsageError("--smoke tries a CONFIG; it does not go with --resume")
    if drop_memory and resume is None:
        raise click.UsageError("--drop-memory goes with --resume")
    from noether.cli import train as running

    with _refusals():
        if config is not None and smoke:
            running.smoke(config, settings, allow)
        elif config is not None:
            _leave(running.start(config, settings, allow))
        elif resume is not None:
            _leave(running.go_on(resume, settings, allow, drop_memory))


@main.command("eval")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="latest", show_default=True, metavar="TAG", help="A tag, or a pointer's name.")
@click.option("--weights", metavar="NAME", help="Whose weights, e.g. ema=0.999; by default those in training.")
@_SET
@_ALLOW
def evaluate(
    run_dir: Path, checkpoint: str, weights: str | None, settings: tuple[str, ...], allow: tuple[str, ...]
) -> None:
    """Evaluate a checkpoint of the run in RUN_DIR with the data iterators among its callbacks."""
    from noether.cli import evaluate as evaluating

    with _refusals():
        evaluating.evaluate(run_dir, checkpoint, weights, settings, allow)


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--callbacks",
    metavar="OTHER.yaml",
    type=click.Path(path_type=Path),
    help="Others than the run's own; those that measure what they consume are kept.",
)
@click.option("--at", metavar="U1234", help="Show state and effects at this point, on one counter: E12, U1234 or S800.")
@click.option("--log", is_flag=True, help="Show what the log would have said, too.")
@_ALLOW
def replay(
    run_dir: Path,
    callbacks: Path | None,
    at: str | None,
    log: bool,  # noqa: FBT001  # click passes it by name
    allow: tuple[str, ...],
) -> None:
    """Tell callbacks the events of the run in RUN_DIR again, and show what they decide. It needs `trainer.record`."""
    from noether.cli import replay as replaying

    with _refusals():
        replaying.show(run_dir, callbacks, at, allow, log=log)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_SET
@_ALLOW
def validate(config: Path, settings: tuple[str, ...], allow: tuple[str, ...]) -> None:
    """Check CONFIG: every setting, the datasets, the model, and that the callbacks fit together."""
    from noether.config import load

    with _refusals():
        loaded = load(config, settings, allow)
        # These bring torch along; what was refused above did not have to wait for it.
        from noether.cli.train import check_services
        from noether.training.experiment import build

        check_services(loaded)
        experiment = build(loaded)
        count = len(experiment.reducer.members)
        click.echo(f"{config} is valid: {count} callbacks, {experiment.run.final.update} updates")


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--at", metavar="POINT", help="List what fires at one point, e.g. U1000, E2 or S512.")
@click.option("--between", nargs=2, metavar="START END", help="List what fires after one point and up to another.")
@click.option("--png", metavar="FILE", type=click.Path(path_type=Path), help="Draw the timeline into FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of text.")
@_SET
@_ALLOW
def plan(  # one parameter per option
    config: Path,
    at: str | None,
    between: tuple[str, str] | None,
    png: Path | None,
    as_json: bool,  # noqa: FBT001  # click passes it by name
    settings: tuple[str, ...],
    allow: tuple[str, ...],
) -> None:
    """Say what a run of CONFIG will do: what fires, is saved and is evaluated. Nothing is trained or written."""
    if at is not None and between is not None:
        raise click.UsageError("--at and --between do not go together")
    from noether.cli.plan import command as planning
    from noether.config import load

    with _refusals():
        planning.check_drawing(png)
        points = () if at is None and between is None else planning.points(at, between)
        planning.show(load(config, settings, allow), str(config), points, png, as_json=as_json)


@main.command()
@click.argument("kind", required=False)
@_ALLOW
def callbacks(kind: str | None, allow: tuple[str, ...]) -> None:
    """List the known callbacks, or show settings, documentation and YAML of KIND: a name or a dotted path."""
    from noether.cli import callbacks as describing

    with _refusals():
        if kind is None:
            describing.list_kinds()
        else:
            describing.show_kind(kind, allow)


def _leave(exit_code: int) -> None:
    if exit_code:
        sys.exit(exit_code)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what a user can mend into a message and an exit code; anything else is a bug and keeps its traceback."""
    from noether.config import ConfigError

    try:
        with _warnings_as_lines():
            yield
    except ConfigError as error:
        raise _CommandError(error, _CONFIG_ERROR) from error
    except BrokenPipeError:
        raise  # whoever read the output has enough, as `head` has: click ends without a word
    except Exception as error:
        if isinstance(error, _mendable()):
            raise _CommandError(error, 1) from error
        raise


def _mendable() -> tuple[type[Exception], ...]:
    """Return what a user can mend, a refused configuration aside. To name it takes torch, so it is asked for last."""
    from noether.core.declarations import DeclarationError
    from noether.core.errors import OutputError, WeightsError
    from noether.core.metrics import MetricError
    from noether.core.reducer import UnclaimedMemoryError
    from noether.effects import CheckpointError, LockedError, LogError, UnhandledEffectError
    from noether.planning.replay import ReplayError

    return (
        CheckpointError,
        DeclarationError,
        FloatingPointError,
        LockedError,
        LogError,
        MetricError,
        OSError,
        OutputError,
        ReplayError,
        UnclaimedMemoryError,
        UnhandledEffectError,
        WeightsError,
    )


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show what a configuration is warned of as a line on the standard error, each once; other warnings as ever."""
    from noether.config.compatibility import ConfigWarning

    with warnings.catch_warnings():
        warnings.simplefilter("once", ConfigWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, ConfigWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                others(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]  # Python's own way in, called with these by position
        yield


class _CommandError(NoetherError, click.ClickException):
    """A message on the standard error, and an exit code."""

    def __init__(self, error: Exception, exit_code: int) -> None:
        super().__init__(str(error))
        self.exit_code = exit_code  # type: ignore[misc]  # click declares one for the class and reads the object's
