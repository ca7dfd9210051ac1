"""The panels of a Session at the start and at the end of its run, and the entries that it writes to the summary."""

import gc
import json
import math
import shlex
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import noether
from noether import AfterUpdate, Session, on, open_run
from noether.core.callbacks import (
    BestCheckpointCallback,
    EvaluateCallback,
    OnlineLossCallback,
)
from noether.session.timing import Clock

LOSSES = OnlineLossCallback(every_n_epochs=1)
BATCHES = [torch.ones(4, 2)] * 3


class Net(nn.Linear):
    """A model with a name."""


def make_session(directory, callbacks=(LOSSES,), **more):
    torch.manual_seed(0)
    model = Net(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"directory": directory, "model": model, "optimizer": optimizer, "max_epochs": 2}
    return Session(list(callbacks), **{**parts, **more}), model, optimizer


def train(directory, callbacks=(LOSSES,), *, reach=lambda update: None, batches=BATCHES, **more):
    """Train; `reach` is called before each update, and may raise or return True to leave the loop."""
    session, model, optimizer = make_session(directory, callbacks, **more)
    for batch in session.batches(batches):
        if reach(session.state.iteration.update):
            break
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.update(loss)


def fail_at(update, error):
    def reach(at):
        if at == update:
            raise error

    return reach


def read_summary(path):
    return json.loads((path / "summary.json").read_text())


@pytest.fixture
def panels(capsys):
    """Return a function that gives the facts of each panel that was printed since its last call."""

    def read():
        found = []
        for line in capsys.readouterr().out.splitlines():
            name, _, text = line.partition("  ")
            if name == "ending" or (name == "directory" and (not found or "directory" in found[-1])):
                found.append({})
            if found:
                found[-1][name] = text.strip()
        return found

    return read


def test_the_start_panel_has_model_data_device_optimizer_end_and_callbacks(tmp_path, panels):
    val = [torch.ones(5, 2)]
    with open_run(tmp_path / "run") as directory:
        train(directory, data={"val": val})
    start, _ = panels()
    assert {name: start[name] for name in list(start)[:7]} == {
        "directory": str(tmp_path / "run"),
        "model": "Net, 3 parameters",
        "data": "train 12 samples; val 5 samples",
        "device": "cpu, updates of 4 samples",
        "optimizer": "SGD, lr 0.1",
        "end": "2 epochs = 6 updates = 24 samples",
        "callbacks": "OnlineLossCallback every epoch",
    }


def test_the_end_panel_has_best_values_times_and_commands(tmp_path, panels):
    best = BestCheckpointCallback(every_n_epochs=1, metric_key="loss/online/total/E1")
    with open_run(tmp_path / "run") as directory:
        train(directory, [LOSSES, best])
    _, end = panels()
    path = str(tmp_path / "run")
    assert end["ending"] == "ended at E2_U6_S24"
    assert end["loss/online/total/E1"].split()[2:] == ["E2_U6_S24", "best_model.loss.online.total.E1"]
    assert end["training"].startswith("6 updates, 24 samples in ")
    assert {name: shlex.split(end[name]) for name in ("show", "report")} == {
        "show": ["noether", "show", path],
        "report": ["noether", "report", path],
    }
    assert not {"evaluate", "continue", "resume"} & end.keys()


ENDS = {
    "finished": (lambda at: None, "finished", "ended at E2_U6_S24"),
    "break": (lambda at: at == 4, "interrupted", "interrupted at E1_U4_S16"),
    "error": (fail_at(4, ValueError("mine")), "failed", "failed at E1_U4_S16: ValueError: mine"),
    "no text": (fail_at(4, ValueError()), "failed", "failed at E1_U4_S16: ValueError"),
    "ctrl-c": (fail_at(4, KeyboardInterrupt()), "interrupted", "interrupted at E1_U4_S16"),
    "exit": (fail_at(4, SystemExit(1)), "interrupted", "interrupted at E1_U4_S16"),
    "error at once": (fail_at(0, ValueError("mine")), "failed", "failed at E0_U0_S0: ValueError: mine"),
}


@pytest.mark.parametrize(("reach", "status", "ending"), ENDS.values(), ids=ENDS)
def test_summary_and_panel_name_how_the_loop_ended(tmp_path, panels, reach, status, ending):
    error = None
    try:
        with open_run(tmp_path / "run") as directory:
            train(directory, reach=reach)
    except BaseException as raised:  # noqa: BLE001  # KeyboardInterrupt too
        error = raised
    summary = read_summary(tmp_path / "run")
    (times,) = summary["phases"].values()
    _, end = panels()
    assert (summary["status"], summary["ending"], end["ending"]) == (status, ending, ending)
    assert times["updates"] == int(ending.partition("_U")[2].partition("_")[0])
    assert ("resume" in end) == (status in {"interrupted", "failed"} and times["updates"] > 0)
    if status == "failed":
        assert "ValueError" in (tmp_path / "run/traceback.txt").read_text()
        assert any("traceback.txt" in note for note in error.__notes__)
        if times["updates"]:
            assert end["saved"] == "checkpoint E1_U4_S16, which the pointer latest names"
        else:
            assert end["saved"] == "nothing: no update was completed"


def test_a_loop_whose_iterator_is_suspended_is_saved_where_its_run_is_closed(tmp_path, panels):
    with open_run(tmp_path / "run") as directory:
        session, model, optimizer = make_session(directory)
        batches = session.batches(BATCHES)
        for _ in range(2):
            loss = model(next(batches)).square().mean()
            loss.backward()
            optimizer.step()
            session.update(loss)
    _, end = panels()
    assert (end["ending"], end["saved"]) == (
        "interrupted at E0_U2_S8",
        "checkpoint E0_U2_S8, which the pointer latest names",
    )
    batches.close()


