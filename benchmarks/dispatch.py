"""Cost of dispatching one update to many callbacks, when none is due and when all are.

Run as `python -m benchmarks.dispatch`. Each row dispatches one update to 1, 10, 100 and 1,000 callbacks that do
nothing, as its library does after each update: an event of Ignite's engine, the function with which Lightning's loop
calls its hooks, Keras's `CallbackList.on_train_batch_end`, CLU's periodic actions in a loop. Idle callbacks have
intervals that no update here reaches; where the library has no intervals, the callback tests the remainder, as its
users do. Firing callbacks are due at every update.

The unit of the idle rows is one `state.advance`, which every update of noether makes anyway. The unit of the firing
rows, per callback, is one `dataclasses.replace` of the state. All rows take turns in one process; a ratio is taken
within each round, and the tables show medians over rounds with quartiles.

Goals: an idle update takes the same time for 1 and for 1,000 callbacks, within 10 %, and at most half of an advance;
firing a callback takes at most two replaces besides the work of the callback.

Both are met: 0.23 of an advance, for 1 callback as for 1,000, and 0.3 to 0.4 replaces. Callbacks that are not due are
also skipped when another one is due at every update.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch

from benchmarks.measurement import (
    Table,
    available_rows,
    markdown_option,
    quartiles,
    ratios,
    short_call_row,
    show,
    take_turns,
)
from noether import AfterUpdate, TrainState, compose
from noether.core.callbacks.periodic import PeriodicCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Dispatch = Callable[[], object]  # dispatches one update
    Row = Callable[[Sequence[int]], Dispatch]  # from the intervals of the callbacks

COUNTS = (1, 10, 100, 1000)
NEVER = 10**9
_ADVANCE, _REPLACE = "state.advance", "dataclasses.replace"


class Nothing(PeriodicCallback):
    """Does nothing when it is due."""

    def periodic_callback(self, state: TrainState, event: Any, interval: Any) -> tuple[TrainState, tuple[()]]:  # noqa: ARG002  # a hook
        """Return the state unchanged."""
        return state, ()


def noether(intervals: Sequence[int]) -> Dispatch:
    """Dispatch an update to periodic callbacks."""
    reducer = compose(*(Nothing(every_n_updates=n, id=str(index)) for index, n in enumerate(intervals)))
    return partial(reducer, TrainState().advance(samples=64), AfterUpdate(samples=64))


def ignite(intervals: Sequence[int]) -> Dispatch:
    """Fire an event of an Ignite engine with filtered handlers."""
    from ignite.engine import Engine, Events

    engine = Engine(lambda engine, batch: None)  # noqa: ARG005  # called by the engine
    engine.state.iteration = 1
    for n in intervals:
        event = Events.ITERATION_COMPLETED(every=n) if n > 1 else Events.ITERATION_COMPLETED
        engine.add_event_handler(event, lambda: None)
    return partial(engine.fire_event, Events.ITERATION_COMPLETED)


def lightning(intervals: Sequence[int]) -> Dispatch:
    """Call a hook of Lightning callbacks, through the function that the loop of its trainer uses."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.call import _call_callback_hooks

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Hook(Callback):
        def __init__(self, n: int) -> None:
            self.n = n

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002  # a hook
            if (batch_idx + 1) % self.n:
                return

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(accelerator="cpu", callbacks=[Hook(n) for n in intervals], **dict.fromkeys(quiet, False))
    trainer.strategy.connect(LightningModule())
    return partial(_call_callback_hooks, trainer, "on_train_batch_end", None, None, 0)


