"""What does an update cost that is told to many callbacks, when nothing is due and when all are?

Run as `python -m benchmarks.dispatch`. Each row tells one update to 1, 10, 100 and 1,000 callbacks that do nothing, the
way its library does that after each update: an event of Ignite's engine, the function with which Lightning's loop calls
its hooks, Keras's `CallbackList.on_train_batch_end`, CLU's periodic actions one after the other. Idle ones have
intervals that no update here reaches; where the library has no intervals, the callback asks for the remainder itself,
as its users write it. Firing ones are due at every update.

The unit of the idle rows is one `state.advance`, which every update of noether makes anyway; that of the firing rows,
taken for each of the callbacks, is one `dataclasses.replace` of the state. All rows take turns in one process; a ratio
is taken within each round, and the tables show medians over rounds with quartiles.

Goals: an idle update takes the same time for 1 and for 1,000 callbacks, within 10 %, and at most half of an advance;
firing a callback takes at most two replaces, its own work aside.

Both are met: 0.23 of an advance, for 1 callback as for 1,000, and 0.3 to 0.4 replaces. Beside one that is due at every
update, those that are not are skipped as well.
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

from benchmarks.measuring import Table, installed, markdown_option, often, quartiles, ratios, show, take_turns
from noether import AfterUpdate, TrainState, compose
from noether.core.callbacks.periodic import PeriodicCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Tell = Callable[[], object]  # tells one update
    Row = Callable[[Sequence[int]], Tell]  # from the intervals of the callbacks

COUNTS = (1, 10, 100, 1000)
NEVER = 10**9
_ADVANCE, _REPLACE = "state.advance", "dataclasses.replace"


class Nothing(PeriodicCallback):
    """Does nothing when it is due."""

    def periodic_callback(self, state: TrainState, event: Any, interval: Any) -> tuple[TrainState, tuple[()]]:  # noqa: ARG002  # a hook
        """Return the state as it is."""
        return state, ()


def noether(intervals: Sequence[int]) -> Tell:
    """Tell an update to periodic callbacks."""
    reducer = compose(*(Nothing(every_n_updates=n, id=str(index)) for index, n in enumerate(intervals)))
    return partial(reducer, TrainState().advance(samples=64), AfterUpdate(samples=64))


def ignite(intervals: Sequence[int]) -> Tell:
    """Fire an event of an engine with filtered handlers."""
    from ignite.engine import Engine, Events

    engine = Engine(lambda engine, batch: None)  # noqa: ARG005  # what an engine calls
    engine.state.iteration = 1
    for n in intervals:
        event = Events.ITERATION_COMPLETED(every=n) if n > 1 else Events.ITERATION_COMPLETED
        engine.add_event_handler(event, lambda: None)
    return partial(engine.fire_event, Events.ITERATION_COMPLETED)


def lightning(intervals: Sequence[int]) -> Tell:
    """Call the hook of callbacks of a trainer, through the function with which its loop does."""
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


def keras(intervals: Sequence[int]) -> Tell:
    """Call the hook of a list of callbacks."""
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


def clu(intervals: Sequence[int]) -> Tell:
    """Call periodic actions one after the other, as a loop of its users does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it imports TensorFlow
    from clu.periodic_actions import PeriodicCallback as Action

    actions = [Action(every_steps=n, callback_fn=lambda step, t: None) for n in intervals]  # noqa: ARG005  # a hook
    steps = count(1)

    def tell() -> None:
        step = next(steps)
        for action in actions:
            action(step)

    return tell


_BESIDE = "noether, beside one that is due"
_ROWS: Mapping[str, Row] = {
    "noether": noether,
    _BESIDE: lambda intervals: noether([1, *intervals]),
    "Ignite": ignite,
    "Lightning": lightning,
    "Keras": keras,
    "CLU": clu,
}


class Told(NamedTuple):
    """What one row does: for how many callbacks, and whether they fire."""

    name: str
    callbacks: int
    firing: bool


def measure(rows: Mapping[str, Row], rounds: int) -> list[dict[Any, float]]:
    """Return the seconds of a call of each row, and of the two units, in each round."""
    state = TrainState().advance(samples=64)
    turns: dict[Any, Callable[[], float]] = {
        _ADVANCE: often(partial(state.advance, samples=64)),
        _REPLACE: often(partial(dataclasses.replace, state)),
    }
    for name, row in rows.items():
        for callbacks in COUNTS:
            idle = [NEVER + index for index in range(callbacks)]
            turns[Told(name, callbacks, firing=False)] = often(row(idle))
            turns[Told(name, callbacks, firing=True)] = often(row([1] * callbacks))
    return take_turns(turns, rounds)


def idle_table(rows: Mapping[str, Row], found: list[dict[Any, float]], notes: Sequence[str]) -> Table:
    """Return the table of updates at which nothing is due."""
    cells = []
    for name in rows:
        told = [Told(name, callbacks, firing=False) for callbacks in COUNTS]
        growth = quartiles(ratios(found, told[-1], told[0]))
        advances = (quartiles(ratios(found, each, _ADVANCE)) for each in told)
        cells.append((name, *advances, growth, quartiles([each[told[-1]] * 1e6 for each in found])))
    headings = ("callbacks that are not due", *(f"{n:,}" for n in COUNTS), "1,000 / 1", "us, 1,000")
    return Table(f"Telling an update / one {_ADVANCE} ({_us(found, _ADVANCE)} us)", headings, cells, notes)


def firing_table(rows: Mapping[str, Row], found: list[dict[Any, float]]) -> Table:
    """Return the table of updates at which every callback is due."""
    cells = []
    for name in (each for each in rows if each != _BESIDE):
        told = [Told(name, callbacks, firing=True) for callbacks in COUNTS]
        replaces = (quartiles([ratio / each.callbacks for ratio in ratios(found, each, _REPLACE)]) for each in told)
        cells.append((name, *replaces, quartiles([each[told[-1]] * 1e6 for each in found], 0)))
    headings = ("callbacks that fire", *(f"{n:,}" for n in COUNTS), "us, 1,000")
    return Table(f"A callback's share / one {_REPLACE} ({_us(found, _REPLACE)} us)", headings, cells)


def _us(found: list[dict[Any, float]], name: str) -> str:
    return quartiles([each[name] * 1e6 for each in found])


@click.command(help=__doc__)
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(rounds: int, *, markdown: bool) -> None:
    """Measure and print the tables."""
    torch.set_num_threads(1)
    found, missing = installed({name: partial(row, [1]) for name, row in _ROWS.items()})
    rows = {name: _ROWS[name] for name in found}
    measured = measure(rows, rounds)
    show(idle_table(rows, measured, missing), firing_table(rows, measured), markdown=markdown)


if __name__ == "__main__":
    main()
