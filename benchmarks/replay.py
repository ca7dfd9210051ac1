"""Time of replaying a recorded run to its callbacks, compared with parsing the record.

Run as `python -m benchmarks.replay`. A run is recorded as the trainer does, with callbacks that log, stop, watch a
metric and save. It is then replayed and, in turns, its lines are only parsed as JSON; the ratio of the two is taken
within each round, and the table shows medians with quartiles.
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

from benchmarks.measurement import Table, markdown_option, quartiles, ratios, seconds, show, take_turns
from noether import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState, compose
from noether.cli.commands.replay import has_decision
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

_INTERVAL = {"every_n_updates": 100}
_WATCH = {**_INTERVAL, "metric_key": "loss/val/total"}
_DECIDING = (
    LrCallback(**_INTERVAL),
    EvaluateCallback(dataset_key="val", measures=("loss",), **_INTERVAL),
    BestMetricCallback(**_WATCH),
    BestCheckpointCallback(**_WATCH),
    MetricEarlyStopping(**_WATCH, tolerance=10**9),
    CheckpointCallback(every_n_epochs=1),
)
_ROWS = {
    "callbacks that decide at their intervals": _DECIDING,
    "and two that look at every update": (ProgressCallback(**_INTERVAL), OnlineLossCallback(**_INTERVAL), *_DECIDING),
}
_ALL = _ROWS["and two that look at every update"]


def record(folder: Path, updates: int) -> Path:
    """Record the events of a run, and return their file; nothing else is written."""
    reducer = compose(*_ALL)
    run = Run(
        end=TrainingIteration(update=updates), updates_per_epoch=1000, samples_per_epoch=32_000,
        effective_batch_size=32, run_id="replay", frozen=frozenset(), config={},
        data={"val": [torch.zeros(1)]}, forward=lambda state, _: ({"total": _loss(state)}, None),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(updates, generator=generator)
    with open_run(folder / "run") as directory:
        record_event = directory.recording_interpreter(lambda *_: None, event_recorder(reducer))

        def dispatch(state: TrainState, event: BeforeTraining | AfterUpdate | AfterEpoch | AfterTraining) -> TrainState:
            state, effects = reducer(state, event)
            record_event(effects, state, event)
            return state

        state = dispatch(TrainState(params={"w": torch.ones(1000)}), BeforeTraining(run=run))
        while (move := next_move(state, run)) is not Move.NOTHING:
            if move is Move.UPDATE:
                loss = {"total": losses[state.iteration.update]}
                readings = {"samples": 32, "losses": loss, "lr": {"default": 0.1}, "duration_s": 0.01}
                state = dispatch(state.advance(samples=32), AfterUpdate(run=run, **readings))
            elif move is Move.END_EPOCH:
                state = dispatch(state.next_epoch(), AfterEpoch(run=run))
            else:
                state = dispatch(state.replace(ended=True), AfterTraining(run=run))
    return folder / "run/events.jsonl"


def _loss(state: TrainState) -> torch.Tensor:
    return torch.tensor(1 + math.sin(state.iteration.update) / 2)


def parse_lines(path: Path) -> None:
    """Parse every line as JSON."""
    for line in path.read_bytes().splitlines():
        json.loads(line)


def replay_run(callbacks: Sequence[Callback], path: Path) -> None:
    """Replay the run.

    Raises:
        click.ClickException: If the replay did not reach the end, or skipped a callback.
    """
    replayed = replay(callbacks, partial(read_events, path, DISK), {}, select=has_decision)
    if not replayed.finished or replayed.skipped:
        raise click.ClickException(f"the replay is incomplete; skipped callbacks: {replayed.skipped}")


@click.command(help=__doc__)
@click.option("--updates", default=1_000_000, show_default=True, type=click.IntRange(min=1), help="Updates of the run.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(updates: int, rounds: int, *, markdown: bool) -> None:
    """Record, measure and print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = record(Path(folder), updates)
        size = path.stat().st_size
        work = {"parsed": partial(parse_lines, path)}
        work |= {name: partial(replay_run, callbacks, path) for name, callbacks in _ROWS.items()}
        measured = take_turns({name: partial(seconds, each) for name, each in work.items()}, rounds)
    rows = [
        (name, quartiles(each[name] for each in measured), quartiles(ratios(measured, name, "parsed"))) for name in work
    ]
    title = f"{updates:,} updates, {size / 1e6:.0f} MB of events"
    show(Table(title, ("", "seconds", "/ parsing"), rows), markdown=markdown)


if __name__ == "__main__":
    main()