def keras(intervals: Sequence[int]) -> Dispatch:
    """Call a hook of a list of Keras callbacks."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    from keras.callbacks import Callback, CallbackList

    class Hook(Callback):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n = n

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002  # a hook
            if (batch + 1) % self.n:
                return

    return partial(CallbackList([Hook(n) for n in intervals]).on_train_batch_end, 0, {"loss": 0.5})


def clu(intervals: Sequence[int]) -> Dispatch:
    """Call periodic actions of CLU one after the other, as its users do."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it imports TensorFlow
    from clu.periodic_actions import PeriodicCallback as Action

    actions = [Action(every_steps=n, callback_fn=lambda step, t: None) for n in intervals]  # noqa: ARG005  # a hook
    steps = count(1)

    def dispatch() -> None:
        step = next(steps)
        for action in actions:
            action(step)

    return dispatch


_BESIDE = "noether, beside one that is due"
_ROWS: Mapping[str, Row] = {
    "noether": noether,
    _BESIDE: lambda intervals: noether([1, *intervals]),
    "Ignite": ignite,
    "Lightning": lightning,
    "Keras": keras,
    "CLU": clu,
}


class Case(NamedTuple):
    """One measurement: a row, a number of callbacks, and whether they fire."""

    name: str
    callbacks: int
    firing: bool


def measure(rows: Mapping[str, Row], rounds: int) -> list[dict[Any, float]]:
    """Return the seconds per call of each row and of the two units, in each round."""
    state = TrainState().advance(samples=64)
    turns: dict[Any, Callable[[], float]] = {
        _ADVANCE: short_call_row(partial(state.advance, samples=64)),
        _REPLACE: short_call_row(partial(dataclasses.replace, state)),
    }
    for name, row in rows.items():
        for callbacks in COUNTS:
            idle = [NEVER + index for index in range(callbacks)]
            turns[Case(name, callbacks, firing=False)] = short_call_row(row(idle))
            turns[Case(name, callbacks, firing=True)] = short_call_row(row([1] * callbacks))
    return take_turns(turns, rounds)


def idle_table(rows: Mapping[str, Row], measured: list[dict[Any, float]], notes: Sequence[str]) -> Table:
    """Return the table of updates at which no callback is due."""
    cells = []
    for name in rows:
        cases = [Case(name, callbacks, firing=False) for callbacks in COUNTS]
        growth = quartiles(ratios(measured, cases[-1], cases[0]))
        advances = (quartiles(ratios(measured, each, _ADVANCE)) for each in cases)
        cells.append((name, *advances, growth, quartiles([each[cases[-1]] * 1e6 for each in measured])))
    headings = ("callbacks that are not due", *(f"{n:,}" for n in COUNTS), "1,000 / 1", "us, 1,000")
    return Table(f"Dispatching an update / one {_ADVANCE} ({_us(measured, _ADVANCE)} us)", headings, cells, notes)


def firing_table(rows: Mapping[str, Row], measured: list[dict[Any, float]]) -> Table:
    """Return the table of updates at which every callback is due."""
    cells = []
    for name in (each for each in rows if each != _BESIDE):
        cases = [Case(name, callbacks, firing=True) for callbacks in COUNTS]
        replaces = (quartiles([ratio / each.callbacks for ratio in ratios(measured, each, _REPLACE)]) for each in cases)
        cells.append((name, *replaces, quartiles([each[cases[-1]] * 1e6 for each in measured], 0)))
    headings = ("callbacks that fire", *(f"{n:,}" for n in COUNTS), "us, 1,000")
    return Table(f"A callback's share / one {_REPLACE} ({_us(measured, _REPLACE)} us)", headings, cells)


def _us(measured: list[dict[Any, float]], name: str) -> str:
    return quartiles([each[name] * 1e6 for each in measured])


@click.command(help=__doc__)
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(rounds: int, *, markdown: bool) -> None:
    """Measure and print the tables."""
    torch.set_num_threads(1)
    available, missing = available_rows({name: partial(row, [1]) for name, row in _ROWS.items()})
    rows = {name: _ROWS[name] for name in available}
    measured = measure(rows, rounds)
    show(idle_table(rows, measured, missing), firing_table(rows, measured), markdown=markdown)


if __name__ == "__main__":
    main()
