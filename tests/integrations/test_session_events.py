"""A session whose events a framework dispatches, here by hand."""

import io

import pytest
import torch
from reference import (
    LR,
    STILL,
    Recorder,
    batches,
    callbacks,
    group_batches,
    model,
    open_silent,
    optimizer,
    points,
    reference_run,
    run,
    weights,
)
from torch import nn

from noether import (
    AfterAccumulationStep,
    AfterUpdate,
    Run,
    SetSummary,
    TrainingIteration,
    TrainState,
    callback,
    compose,
    log,
    on,
)
from noether.config import load_callbacks
from noether.core.callbacks import DatasetStatsCallback, MetricCallback, OnlineLossCallback, TrainTimeCallback
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.session.evaluation import EvaluationData
from noether.session.optimizers import TorchOptimizer
from noether.session.session import Session
from noether.session.timing import Clock
from noether.testing import assert_same, effects_of

EPOCHS = 4


def new_session(network, adam, recorder, micro, steps, directory=None):
    updates = group_batches(micro, steps)
    samples = [sum(len(x) for x, _ in update) for update in updates]
    fixed = run(
        network,
        end=TrainingIteration(epoch=EPOCHS),
        updates_per_epoch=len(updates),
        samples_per_epoch=sum(samples),
        effective_batch_size=samples[0],
    )
    parts = {"run": fixed, "model": network, "optimizer": adam, "directory": directory, "interpreter": recorder}
    return Session(callbacks(), **parts, clock=STILL)


def one_update(session, network, adam, micro):
    """Accumulate as noether's step does, each loss weighted by its share of the samples."""
    adam.zero_grad()
    total = sum(len(x) for x, _ in micro)
    for x, y in micro:
        loss = nn.functional.cross_entropy(network(x), y)
        (loss * (len(x) / total) if len(x) < total else loss).backward()
        session.micro_batch({"ce": loss}, samples=len(x), of=len(micro))
    adam.step()
    session.update()


def train(session, network, adam, micro, steps, scheduler=None, until=10**9):
    """Continue from the position of the run, as the loop of a framework does."""
    updates = group_batches(micro, steps)
    while session.stop is None and session.state.iteration.epoch < EPOCHS:
        for update in updates[session.state.iteration.update % len(updates) :]:
            one_update(session, network, adam, update)
            if scheduler is not None:
                scheduler.step()
            if session.stop is not None or session.state.iteration.update >= until:
                break
        if session.state.iteration.update >= until:
            return
        session.end_epoch(cut_short=session.stop is not None)
    session.end()


@pytest.mark.parametrize("steps", [1, 2])
def test_events_and_weights_equal_those_of_the_trainer(steps):
    micro = batches(points(36), 8)  # the last of four samples
    expected, state = reference_run(micro, steps=steps, epoch=EPOCHS)
    network, recorder = model(), Recorder()
    adam = optimizer(network)
    session = new_session(network, adam, recorder, micro, steps)
    session.begin()
    train(session, network, adam, micro, steps)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(network), weights(state))
    assert_same(session.state.callback_states, state.callback_states)
    assert any(name == "AfterTraining" for name, *_ in recorder.lines)


@pytest.mark.parametrize("make", [
    lambda adam: torch.optim.lr_scheduler.LambdaLR(adam, lambda update: 1 / (1 + update)),
    lambda adam: torch.optim.lr_scheduler.StepLR(adam, step_size=3, gamma=0.5),
])  # fmt: skip
def test_a_scale_survives_the_schedulers_of_the_loop(make):
    micro = batches(points(36), 8)
    network, recorder = model(), Recorder()
    adam = optimizer(network)
    scheduler, session = make(adam), new_session(network, adam, recorder, micro, 2)
    reference = make(torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=LR))
    rates = []
    for _ in range(12):
        rates.append(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()
    session.begin()
    train(session, network, adam, micro, 2, scheduler=scheduler)
    expected, state = reference_run(micro, steps=2, lr=rates.__getitem__, epoch=EPOCHS)
    assert state.hyperparams["lr_scale"] < 1
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(network), weights(state))
    assert adam.param_groups[0]["lr"] == scheduler.get_last_lr()[0]  # the scheduler sees no scale


