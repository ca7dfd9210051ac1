"""`noether`: plan, train, resume, evaluate, export, replay and validate runs of a YAML file."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

import click

from noether.cli import reference
from noether.cli.command_groups import GroupedCommands
from noether.cli.messages import errors_as_messages
from noether.cli.options import ALLOW, CHECKPOINT_NAMES, SET, check_picture
from noether.cli.output import discard_unwritten, echo
from noether.core.text import count_of


@click.group(cls=GroupedCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="noether")
def main() -> None:
    """Train PyTorch models with callbacks that are pure functions.

    CONFIG is a YAML file that describes a run. `noether train CONFIG` writes the run to a new directory RUN_DIR, such
    as runs/NAME/20260102-030405, from which the run can be resumed, evaluated and replayed.

    After `eval "$(_NOETHER_COMPLETE=bash_source noether)"`, bash completes commands and options with the Tab key.
    """
    atexit.register(discard_unwritten)


@main.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--resume", metavar="RUN_DIR", type=click.Path(path_type=Path), help="Resume the run in RUN_DIR.")
@click.option("--smoke", is_flag=True, help="Try one update, one evaluation and one save in a temporary directory.")
@click.option(
    "--drop-memory",
    metavar="NAME",
    multiple=True,
    help="With --resume: discard the saved memory NAME, which no callback claims; repeatable.",
)
@click.option(
    "--continue", "continue_stopped", is_flag=True, help="With --resume: continue a run that a callback stopped."
)
@click.option(
    "--checkpoint",
    metavar="TAG",
    help=f"With --resume: where to resume, in place of the newest checkpoint. {CHECKPOINT_NAMES}.",
)
@click.option(
    "--into",
    metavar="NEW_RUN_DIR",
    type=click.Path(path_type=Path),
    help="With --resume: start a new run at the checkpoint, and leave the run in RUN_DIR as it is.",
)
@SET
@ALLOW
def train(  # noqa: PLR0913, PLR0917  # click passes one argument for each option
    config: Path | None,
    resume: Path | None,
    smoke: bool,  # noqa: FBT001  # click passes it by name
    drop_memory: tuple[str, ...],
    continue_stopped: bool,  # noqa: FBT001  # click passes it by name
    checkpoint: str | None,
    into: Path | None,
    settings: tuple[str, ...],
    allow: tuple[str, ...],
) -> None:
    """Train a new run from CONFIG, resume a run, or start a new run at a checkpoint of another one.

    Exit codes: 0 at the end of the run; 75 after trainer.max_hours, and 128 plus its number after a signal, such as 143
    after SIGTERM: the run is saved and can be resumed; 2 for a wrong command or configuration; 1 after any other error.
    """
    if (config is None) == (resume is None):
        raise click.UsageError("give either CONFIG or --resume RUN_DIR")
    if resume is not None and smoke:
        raise click.UsageError("--smoke needs CONFIG, not --resume")
    if drop_memory and resume is None:
        raise click.UsageError("--drop-memory needs --resume")
    if continue_stopped and resume is None:
        raise click.UsageError("--continue needs --resume")
    for option, value in (("--checkpoint", checkpoint), ("--into", into)):
        if value is not None and resume is None:
            raise click.UsageError(f"{option} needs --resume")
    from noether.cli.commands import train as commands

    with errors_as_messages():
        if config is not None and smoke:
            commands.smoke(config, settings, allow)
        elif config is not None:
            sys.exit(commands.start(config, settings, allow))
        elif resume is not None:
            sys.exit(
                commands.resume(
                    resume,
                    settings,
                    allow,
                    drop_memory,
                    continue_stopped=continue_stopped,
                    checkpoint=checkpoint,
                    into=into,
                )
            )


@main.command("eval")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    default="latest",
    show_default=True,
    metavar="TAG",
    help=f"{CHECKPOINT_NAMES}.",
)
@click.option(
    "--weights", metavar="NAME", help="Evaluate averaged weights, e.g. ema=0.999, in place of the training weights."
)
@click.option(
    "--data",
    metavar="NAME",
    multiple=True,
    help="Evaluate this dataset of the configuration in place of those that the callbacks name; repeatable.",
)
@SET
@ALLOW
def evaluate(
    run_dir: Path,
    checkpoint: str,
    weights: str | None,
    data: tuple[str, ...],
    settings: tuple[str, ...],
    allow: tuple[str, ...],
) -> None:
    """Evaluate a checkpoint of a run, which may be in training.

    The callbacks of the run that iterate datasets evaluate it. Their metrics are printed and written to RUN_DIR/eval,
    where no earlier file is overwritten, and to the log services of the run.
    """
    from noether.cli.commands import evaluate as command

    with errors_as_messages():
        sys.exit(command.evaluate(run_dir, checkpoint, weights, settings, allow, data))


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="latest", show_default=True, metavar="TAG", help=f"{CHECKPOINT_NAMES}.")
@click.option(
    "--to",
    "target",
    metavar="FILE.safetensors",
    required=True,
    type=click.Path(path_type=Path),
    help="The file to write; it must not exist.",
)
@click.option("--weights", metavar="NAME", help="Export averaged weights, e.g. ema=0.999.")
def export(run_dir: Path, checkpoint: str, target: Path, weights: str | None) -> None:
    """Write the weights of a checkpoint to one safetensors file.

    `load_state_dict` of the model takes it, and so does `run.init_from` of another run. The command needs no code of
    the model, and joins the shards that several ranks saved.
    """
    from noether.cli.commands import export as command

    with errors_as_messages():
        command.export(run_dir, checkpoint, weights, target)


@main.command()
@click.argument("paths", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--follow", is_flag=True, help="Show a run until it ends.")
@click.option("--metric", "metrics", metavar="KEY", multiple=True, help="Show this metric of several runs; repeatable.")
@click.option(
    "--sort", metavar="KEY", help="Sort by a metric, or by run, status, started, duration or update; -KEY reverses."
)
@click.option("--diff", is_flag=True, help="Show the settings, code, machine and packages in which runs differ.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def show(
    paths: tuple[Path, ...],
    follow: bool,  # noqa: FBT001  # click passes it by name
    metrics: tuple[str, ...],
    sort: str | None,
    diff: bool,  # noqa: FBT001  # click passes it by name
    as_json: bool,  # noqa: FBT001  # click passes it by name
) -> None:
    """Show a run, which may be in training, or compare several runs.

    Give several directories, or a folder of runs such as runs/NAME, for a table.
    """
    from noether.cli.commands import show as command

    with errors_as_messages():
        is_single = command.is_single_run(paths)
        if follow and (not is_single or as_json):
            raise click.UsageError("--follow needs one RUN_DIR, and no --json")
        if is_single and (metrics or sort is not None or diff):
            raise click.UsageError("--metric, --sort and --diff need several runs: give more RUN_DIR, or a folder")
        if is_single:
            command.show_run(paths[0], as_json=as_json, follow=follow)
        else:
            command.show_runs(paths, metrics=metrics, sort=sort, only_differences=diff, as_json=as_json)


@main.command()
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    metavar="FILE.html",
    type=click.Path(path_type=Path),
    help="The file to write; by default report.html in RUN_DIR, or in the working directory for several runs.",
)
@click.option(
    "--png", metavar="FILE.png", type=click.Path(path_type=Path), help="Also draw the curves, as a PNG image."
)
def report(run_dirs: tuple[Path, ...], target: Path | None, png: Path | None) -> None:
    """Write charts and tables of runs to one HTML file, which needs no network.

    The runs may be in training.
    """
    from noether.cli.commands import report as command

    with errors_as_messages():
        command.report(run_dirs, target, png)


@main.command()
@click.argument("runs", metavar="RUNS...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("statement", metavar="SQL")
@click.option("--csv", "form", flag_value="csv", help="Print CSV.")
@click.option("--json", "form", flag_value="json", help='Print a list of JSON objects, with NaN as the text "NaN".')
def query(runs: tuple[Path, ...], statement: str, form: str | None) -> None:
    """Run a SQL statement over runs, in the dialect of duckdb.

    RUNS are run directories, or folders of them. The tables are metrics(run, event, epoch, update, sample, time_s, key,
    value), runs, config, summary, checkpoints and artifacts; a wrong statement lists their columns. Nothing is written.
    """
    from noether.cli.commands import query as command

    with errors_as_messages():
        command.query(runs, statement, form or "table")


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--callbacks",
    metavar="OTHER.yaml",
    type=click.Path(path_type=Path),
    help="Replay the callbacks of this file in place of the run's own; the run supplies metrics that they consume.",
)
@click.option("--at", metavar="POINT", help="Show state and effects at one point, e.g. U1000, E2 or S512.")
@click.option("--log", is_flag=True, help="Also show the metrics and texts that callbacks log.")
@ALLOW
def replay(
    run_dir: Path,
    callbacks: Path | None,
    at: str | None,
    log: bool,  # noqa: FBT001  # click passes it by name
    allow: tuple[str, ...],
) -> None:
    """Show what callbacks decide in a recorded run.

    Calls them with the events in RUN_DIR/events.jsonl, which a run with `trainer.record: events` writes.
    """
    from noether.cli.commands import replay as command

    with errors_as_messages():
        command.show_replay(run_dir, callbacks, at, allow, log=log)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@SET
@ALLOW
def validate(config: Path, settings: tuple[str, ...], allow: tuple[str, ...]) -> None:
    """Check a configuration without training.

    Checks every setting of CONFIG, builds the datasets and the model, and checks that the callbacks fit together and
    that their effects have handlers. For this check it calls your callbacks a few times, as `noether plan` does. Warns
    of a last batch of one sample if the model fails on it.
    """
    from noether.config import load
    from noether.config.default_callbacks import default_names

    with errors_as_messages():
        loaded = load(config, settings, allow)
        # These import torch, which is slow: `load` reports wrong settings before that.
        from noether.planning.single_samples import find_single_sample_warnings
        from noether.planning.unhandled_effects import check_requests
        from noether.training.experiment import build
        from noether.training.runs.services import check_services

        check_services(loaded)
        experiment = build(loaded)
        for note in experiment.notes:
            echo(note)
        for warning in find_single_sample_warnings(experiment):
            echo(f"Warning: {warning}", err=True)
        check_requests(experiment)
        count, updates = len(experiment.reducer.members), experiment.run.final.update
        echo(f"{config} is valid: {count_of(count, 'callback')}, {count_of(updates, 'update')}")
        if loaded.source is not None and (names := default_names(loaded.source)):
            echo(f"default callbacks: {', '.join(names)}")


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--at", metavar="POINT", help="List the callbacks that fire at one point, e.g. U1000, E2 or S512.")
@click.option(
    "--between", nargs=2, metavar="START END", help="List the callbacks that fire after one point and up to another."
)
@click.option(
    "--png", metavar="FILE.png", type=click.Path(path_type=Path), help="Also draw the timeline, as a PNG image."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--ranks", metavar="N", type=click.IntRange(min=1), default=1, help="Plan for N processes, as torchrun starts them."
)
@SET
@ALLOW
def plan(  # noqa: PLR0917  # click passes one argument for each option
    config: Path,
    at: str | None,
    between: tuple[str, str] | None,
    png: Path | None,
    as_json: bool,  # noqa: FBT001  # click passes it by name
    ranks: int,
    settings: tuple[str, ...],
    allow: tuple[str, ...],
) -> None:
    """Show when callbacks fire, save and evaluate, without training.

    The plan is computed from CONFIG. It writes no file, except the one of --png.
    """
    if at is not None and between is not None:
        raise click.UsageError("give either --at or --between")
    from noether.cli.plan import command
    from noether.config import load

    with errors_as_messages():
        check_picture(png)
        points = command.parse_points(at, between)
        command.show_plan(load(config, settings, allow), str(config), points, png, as_json=as_json, world_size=ranks)


for _command in (reference.callbacks, reference.help_, reference.schema):
    main.add_command(_command)
