"""`noether plan`: checks its options, makes the plan, and prints all of it or a part."""

from __future__ import annotations

import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from noether.cli.output import echo
from noether.cli.plan.json import interval_json, plan_json, point_json
from noether.cli.plan.text import print_interval, print_plan, print_point
from noether.core.errors import SettingsError
from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.schedules.forecast import events_at, fires, firings
from noether.core.text import format_bytes
from noether.planning.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.config import Config
    from noether.core.run import Run
    from noether.planning.plan import Plan

Points = tuple[tuple[str, TrainingIteration], ...]
"""Points of the run as text and parsed: one for `--at`, two for `--between`, none for the whole plan."""


def parse_points(at: str | None, between: tuple[str, str] | None) -> Points:
    """Return the points in the options `--at` and `--between`.

    Raises:
        UsageError: If a text is not a point on one counter.
    """
    if between is not None:
        return tuple((text, _parse_point(text, f"--between {' '.join(between)}")) for text in between)
    return () if at is None else ((at, _parse_point(at, f"--at {at}")),)


def show_plan(
    config: Config, file: str, points: Points, png: Path | None, *, as_json: bool, world_size: int = 1
) -> None:
    """Print the plan of a run or, with points, the callbacks that fire there.

    Raises:
        ConfigError: If the configuration is wrong.
        OSError: If the picture cannot be written.
        UsageError: If a point does not lie in the run.
    """
    with redirect_stdout(sys.stderr):  # datasets and callbacks of the user may print
        plan = make_plan(config, world_size=world_size)
    updates = _updates(points, plan.run)
    if not points:
        _show_all(plan, file, as_json=as_json)
    elif len(updates) == 1:
        _show_at(plan, file, points[0][0], updates[0], as_json=as_json)
    else:
        _show_between(plan, file, [text for text, _ in points], updates, as_json=as_json)
    if png is not None:
        _draw_picture(plan, png)


def _draw_picture(plan: Plan, png: Path) -> None:
    from noether.cli.plan.picture import draw_timeline

    try:
        draw_timeline(plan, png)
    except OSError as error:
        raise OSError(f"--png {png}: the picture could not be written: {error.strerror or error}") from error


def _show_all(plan: Plan, file: str, *, as_json: bool) -> None:
    folder, free = _free_space(Path(plan.config.run.output))
    warnings = [str(each) for each in plan.warnings]
    if plan.checkpoints.peak_bytes > free:
        warnings.append(_disk_warning(plan, folder, free))
    if as_json:
        echo(plan_json(plan, file, {"path": str(folder), "free_bytes": free}, warnings))
    else:
        print_plan(plan, file)
    for warning in warnings:
        echo(f"Warning: {warning}", err=True)


def _show_at(plan: Plan, file: str, text: str, update: int, *, as_json: bool) -> None:
    events = events_at(update, plan.run)
    fired = [(each, event) for event in events for each in plan.callbacks if fires(each.occasions, event, plan.run)]
    if as_json:
        echo(point_json(fired, file, text))
    else:
        print_point(fired, text)


def _show_between(plan: Plan, file: str, texts: Sequence[str], updates: Sequence[int], *, as_json: bool) -> None:
    start, end = (plan.run.iteration_after(update) for update in updates)
    all_firings = [(each, firings(each.occasions, plan.run, start, end)) for each in plan.callbacks]
    fired = [(each, its_firings) for each, its_firings in all_firings if its_firings.count]
    if as_json:
        echo(interval_json(fired, file, texts))
    else:
        print_interval(fired, f"after {texts[0]} and up to {texts[1]}")


def _parse_point(text: str, option: str) -> TrainingIteration:
    fix = "give a point on one counter, like U1000, E2 or S512"
    try:
        point = TrainingIteration.parse(text)
    except SettingsError:
        raise click.UsageError(f"{option}: {text!r} is not a point of a run; {fix}") from None
    if sum(getattr(point, counter) > 0 for counter in COUNTERS) > 1 or "_" in text:
        raise click.UsageError(f"{option}: {text!r} names several counters; {fix}")
    return point


def _updates(points: Points, run: Run) -> list[int]:
    """Return the number of the update after which each point is reached."""
    option = f"{'--at' if len(points) == 1 else '--between'} {' '.join(text for text, _ in points)}"
    updates = [max(run.updates_to(name, getattr(point, name)) for name in COUNTERS) for _, point in points]
    for (text, _), update in zip(points, updates, strict=True):
        if update > run.final.update:
            raise click.UsageError(f"{option}: {text} is after the end of the run at {run.final}")
    if updates == [0]:
        raise click.UsageError(f"{option}: nothing fires before U1, the first update")
    if len(points) > 1 and updates[0] >= updates[1]:
        raise click.UsageError(f"{option}: {points[0][0]} is not before {points[1][0]}; give the earlier point first")
    return updates


def _free_space(output: Path) -> tuple[Path, int]:
    """Return the nearest existing folder of the output, and the bytes that are free there."""
    folder = next(each for each in (output, *output.absolute().parents) if each.is_dir())
    return folder, shutil.disk_usage(folder).free


def _disk_warning(plan: Plan, folder: Path, free: int) -> str:
    message = (
        f"checkpoints take up to {format_bytes(plan.checkpoints.peak_bytes)}, but {str(folder)!r} has only "
        f"{format_bytes(free)} free; choose another folder, or save less: keep, save_latest_optim, a longer interval"
    )
    (located,) = plan.config.error(("run", "output"), message).problems
    return str(located)