def round_trip(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("until", [1, 3, 4, 7, 8])
def test_a_frameworks_checkpoint_resumes_the_callbacks(until, tmp_path):
    micro = batches(points(36), 8)
    expected, state = reference_run(micro, steps=2, epoch=EPOCHS)
    network = model()
    adam = optimizer(network)
    with open_silent(tmp_path / "run") as directory:
        session = new_session(network, adam, Recorder(directory.interpreter), micro, 2, directory=directory)
        session.begin()
        train(session, network, adam, micro, 2, until=until)
        content = {"model": network.state_dict(), "adam": adam.state_dict(), "noether": session.state_dict()}
        content = round_trip(content)
        session.end_epoch(cut_short=True)
        one_update(session, network, adam, micro[:2])  # lost
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    network = model()
    adam = optimizer(network)
    with open_silent(tmp_path / "run") as directory:
        recorder = Recorder(directory.interpreter)
        session = new_session(network, adam, recorder, micro, 2, directory=directory)
        network.load_state_dict(content["model"])
        adam.load_state_dict(content["adam"])
        session.load_state_dict(content["noether"])
        session.begin()
        lines_at_resume = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert lines.startswith(lines_at_resume)
        assert len(lines_at_resume) < len(lines)
        train(session, network, adam, micro, 2)
    at = recorder.lines[0][1]
    assert_same(recorder.history, expected.after(at))
    assert_same(weights(network), weights(state))


@pytest.mark.parametrize(("until", "asynchronous"), [(1, False), (3, False), (4, True), (8, True)])
def test_a_checkpoint_of_noether_resumes_loop_and_callbacks(until, asynchronous, tmp_path):
    micro = batches(points(36), 8)
    expected, state = reference_run(micro, steps=2, epoch=EPOCHS)
    for end in (until, 10**9):
        network = model()
        adam = optimizer(network)
        with open_silent(tmp_path / "run", asynchronous=asynchronous) as directory:
            recorder = Recorder(directory.interpreter)
            session = new_session(network, adam, recorder, micro, 2, directory=directory)
            session.begin()
            train(session, network, adam, micro, 2, until=end)
    assert_same(recorder.history, expected.after(recorder.lines[0][1]))
    assert_same(weights(network), weights(state))


def test_a_checkpoint_inside_an_update_has_the_state_before_it():
    @callback("heard", init=lambda state: 0)
    @on(AfterAccumulationStep)
    def hear(state, event):
        return state.remember("heard", state.memory("heard") + 1), ()

    network = model()
    session = Session(hear, run=Run(), model=network, interpreter=Recorder())
    session.begin()
    before = session.state_dict()
    session.micro_batch({"ce": 1.0}, samples=4, of=2)
    assert session.state.memory("heard") == 1
    assert_same(session.state_dict(), before)
    session.begin()  # after an exception there
    assert (session.state.memory("heard"), session.pending_micro_batches) == (0, 0)


def test_what_a_callback_changes_is_written_into_the_model():
    returned = []

    @on(AfterUpdate)
    def halve(state, event):
        params = {name: p * 0.5 for name, p in state.params.items()}
        returned.extend(params.values())
        return state.replace(params=params), ()

    network = nn.Linear(2, 1)
    session = Session(halve, run=Run(), model=network, interpreter=Recorder())
    session.begin()
    before = weights(network)
    session.micro_batch({"mse": 0.0}, samples=1)
    session.update()
    assert_same(weights(network), {name: w * 0.5 for name, w in before.items()})
    assert session.state.params["weight"].data_ptr() == network.weight.data_ptr()  # the state views the model again
    assert all(p.data_ptr() != network.weight.data_ptr() for p in returned)


def test_an_update_without_a_loss_was_skipped():
    heard = []
    hear = on(AfterUpdate)(lambda state, event: (heard.append((event.skipped, event.samples)), (state, ()))[1])
    session = Session(hear, run=Run(), model=model(), interpreter=Recorder())
    session.begin()
    session.micro_batch({}, samples=4)
    session.update()
    assert heard == [(True, 4)]


def test_seconds_are_split_into_waiting_and_stepping():
    seconds = iter(range(100))
    network, recorder = model(), Recorder()
    clock = Clock(wall_s=lambda: 0.0, elapsed_s=lambda: float(next(seconds)))
    times = TrainTimeCallback(every_n_updates=1)
    session = Session(times, run=Run(), model=network, interpreter=recorder, clock=clock)
    session.begin()
    session.batch_arrived()
    session.micro_batch({"ce": 1.0}, samples=1)
    session.update()
    (effects,) = [effects for name, _, effects in recorder.lines if name == "AfterUpdate"]
    values = {key: float(value) for key, value in effects[0].values.items()}
    assert set(values.values()) == {1.0}


def test_evaluating_leaves_the_generator_as_it_was():
    data = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, shuffle=True)
    beside = EvaluationData(data, nn.Linear(1, 1), seed=0)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert len(list(beside)) == 4
    next(iter(beside))
    assert torch.equal(torch.rand(3), expected)


def test_a_step_that_raised_leaves_no_scale_behind():
    network = nn.Linear(1, 1)
    sgd = torch.optim.SGD(network.parameters(), lr=1.0)
    live = TorchOptimizer(network, sgd)
    live.watch()
    live.lr_scale = 0.5

    def closure():
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            sgd.step(closure)
    sgd.step()
    assert (sgd.param_groups[0]["lr"], live.readings["lr"]["default"], live.steps) == (1.0, 0.5, 1)
    again = TorchOptimizer(network, sgd)  # of a new run, which removes the hooks of the old one
    again.watch()
    again.lr_scale = 0.5
    sgd.step()
    assert (again.readings["lr"]["default"], live.steps, again.steps) == (0.5, 1, 1)
    again.release()
    sgd.step()
    assert again.steps == 1


