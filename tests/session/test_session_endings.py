"""Every way in which the loop of a session can end: what is saved, and that the resumed run equals the uncut one."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples
from plain_loop import SCHEDULERS, Loop, Points
from torch.utils.data import DataLoader

import noether
from noether.testing import assert_same

ROOT = Path(__file__).parents[2]
UPDATES = 12  # two epochs of six batches, or four of three updates of two
RARE = noether.CheckpointCallback(every_n_updates=100, save_weights=True, save_optim=True)


class Fault:
    """Raises an exception, once, when the loop reaches a place in an update."""

    def __init__(self, place, update, error):
        self.place, self.update, self.error = place, update, error

    def __call__(self, place, update):
        if (place, update) == (self.place, self.update):
            self.update = None
            raise self.error(f"at {place} of update {update}")


@dataclass(frozen=True)
class Ring(noether.Effect):
    update: int


class Process:
    """Counts of one process, not of its datasets: a session warns of attributes of a dataset that change."""

    fault = None
    reads = 0
    evaluated = 0
    accumulation = 1


class TrainPoints(Points):
    """Training data that reaches the place `data` of the fault; the samples that were read give the update."""

    def __getitem__(self, index):
        epoch, read = divmod(Process.reads, len(self))
        Process.reads += 1
        Process.fault("data", (epoch * 6 + read // 4) // Process.accumulation + 1)
        return super().__getitem__(index)


class EvaluationPoints(Points):
    """Evaluation data that reaches the place `evaluation` of the fault; each update has one evaluation."""

    def __getitem__(self, index):
        Process.evaluated += 1
        Process.fault("evaluation", (Process.evaluated - 1) // len(self) + 1)
        return super().__getitem__(index)


def callbacks(fault):
    """Return callbacks that remember, log and evaluate, with callbacks between them that reach places of the fault."""

    def reach(place, event_type):
        return noether.on(event_type)(lambda state, event: (fault(place, at(state, event)), (state, ()))[1])

    def at(state, event):
        return state.iteration.update + isinstance(event, noether.AfterAccumulationStep)

    @noether.on(noether.AfterUpdate)
    def ring(state, event):
        return state, (Ring(state.iteration.update),)

    @noether.callback("count", init=lambda state: 0, produces=("count",))
    @noether.on(noether.AfterUpdate)
    def count(state, event):
        state = state.remember("count", state.memory("count") + event.samples)
        return noether.log(state, event, {"count": state.memory("count")})

    return [
        count,
        reach("first callback", noether.AfterUpdate),
        noether.OnlineLossCallback(every_n_updates=2),
        noether.OnlineLossCallback(every_n_epochs=1),
        noether.EMACallback(every_n_epochs=1, target_factors=(0.9,)),
        reach("micro-batch", noether.AfterAccumulationStep),
        reach("epoch", noether.AfterEpoch),
        noether.EvaluateCallback(every_n_updates=1, dataset_key="val", measures=("loss", "accuracy")),
        ring,
        noether.FixedUpdateEarlyStopping(stop_at_update=UPDATES),
        RARE,
        reach("last callback", noether.AfterUpdate),
        reach("end of training", noether.AfterTraining),
    ]


def make_loop(path, fault, scheduler, accumulation):
    loop = Loop(path, callbacks(fault), scheduler, accumulation)
    loop.settings = {"max_epochs": 2 * accumulation}
    loop.val = DataLoader(EvaluationPoints(10, 2), batch_size=4)
    loop.reach = fault

    def start():
        Process.fault, Process.accumulation, Process.reads, Process.evaluated = fault, accumulation, 0, 0
        return DataLoader(TrainPoints(22, 1), batch_size=4, shuffle=True)

    loop.loader = start
    loop.handlers = (Ring, lambda effect, state, event: fault("handler", effect.update))
    return loop


def expected_checkpoint(place, update, accumulation):
    """Return updates and epochs of the state that has to be saved, and whether its event is pending."""
    per_epoch = 6 // accumulation
    if place in {"first callback", "last callback", "handler", "evaluation"}:
        return update, (update - 1) // per_epoch, True
    if place in {"epoch", "end of training"}:
        return update, update // per_epoch - (place == "epoch"), False
    begins_epoch = (update - 1) % per_epoch == 0
    if place == "data" and accumulation > 1 and not begins_epoch:  # read before the loop trains on the previous batch
        return update - 2, (update - 2) // per_epoch, False
    return update - 1, (update - 1) // per_epoch, False


PLACES = ("data", "forward", "backward", "micro-batch", "first callback", "last callback", "handler", "evaluation",
          "epoch", "end of training")  # fmt: skip


def test_each_place_is_reached(tmp_path):
    places = set()
    make_loop(tmp_path / "run", lambda place, update: places.add(place), "one-cycle", 2).train()
    assert places == {*PLACES, "stepped"}


@examples(25, quick=8)
@given(
    place=st.sampled_from(PLACES),
    update=st.integers(2, UPDATES),
    error=st.sampled_from([OSError, MemoryError, KeyboardInterrupt, SystemExit]),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    accumulation=st.sampled_from([1, 2]),
)
def test_the_last_settled_state_is_saved_and_the_resumed_run_equals_the_uncut_one(
    tmp_path_factory, place, update, error, scheduler, accumulation
):
    path = tmp_path_factory.mktemp("runs")
    if place == "data":
        update = max(update, 3)  # earlier, prefetching would fail before the first update
    if place == "epoch":
        update = 6 // accumulation
    if place == "end of training":
        update = UPDATES
    fault = Fault(place, update, error)
    whole, cut = (
        make_loop(path / name, each, scheduler, accumulation)
        for name, each in (("whole", lambda place, update: None), ("cut", fault))
    )
    whole.train()
    with pytest.raises(error) as raised:
        cut.train()
    with noether.open_run(cut.path) as directory:
        saved = directory.load()
    updates, epochs, is_pending = expected_checkpoint(place, update, accumulation)
    assert (saved.iteration.update, saved.iteration.epoch) == (updates, epochs)
    assert (saved.pending is not None) == is_pending
    if issubclass(error, Exception) and place not in {"forward", "backward"}:
        assert any("is saved in" in note for note in raised.value.__notes__)
        assert f"at {place} of update {update}" in (cut.path / "traceback.txt").read_text()
    cut.train()
    assert_same(cut.result(), whole.result())
    assert cut.log == whole.log


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_step_of_the_optimizer_that_the_loop_did_not_report_is_lost(tmp_path, caplog, error):
    cut, whole = (make_loop(tmp_path / name, Fault("stepped", 3, error), "one-cycle", 1) for name in ("cut", "whole"))
    whole.reach.update = None
    with pytest.raises(error):
        cut.train()
    assert "between two states that can be resumed, before update 3 was complete" in caplog.text
    cut.train()
    whole.train()
    assert_same(cut.result(), whole.result())


@pytest.mark.parametrize("ending", [[], [noether.FixedUpdateEarlyStopping(stop_at_update=7)]])
def test_the_end_is_saved_where_no_callback_saves_it(tmp_path, caplog, ending):
    loop = Loop(tmp_path / "run", [noether.OnlineLossCallback(every_n_epochs=1), *ending])
    loop.train()
    end = loop.result()
    (saved,) = (path.name for path in (loop.path / "checkpoints").iterdir() if path.is_dir())
    assert saved == f"{end['iteration']}.end"
    assert not caplog.records
    loop.train()
    assert_same(loop.result(), end)
    assert f"the run has ended at {end['iteration']}" in caplog.text
    assert [path.name for path in (loop.path / "checkpoints").iterdir() if path.is_dir()] == [saved]


def test_an_end_that_a_callback_saved_is_not_saved_again(tmp_path):
    loop = Loop(tmp_path / "run", [noether.CheckpointCallback(every_n_epochs=1, save_weights=True, save_optim=True)])
    loop.train()
    assert not list((loop.path / "checkpoints").glob("*.end"))


def test_a_stopped_run_continues_if_the_loop_asks_for_it(tmp_path, caplog):
    stop = noether.FixedUpdateEarlyStopping(stop_at_update=7)
    cut, whole = Loop(tmp_path / "cut", [stop]), Loop(tmp_path / "whole", [])
    cut.train()
    cut.callbacks = []
    cut.train()
    assert "call session.batches(loader, continue_stopped=True)" in caplog.text
    assert cut.session.state.iteration.update == 7
    cut.batches_settings = {"continue_stopped": True}
    cut.train()
    whole.train()
    assert_same(cut.result(), whole.result())


STOP = noether.FixedUpdateEarlyStopping(stop_at_update=7)


@noether.on(noether.AfterUpdate)
def fail_at_7(state, event):
    if state.iteration.update == 7:
        raise ValueError("at 7")
    return state, ()


@pytest.mark.parametrize(
    ("callbacks", "reach", "status", "ending"),
    [
        ([], None, "finished", "ended at E3_U18_S66"),
        ([STOP], None, "stopped", "ended at E1_U7_S26: stop_at_update: 7 is reached"),
        ([fail_at_7], None, "failed", "failed at E1_U7_S26: ValueError: at 7"),
        ([], KeyboardInterrupt, "interrupted", "interrupted at E1_U6_S22"),
    ],
)
def test_the_summary_says_how_a_session_ends(tmp_path, callbacks, reach, status, ending):
    loop = Loop(tmp_path / "run", callbacks)
    if reach is not None:
        loop.reach = Fault("backward", 7, reach)
    with suppress(ValueError, KeyboardInterrupt):
        loop.train()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["ending"]) == (status, ending)


SCRIPT = """
import sys
import torch
import noether
from noether.session.timing import Clock
model = torch.nn.Linear(2, 1)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
callbacks = [noether.LrCallback(every_n_updates=1), noether.OnlineLossCallback(every_n_updates=50)]
still = Clock(wall_s=lambda: 0.0, elapsed_s=lambda: 0.0)  # so that all updates are deferred
directory = noether.open_run(sys.argv[1], asynchronous=ASYNCHRONOUS)
parts = {"directory": directory, "model": model, "optimizer": sgd, "clock": still}
session = noether.Session(callbacks, max_epochs=9, **parts)
batches = session.batches([torch.ones(4, 2)] * 3)  # a name keeps it, so it ends only with the process
for count, batch in enumerate(batches, 1):
    loss = model(batch).square().mean()
    sgd.zero_grad(); loss.backward(); sgd.step()
    session.update(loss)
    if count == 5:
        ENDING
"""


@pytest.mark.parametrize(
    ("ending", "code", "asynchronous"),
    [("break", 0, False), ("raise ValueError", 1, False), ("sys.exit(3)", 3, False), ("break", 0, True)],
)
def test_a_process_that_ends_without_closing_its_run_saves_it(tmp_path, ending, code, asynchronous):
    path = tmp_path / "run"
    script = SCRIPT.replace("ENDING", ending).replace("ASYNCHRONOUS", repr(asynchronous))
    command = [sys.executable, "-c", script, path]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert process.returncode == code, process.stderr
    assert [json.loads(line)["update"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [*range(1, 6)]
    assert json.loads((path / "summary.json").read_text())["status"] == "interrupted"
    with noether.open_run(path) as directory:
        assert directory.load().iteration.update == 5