def test_the_time_of_callbacks_is_no_wait_for_data(tmp_path):
    seconds = [0.0]

    def save(effects, state, event):
        seconds[0] += 100.0

    heard = []
    hear = on(AfterUpdate)(lambda state, event: (heard.append(event.data_s), (state, ()))[1])
    model = Net(2, 1)
    session = Session(hear, interpreter=save, model=model, clock=Clock(elapsed_s=lambda: seconds[0]))
    session.begin()
    for _ in range(2):
        seconds[0] += 1.0
        session.batch_arrived()
        session.update({"a": 1.0}, samples=4)
        session.end_epoch()
    assert heard == [1.0, 1.0]


def test_an_error_leaving_the_run_is_recorded_although_the_iterator_is_still_open(tmp_path):
    """`bar = tqdm(session.batches(loader))` holds the iterator, so Python closes it only after the run."""
    kept = []
    with suppress(ValueError), open_run(tmp_path / "run") as directory:
        session, *_ = make_session(directory)
        kept.append(session.batches(BATCHES))
        next(kept[0])
        raise ValueError("mine")
    assert read_summary(tmp_path / "run")["ending"] == "failed at E0_U0_S0: ValueError: mine"
    kept[0].close()
    assert read_summary(tmp_path / "run")["status"] == "failed"


def test_an_error_after_the_end_does_not_change_how_the_run_ended(tmp_path, panels):
    with suppress(ValueError), open_run(tmp_path / "run") as directory:
        train(directory)
        raise ValueError("of something else")
    assert read_summary(tmp_path / "run")["status"] == "finished"
    assert [panel.get("ending") for panel in panels()] == [None, "ended at E2_U6_S24"]


def test_an_error_of_a_callback_before_training_is_a_failure(tmp_path):
    @noether.on(noether.BeforeTraining)
    def fail(state, event):
        raise ValueError("too early")

    with suppress(ValueError), open_run(tmp_path / "run") as directory:
        train(directory, [fail])
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["ending"]) == ("failed", "failed at E0_U0_S0: ValueError: too early")


@pytest.mark.parametrize("is_entered", [True, False], ids=["with", "without"])
def test_the_panel_of_the_end_waits_for_the_end_of_the_block(tmp_path, capsys, is_entered):
    directory = open_run(tmp_path / "run")
    with directory if is_entered else nullcontext():
        train(directory)
        assert ("ending " in capsys.readouterr().out) == (not is_entered)
    assert ("ending " in capsys.readouterr().out) == is_entered
    directory.close()
    assert capsys.readouterr().out == ""


def test_each_of_two_loops_in_one_run_has_its_panels_once(tmp_path, panels):
    with open_run(tmp_path / "run") as directory:
        train(directory, reach=lambda at: at == 4)
        train(directory)
        train(directory)  # nothing is left to train
    first, left, second, end = panels()
    assert (left["ending"], end["ending"]) == ("interrupted at E1_U4_S16", "ended at E2_U6_S24")
    assert "begins at" not in first
    assert second["begins at"] == "E1_U4_S16, 67 % of the run"
    summary = read_summary(tmp_path / "run")
    assert list(summary["phases"]) == list(summary["processes"]) == ["E0_U0_S0", "E1_U4_S16"]
    assert [times["updates"] for times in summary["phases"].values()] == [4, 2]


def test_a_session_without_a_run_prints_nothing(panels):
    train(None, interpreter=lambda effects, state, event: None)
    assert panels() == []


def test_an_error_in_a_panel_does_not_end_the_run(tmp_path, panels, monkeypatch, caplog):
    def fail(*_, **__):
        raise ValueError("no panel")

    monkeypatch.setattr("noether.session.events.describe_start", fail)
    with open_run(tmp_path / "run") as directory:
        train(directory)
    assert len(panels()) == 1
    assert "panel failed and may have lost log entries; training continues: ValueError: no panel" in caplog.text


def test_an_open_run_does_not_keep_its_session_alive(tmp_path):
    with open_run(tmp_path / "run") as directory:
        session, *_ = make_session(directory)
        session.begin()
        reference = weakref.ref(session)
        del session
        gc.collect()
        assert reference() is None


class Time:
    """A clock that a test moves."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


SECONDS = st.integers(0, 50).map(float)


@settings(max_examples=5, deadline=None)  # each example trains a run
@given(data_s=SECONDS, step_s=SECONDS, evaluation_s=SECONDS, is_list=st.booleans())
def test_the_phases_are_the_sums_over_the_updates(tmp_path_factory, data_s, step_s, evaluation_s, is_list):
    time, path = Time(), tmp_path_factory.mktemp("run")

    class Slow:
        def __init__(self, seconds):
            self.seconds = seconds

        def __iter__(self):
            for batch in BATCHES:
                time.now_s += self.seconds
                yield batch

        def __len__(self):
            return len(BATCHES)

    def loss(outputs, batch):
        time.now_s += evaluation_s
        return outputs.square().mean()

    evaluate = EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss",))
    val = BATCHES if is_list else Slow(0.0)
    with open_run(path) as directory:
        clock = Clock(wall_s=time, elapsed_s=time)

        def step(_):
            time.now_s += step_s

        train(directory, [evaluate], reach=step, batches=Slow(data_s), data={"val": val}, loss=loss, clock=clock)
    (times,) = read_summary(path)["phases"].values()
    found = {name: times[name] for name in ("updates", "data_s", "step_s", "evaluation_s")}
    assert found == {"updates": 6, "data_s": 6 * data_s, "step_s": 6 * step_s, "evaluation_s": 6 * evaluation_s}
    assert math.isclose(times["total_s"], 6 * (data_s + step_s + evaluation_s))