def test_several_groups_have_their_names():
    network = nn.Linear(1, 1)
    groups = [{"params": [network.weight], "lr": 0.1, "name": "weights"}, {"params": [network.bias], "lr": 0.2}]
    live = TorchOptimizer(network, torch.optim.SGD(groups, lr=1.0))
    assert live.readings == {"lr": {"weights": 0.1, "1": 0.2}, "weight_decay": {"weights": 0.0, "1": 0.0}}


def test_refusals_name_the_fix(tmp_path):
    network = model()
    parts = {"model": network, "interpreter": Recorder()}
    with pytest.raises(ValueError, match=r"pass directory=noether.open_run"):
        Session(compose(), run=Run(), model=network)
    with pytest.raises(ValueError, match=r"2 parameters of the optimizer are not"):
        Session(compose(), run=Run(), optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()), **parts)
    metric = MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy")
    with pytest.raises(ValueError, match=r"iterates 'val', and the run has no data; pass data=\{'val': loader\}"):
        Session(metric, run=Run(), **parts)
    with pytest.raises(ValueError, match=r"no loss to evaluate it with: pass loss="):
        Session(metric, data={"val": []}, **parts)
    with pytest.raises(ValueError, match=r"iterates 'val', and the run has \['vals'\]; did you mean 'vals'"):
        Session(metric, run=run(network).replace(data={"vals": []}), **parts)
    session = Session(OnlineLossCallback(every_n_epochs=1), run=Run(updates_per_epoch=2), **parts)
    with pytest.raises(ValueError, match="update needs micro-batches"):
        session.update()
    with pytest.raises(ValueError, match="not a saved state"):
        session.load_state_dict({"epoch": 3})


def test_an_epoch_that_was_cut_short_is_not_counted_and_a_full_one_is():
    recorder = Recorder()
    session = Session(compose(), run=Run(updates_per_epoch=2), model=model(), interpreter=recorder)
    session.begin()
    for _ in range(2):
        session.micro_batch({"ce": 1.0}, samples=1)
        session.update()
    session.end_epoch(cut_short=True)
    session.micro_batch({"ce": 1.0}, samples=1)
    session.update()
    session.end_epoch(cut_short=True)
    session.end()
    session.end()
    names = [(name, at) for name, at, _ in recorder.lines]
    assert names == [
        ("BeforeTraining", "E0_U0_S0"), ("AfterUpdate", "E0_U1_S1"), ("AfterUpdate", "E0_U2_S2"),
        ("AfterEpoch", "E1_U2_S2"), ("AfterUpdate", "E1_U3_S3"), ("AfterTraining", "E1_U3_S3"),
    ]  # fmt: skip


def test_the_callbacks_of_a_yaml_file_do_what_they_do_in_python(tmp_path):
    (tmp_path / "callbacks.yaml").write_text("""
callbacks:
  - kind: noether.core.callbacks.OnlineLossCallback
    every_n_updates: 2
  - kind: noether.core.callbacks.MetricCallback
    every_n_epochs: 1
    dataset_key: val
    metric: accuracy
""")
    recorder = []
    written = compose(
        OnlineLossCallback(every_n_updates=2), MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy")
    )
    for reducer in (load_callbacks(tmp_path / "callbacks.yaml"), written):
        network = model()
        recorder.append(Recorder())
        session = Session(
            reducer, run=run(network, updates_per_epoch=2), model=network, interpreter=recorder[-1], clock=STILL
        )
        session.begin()
        for _ in range(2):
            session.micro_batch({"ce": 1.0}, samples=1)
            session.update()
        session.end()
    assert_same(recorder[0].lines, recorder[1].lines)
    assert len(recorder[0].lines[-2][2]) == 1


def test_the_lengths_of_datasets_are_those_of_samples():
    network = model()
    loader = torch.utils.data.DataLoader(torch.arange(7.0), batch_size=2)
    data = {"list": batches(points(20), 8), "loader": loader}
    session = Session(DatasetStatsCallback(), run=Run(data=data), model=network, interpreter=(recorder := Recorder()))
    session.begin()
    (effect,) = effects_of([line[2] for line in recorder.lines], SetSummary)
    assert dict(effect.values) == {"samples/list": 20, "samples/loader": 7}


def test_a_parameter_with_reassigned_data_is_seen():
    seen = []
    see = on(AfterUpdate)(lambda state, event: (seen.append(float(state.params["weight"])), (state, ()))[1])
    network = nn.Linear(1, 1)
    session = Session(see, run=Run(), model=network, interpreter=Recorder())
    session.begin()
    for value in (1.0, 2.0):
        network.weight.data = torch.full((1, 1), value)
        session.micro_batch({"ce": 1.0}, samples=1)
        session.update()
    assert seen == [1.0, 2.0]


def test_memory_of_every_kind_is_restored():
    state = TrainState(hyperparams={"lr_scale": 0.5}, seed=3)
    state = state.remember("tree", {"at": (1, 2.5, None), "nan": float("inf"), "t": torch.ones(2), "$x": {}})
    state, _ = log(state.advance(samples=4), AfterUpdate(samples=4), {"a": torch.tensor(1.0), "b": 2})
    state = state.next_epoch().request_stop("enough").replace(ended=True)
    assert_same(decode_state(round_trip(encode_state(state))), state)
