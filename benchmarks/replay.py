"""How long does it take to tell a recorded run to its callbacks again, beside reading its record?

Run as `python -m benchmarks.replay`. A run of as many updates as are asked for is recorded as the trainer does, with
callbacks that log, stop, watch a metric and save. It is then replayed, and, in turns with that, its lines are only
parsed as JSON; the ratio of the two is taken within each round, and the table shows medians with quartiles.
"""

from __future__ import annotations

import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from benchmarks.measuring import Table, markdown_option, quartiles, ratios, seconds, show, take_turns
from noether import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState, compose
from noether.cli.replay import has_decision
from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    EvaluateCallback,
    LrCallback,
    MetricEarlyStopping,
    OnlineLossCallback,
    ProgressCallback,
)
from noether.core.loop import Move, next_move
from noether.effects import open_run
from noether.effects.disk.calls import DISK
from noether.effects.logs.events import read_events
from noether.planning.replay import replay
from noether.training.runs.execution import event_recorder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.core.callback import Callback

_WHEN = {"every_n_updates": 100}
_WATCH = {**_WHEN, "metric_key": "loss/val/total"}
_DECIDING = (
    LrCallback(**_WHEN),
    EvaluateCallback(dataset_key="val", measures=("loss",), **_WHEN),
    BestMetricCallback(**_WATCH),
    BestCheckpointCallback(**_WATCH),
    MetricEarlyStopping(**_WATCH, tolerance=10**9),
    CheckpointCallback(every_n_epochs=1),
)
_ROWS = {
    "callbacks that decide at their intervals": _DECIDING,
    "and two that look at every update": (ProgressCallback(**_WHEN), OnlineLossCallback(**_WHEN), *_DECIDING),
}
_ALL = _ROWS["and two that look at every update"]


def record(folder: Path, updates: int) -> Path:
    """Record a run, and return the file; nothing but the record is written."""
    reducer = compose(*_ALL)
    run = Run(
        end=TrainingIteration(update=updates), updates_per_epoch=1000, samples_per_epoch=32_000,
        effective_batch_size=32, run_id="replay", frozen=frozenset(), config={},
        data={"val": [torch.zeros(1)]}, forward=lambda state, _: ({"total": _loss(state)}, None),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(updates, generator=generator)
    with open_run(folder / "run") as directory:
        tell = directory.recording_interpreter(lambda *_: None, event_recorder(reducer))

        def told(state: TrainState, event: BeforeTraining | AfterUpdate | AfterEpoch | AfterTraining) -> TrainState:
            state, effects = reducer(state, event)
            tell(effects, state, event)
            return state

        state = told(TrainState(params={"w": torch.ones(1000)}), BeforeTraining(run=run))
        while (move := next_move(state, run)) is not Move.NOTHING:
            if move is Move.UPDATE:
                loss = {"total": losses[state.iteration.update]}
                readings = {"samples": 32, "losses": loss, "lr": {"default": 0.1}, "duration_s": 0.01}
                state = told(state.advance(samples=32), AfterUpdate(run=run, **readings))
            elif move is Move.END_EPOCH:
                state = told(state.next_epoch(), AfterEpoch(run=run))
            else:
                state = told(state.replace(ended=True), AfterTraining(run=run))
    return folder / "run/events.jsonl"


def _loss(state: TrainState) -> torch.Tensor:
    return torch.tensor(1 + math.sin(state.iteration.update) / 2)


def parsed(path: Path) -> None:
    """Parse every line."""
    for line in path.read_bytes().splitlines():
        json.loads(line)


def replayed(callbacks: Sequence[Callback], path: Path) -> None:
    """Replay the run.

    Raises:
        click.ClickException: If it did not end, or left somebody out.
    """
    found = replay(callbacks, partial(read_events, path, DISK), {}, select=has_decision)
    if not found.finished or found.skipped:
        raise click.ClickException(f"the replay is not whole: {found.skipped}")


@click.command(help=__doc__)
@click.option("--updates", default=1_000_000, show_default=True, type=click.IntRange(min=1), help="Of the run.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(updates: int, rounds: int, *, markdown: bool) -> None:
    """Record, measure and print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = record(Path(folder), updates)
        size = path.stat().st_size
        work = {"parsed": partial(parsed, path)}
        work |= {name: partial(replayed, callbacks, path) for name, callbacks in _ROWS.items()}
        found = take_turns({name: partial(seconds, each) for name, each in work.items()}, rounds)
    rows = [(name, quartiles(each[name] for each in found), quartiles(ratios(found, name, "parsed"))) for name in work]
    title = f"{updates:,} updates, {size / 1e6:.0f} MB of events"
    show(Table(title, ("", "seconds", "/ parsing"), rows), markdown=markdown)


if __name__ == "__main__":
    main()
