"""`noether plan`: the run before the run."""

from __future__ import annotations

import shutil
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from noether.cli.plan.json import counted_json, fired_json, plan_json
from noether.cli.plan.text import print_counted, print_fired, print_plan, size
from noether.core.errors import SettingsError
from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.schedules.forecast import events_at, fires, firings
from noether.planning.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.config import Config
    from noether.core.run import Run
    from noether.planning.plan import Plan

Points = tuple[tuple[str, TrainingIteration], ...]
"""One point for `--at`, two for `--between`, none for the whole plan; each as written, and what it stands for."""


def check_drawing(png: Path | None) -> None:
    """Refuse a picture that could not be drawn, before anything takes time.

    Raises:
        UsageError: Saying what is missing.
    """
    if png is None:
        return
    if not png.parent.is_dir():
        raise click.UsageError(f"--png {png}: there is no folder {str(png.parent)!r}; make it first")
    if png.is_dir():
        raise click.UsageError(f"--png {png}: is a folder; give the name of a file in it")
    if find_spec("matplotlib") is None:
        raise click.UsageError("--png: matplotlib is not installed; pip install 'noether[plot]' does that")


def points(at: str | None, between: tuple[str, str] | None) -> Points:
    """Return the points that are named on the command line.

    Raises:
        UsageError: If one is no point on one counter.
    """
    if between is not None:
        return tuple((text, _point(text, f"--between {' '.join(between)}")) for text in between)
    return () if at is None else ((at, _point(at, f"--at {at}")),)


def show(config: Config, file: str, asked: Points, png: Path | None, *, as_json: bool) -> None:
    """Print the plan of a run, or what fires where it is asked for.

    Raises:
        ConfigError: If the configuration is refused.
        OSError: If the picture cannot be written.
        UsageError: If a point does not lie in the run.
    """
    with redirect_stdout(sys.stderr):  # what datasets and callbacks of a user's print is no part of the plan
        plan = make_plan(config)
    updates = _updates(asked, plan.run)
    warnings = [str(each) for each in plan.warnings]
    if not asked:
        _show_all(plan, file, warnings, as_json=as_json)
    elif len(updates) == 1:
        _show_at(plan, file, asked[0][0], updates[0], as_json=as_json)
    else:
        _show_between(plan, file, [text for text, _ in asked], updates, as_json=as_json)
    if png is not None:
        _draw(plan, png)


def _draw(plan: Plan, png: Path) -> None:
    from noether.cli.plan.picture import draw

    try:
        draw(plan, png)
    except OSError as error:
        raise OSError(f"--png {png}: the picture could not be written: {error.strerror or error}") from error


def _show_all(plan: Plan, file: str, warnings: list[str], *, as_json: bool) -> None:
    place, free = _free(Path(plan.config.run.output))
    if plan.checkpoints.peak_bytes > free:
        warnings = [*warnings, _too_large(plan, place, free)]
    if as_json:
        click.echo(plan_json(plan, file, {"path": str(place), "free_bytes": free}, warnings))
    else:
        print_plan(plan, file)
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


def _show_at(plan: Plan, file: str, text: str, update: int, *, as_json: bool) -> None:
    events = events_at(update, plan.run)
    fired = [(each, at) for at in events for each in plan.callbacks if fires(each.occasions, at, plan.run)]
    if as_json:
        click.echo(fired_json(fired, file, text))
    else:
        print_fired(fired, text)


def _show_between(plan: Plan, file: str, texts: Sequence[str], updates: Sequence[int], *, as_json: bool) -> None:
    start, end = (plan.run.iteration_after(update) for update in updates)
    found = [(each, firings(each.occasions, plan.run, start, end)) for each in plan.callbacks]
    counted = [(each, inside) for each, inside in found if inside.count]
    if as_json:
        click.echo(counted_json(counted, file, texts))
    else:
        print_counted(counted, f"after {texts[0]} and up to {texts[1]}")


def _point(text: str, option: str) -> TrainingIteration:
    right = "give a point on one counter, like U1000, E2 or S512"
    try:
        point = TrainingIteration.parse(text)
    except SettingsError:
        raise click.UsageError(f"{option}: {text!r} is no point of a run; {right}") from None
    if sum(getattr(point, counter) > 0 for counter in COUNTERS) > 1 or "_" in text:
        raise click.UsageError(f"{option}: {text!r} names several counters; {right}")
    return point


def _updates(asked: Points, run: Run) -> list[int]:
    """Return the number of the update after which each point is reached."""
    option = f"{'--at' if len(asked) == 1 else '--between'} {' '.join(text for text, _ in asked)}"
    updates = [max(run.updates_to(name, getattr(point, name)) for name in COUNTERS) for _, point in asked]
    for (text, _), update in zip(asked, updates, strict=True):
        if update > run.final.update:
            raise click.UsageError(f"{option}: {text} is beyond the end: the run ends at {run.final}")
    if updates == [0]:
        raise click.UsageError(f"{option}: nothing is due before the first update; U1 is the first")
    if len(asked) > 1 and updates[0] >= updates[1]:
        raise click.UsageError(f"{option}: {asked[0][0]} is not before {asked[1][0]}; give the earlier point first")
    return updates


def _free(output: Path) -> tuple[Path, int]:
    """Return the nearest folder to where the run will lie, and what is free there."""
    place = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    return place, shutil.disk_usage(place).free


def _too_large(plan: Plan, place: Path, free: int) -> str:
    message = (
        f"checkpoints take {size(plan.checkpoints.peak_bytes)} at most, and {str(place)!r} has {size(free)} free; "
        "give a place with more, or save less: keep, save_latest_optim, a longer interval"
    )
    (located,) = plan.config.error(("run", "output"), message).problems
    return str(located)
