"""noether's callbacks on engines of pytorch-ignite, beside noether's own trainer on the same batches."""

import json
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from ignite.engine import DeterministicEngine, Engine, Events, supervised_training_step
from ignite.handlers import Checkpoint, DiskSaver, LRScheduler
from reference import (
    LR,
    STILL,
    Recorder,
    batches,
    callbacks,
    model,
    open_silent,
    optimizer,
    points,
    reference_run,
    run,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader

from noether import AfterEpoch, AfterUpdate, Run, compose, on
from noether.core.callbacks import CheckpointCallback, FixedUpdateEarlyStopping, OnlineLossCallback
from noether.integrations.ignite import attach
from noether.testing import assert_same

EPOCHS = 4


def accumulating_step(network, adam, steps, length):
    """Return a step that weights losses by samples as noether does, and steps at the last batch of an epoch."""
    sizes = []

    def step(engine, batch):
        x, y = batch
        if not sizes:
            adam.zero_grad()
        sizes.append(len(x))
        value = nn.functional.cross_entropy(network(x), y)
        total = 16 if steps == 2 and len(x) == 8 and (engine.state.iteration - 1) % length < length - 1 else len(x)
        (value * (len(x) / total) if len(x) < total else value).backward()
        place = (engine.state.iteration - 1) % length + 1
        if place % steps == 0 or place == length:
            sizes.clear()
            adam.step()
        return {"ce": value}

    return step


def make_engine(network, adam, recorder, steps=1, length=5, *, reducer=None, kind=Engine, directory=None):
    engine = kind(accumulating_step(network, adam, steps, length))
    live = attach(
        engine,
        reducer or callbacks(),
        model=network,
        optimizer=adam,
        accumulation=steps,
        losses=lambda outputs: outputs,
        run=run(network),
        directory=directory,
        interpreter=recorder,
        clock=STILL,
    )
    return engine, live


@pytest.mark.parametrize("steps", [1, 2])
def test_events_and_weights_equal_those_of_the_trainer(steps):
    micro = batches(points(36), 8)  # five, the last of four samples: the last update has one micro-batch
    expected, state = reference_run(micro, steps=steps, epoch=EPOCHS)
    network, recorder = model(), Recorder()
    engine, live = make_engine(network, optimizer(network), recorder, steps)
    engine.run(micro, max_epochs=EPOCHS)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(network), weights(state))
    assert_same(live.state.callback_states, state.callback_states)
    assert state.hyperparams["lr_scale"] < 1


def test_the_supervised_step_of_ignite_equals_the_trainer():
    samples = points(36)
    expected, state = reference_run(batches(samples, 8), epoch=EPOCHS)
    network, recorder = model(), Recorder()
    adam = optimizer(network)
    engine = Engine(
        supervised_training_step(network, adam, nn.functional.cross_entropy, output_transform=lambda *o: o[3])
    )
    given = {"model": network, "optimizer": adam, "run": run(network), "interpreter": recorder, "clock": STILL}
    attach(engine, callbacks(), losses=lambda output: {"ce": output}, **given)
    engine.run(DataLoader(samples, batch_size=8), max_epochs=EPOCHS)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(network), weights(state))


def test_the_accumulation_of_ignite_makes_updates_of_micro_batches():
    heard = []
    hear = on(AfterUpdate)(lambda state, event: (heard.append((event.samples, event.accumulated)), (state, ()))[1])
    network = model()
    adam = optimizer(network)
    step = supervised_training_step(network, adam, nn.functional.cross_entropy, gradient_accumulation_steps=2)
    engine = Engine(step)
    attach(engine, hear, model=network, optimizer=adam, accumulation=2, interpreter=Recorder())
    engine.run(batches(points(28), 8), max_epochs=1)
    assert heard == [(16, (8, 8)), (12, (8, 4))]


@pytest.mark.parametrize("cut", [None, 1, 2, 3, 4, 5])
def test_an_update_may_begin_in_one_epoch_and_end_in_the_next(cut, tmp_path, caplog):
    samples = batches(points(40), 8)

    def train(path, cut=None):
        seen = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = model()
        adam = optimizer(network)
        step = supervised_training_step(network, adam, nn.functional.cross_entropy, gradient_accumulation_steps=2)
        engine = DeterministicEngine(step)
        with open_silent(path) as directory:

            def interpret(effects, state, event):
                seen.append((type(event), str(state.iteration)))
                directory.interpreter(effects, state, event)

            parts = {"model": network, "optimizer": adam, "accumulation": 2, "clock": STILL}
            save = CheckpointCallback(every_n_updates=1, save_weights=True, save_optim=True)
            live = attach(engine, save, directory=directory, interpreter=interpret, **parts)

            def leave(engine):
                if live.state.iteration.update == cut:
                    raise CutError

            engine.add_event_handler(Events.ITERATION_COMPLETED, leave)
            with suppress(CutError):
                engine.run(samples, max_epochs=2)
        return network, seen, engine.state.iteration

    whole, seen, iterations = train(tmp_path / "whole")
    assert iterations == 10
    assert [at for kind, at in seen if kind is AfterUpdate] == [
        "E0_U1_S16", "E0_U2_S32", "E1_U3_S48", "E1_U4_S64", "E1_U5_S80",
    ]  # fmt: skip
    assert [at for kind, at in seen if kind is AfterEpoch] == ["E1_U2_S32", "E2_U5_S80"]
    assert "epoch 0 ended inside of an update" in caplog.text
    if cut is not None:
        train(tmp_path / "cut", cut)
        resumed, later, iterations = train(tmp_path / "cut")
        assert iterations == 10
        assert later[-1] == seen[-1]
        assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize(("output", "message"), [
    ((0.5, 0.25), "returned a tuple, .* pass losses="), ({"ce": 0.5}, r"a mapping with \['ce'\], .* pass losses="),
    (None, "returned nothing, and callbacks need its loss"),
])  # fmt: skip
def test_losses_that_cannot_be_found_are_refused_with_the_fix(output, message):
    network = model()
    engine = Engine(lambda engine, batch: output)
    attach(engine, compose(), model=network, optimizer=optimizer(network), interpreter=Recorder())
    with pytest.raises(TypeError, match=message):
        engine.run(batches(points(8), 8))


def test_a_step_that_a_gradient_scaler_skipped_is_a_skipped_update():
    heard = []
    hear = on(AfterUpdate)(lambda state, event: (heard.append((event.skipped, event.samples)), (state, ()))[1])
    network = model()
    adam = optimizer(network)

    def step(engine, batch):
        if engine.state.iteration not in {3, 4}:  # an infinite gradient
            adam.step()
        return 1.0

    engine = Engine(step)
    attach(engine, hear, model=network, optimizer=adam, interpreter=Recorder())
    engine.run(batches(points(36), 8))
    assert heard == [(False, 8), (False, 8), (True, 8), (True, 8), (False, 4)]


@pytest.mark.parametrize("stop", [{"stop_at_epoch": 2}, {"stop_at_update": 7}, {"stop_at_update": 10}])
def test_a_stop_ends_the_engine_where_it_ends_the_trainer(stop, tmp_path):
    micro = batches(points(36), 8)
    stopping = callbacks(FixedUpdateEarlyStopping(**stop))
    expected, state = reference_run(micro, reducer=stopping, epoch=EPOCHS)
    network = model()
    adam = optimizer(network)
    with open_silent(tmp_path / "run") as directory:
        recorder = Recorder(directory.interpreter)
        engine, _ = make_engine(network, adam, recorder, reducer=stopping, directory=directory)
        engine.run(micro, max_epochs=EPOCHS)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(network), weights(state))
    with open_silent(tmp_path / "run") as directory:  # and a run that stopped stays stopped
        recorder = Recorder(directory.interpreter)
        engine, _ = make_engine(network, adam, recorder, reducer=stopping, directory=directory)
        engine.run(micro, max_epochs=EPOCHS)
    assert [name for name, *_ in recorder.lines] == ["BeforeTraining"]
    assert_same(weights(network), weights(state))


@pytest.mark.parametrize("end", [{"max_iters": 7}, {"max_iters": 10}])
def test_an_end_in_iterations_is_one_in_updates(end):
    micro = batches(points(36), 8)
    expected, state = reference_run(micro, update=end["max_iters"])
    network, recorder = model(), Recorder()
    engine, _ = make_engine(network, optimizer(network), recorder)
    engine.run(micro, **end)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(network), weights(state))


def test_a_scale_survives_the_engines_schedulers():
    micro = batches(points(36), 8)
    expected, state = reference_run(micro, lr=lambda update: LR * (1 / (1 + update)), epoch=EPOCHS)
    network, recorder = model(), Recorder()
    adam = optimizer(network)
    engine, _ = make_engine(network, adam, recorder)
    scheduler = LRScheduler(torch.optim.lr_scheduler.LambdaLR(adam, lambda update: 1 / (1 + update)))
    engine.add_event_handler(Events.ITERATION_STARTED, scheduler)
    engine.run(micro, max_epochs=EPOCHS)
    assert state.hyperparams["lr_scale"] < 1
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(network), weights(state))


class CutError(Exception):
    """Stands for the end of the process."""


def raise_at(iteration):
    def cut(engine):
        if engine.state.iteration == iteration:
            raise CutError("gone")

    return cut


@pytest.mark.parametrize(("steps", "iteration", "kind"), [
    (1, 5, Engine), (1, 10, Engine), (2, 10, Engine), (1, 7, DeterministicEngine), (2, 7, DeterministicEngine),
    (2, 10, DeterministicEngine),
])  # fmt: skip
def test_ignites_own_checkpoints_resume_the_callbacks(steps, iteration, kind, tmp_path):
    micro = batches(points(36), 8)
    expected, state = reference_run(micro, steps=steps, epoch=EPOCHS)
    network, recorder = model(), Recorder()
    adam = optimizer(network)
    engine, live = make_engine(network, adam, recorder, steps, kind=kind)
    saved = {"engine": engine, "model": network, "adam": adam, "noether": live}
    saver = DiskSaver(str(tmp_path), create_dir=True)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=iteration), Checkpoint(saved, saver))
    engine.add_event_handler(Events.ITERATION_STARTED, raise_at(iteration + 2))
    with pytest.raises(CutError):
        engine.run(micro, max_epochs=EPOCHS)

    network, recorder = model(), Recorder()
    adam = optimizer(network)
    engine, live = make_engine(network, adam, recorder, steps, kind=kind)
    saved = {"engine": engine, "model": network, "adam": adam, "noether": live}
    (path,) = tmp_path.glob("*.pt")
    content = torch.load(path, weights_only=kind is Engine)  # a DeterministicEngine's own state is no plain value
    Checkpoint.load_objects(saved, content)
    engine.run(micro, max_epochs=EPOCHS)
    at = content["noether"]["state"]["iteration"]
    assert_same(recorder.history, expected.after(at))
    assert_same(weights(network), weights(state))


@pytest.mark.parametrize(("steps", "iteration", "kind"), [
    (1, 5, Engine), (1, 12, DeterministicEngine), (2, 7, DeterministicEngine), (2, 10, DeterministicEngine),
])  # fmt: skip
def test_noethers_checkpoints_resume_engine_and_callbacks(steps, iteration, kind, tmp_path):
    micro = batches(points(36), 8)
    expected, state = reference_run(micro, steps=steps, epoch=EPOCHS)
    for attempt in range(2):
        network = model()
        adam = optimizer(network)
        with open_silent(tmp_path / "run") as directory:
            recorder = Recorder(directory.interpreter)
            engine, _ = make_engine(network, adam, recorder, steps, kind=kind, directory=directory)
            if attempt == 0:
                engine.add_event_handler(Events.ITERATION_STARTED, raise_at(iteration + 1))
                with pytest.raises(CutError):
                    engine.run(micro, max_epochs=EPOCHS)
            else:
                engine.run(micro, max_epochs=EPOCHS)
    assert recorder.lines[0][1] != "E0_U0_S0"
    assert_same(recorder.history, expected.after(recorder.lines[0][1]))
    assert_same(weights(network), weights(state))


def make_scheduled_engine(network, directory, recorder, *, given=True, of_ignite=False, cut=0):
    adam = optimizer(network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda update: 1 / (1 + update))
    engine = Engine(accumulating_step(network, adam, 1, 5))
    if of_ignite:
        scheduler = LRScheduler(scheduler)
        engine.add_event_handler(Events.ITERATION_STARTED, scheduler)
    else:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: scheduler.step())
    settings = {"run": run(network), "directory": directory, "interpreter": recorder, "clock": STILL}
    settings |= {"scheduler": scheduler if given else None, "losses": lambda outputs: outputs}
    attach(engine, callbacks(), model=network, optimizer=adam, **settings)
    engine.add_event_handler(Events.ITERATION_STARTED, raise_at(cut))
    return engine


@pytest.mark.parametrize("of_ignite", [False, True])
def test_a_scheduler_resumes_from_noethers_checkpoints(of_ignite, tmp_path):
    micro = batches(points(36), 8)
    expected, state = reference_run(micro, lr=lambda update: LR * (1 / (1 + update)), epoch=EPOCHS)
    for cut in (6, 0):
        network = model()
        with open_silent(tmp_path / "run") as directory:
            recorder = Recorder(directory.interpreter)
            engine = make_scheduled_engine(network, directory, recorder, of_ignite=of_ignite, cut=cut)
            with pytest.raises(CutError) if cut else nullcontext():
                engine.run(micro, max_epochs=EPOCHS)
    assert_same(recorder.history, expected.after("E1_U5_S36"))
    assert_same(weights(network), weights(state))


def test_a_scheduler_of_unknown_position_is_refused(tmp_path):
    for cut, error, message in ((6, CutError, "gone"), (0, ValueError, r"pass attach\(scheduler=...\) from the start")):
        with open_silent(tmp_path / "run") as directory:
            engine = make_scheduled_engine(model(), directory, directory.interpreter, given=False, cut=cut)
            with pytest.raises(error, match=message):
                engine.run(batches(points(36), 8), max_epochs=EPOCHS)


def test_an_engine_that_cannot_resume_inside_of_an_epoch_is_refused(tmp_path):
    micro = batches(points(36), 8)
    for error, message in ((CutError, "gone"), (ValueError, "E1_U7_S52, 2 iterations into an epoch")):
        network = model()
        with open_silent(tmp_path / "run") as directory:
            engine, _ = make_engine(network, optimizer(network), directory.interpreter, directory=directory)
            engine.add_event_handler(Events.ITERATION_STARTED, raise_at(8))
            with pytest.raises(error, match=message):
                engine.run(micro, max_epochs=EPOCHS)


def test_a_longer_run_continues_and_a_new_one_needs_a_new_engine():
    micro = batches(points(36), 8)
    quiet = compose(OnlineLossCallback(every_n_epochs=1))
    expected, state = reference_run(micro, reducer=quiet, epoch=3)
    network, recorder = model(), Recorder()
    engine, live = make_engine(network, optimizer(network), recorder, reducer=quiet)
    engine.run(micro, max_epochs=2)
    assert (live.run.end.epoch, live.state.ended) == (2, True)
    engine.run(micro, max_epochs=3)
    history = [line for line in recorder.history if line[:2] != ("AfterTraining", "E2_U10_S72")]
    assert_same(history, expected.history)
    assert_same(weights(network), weights(state))
    with pytest.raises(ValueError, match=r"begins at iteration 0, and the callbacks remember E3_U15_S108, .* 15:"):
        engine.run(micro)


def test_epochs_of_unknown_length_are_counted_as_they_end():
    network, recorder = model(), Recorder()
    engine, live = make_engine(network, optimizer(network), recorder, reducer=OnlineLossCallback(every_n_epochs=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignite's, that its iterator is at an end
        engine.run(iter(batches(points(36), 8)), max_epochs=1)
    assert live.state.iteration.epoch == 1
    assert not hasattr(live.run, "updates_per_epoch")


def test_an_epoch_that_is_left_early_is_counted(caplog):
    network = model()
    engine, live = make_engine(network, optimizer(network), Recorder(), reducer=compose())
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate_epoch())
    engine.run(batches(points(36), 8), max_epochs=1)
    assert str(live.state.iteration) == "E1_U3_S24"
    (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("noether"))
    assert "epoch 0 had 3 updates, not updates_per_epoch=5: the session ignores updates_per_epoch" in line


def test_a_run_that_ignite_terminates_says_so(tmp_path):
    network = model()
    adam = optimizer(network)
    engine = Engine(supervised_training_step(network, adam, nn.functional.cross_entropy))
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    with open_silent(tmp_path / "run") as directory:
        attach(engine, CheckpointCallback(every_n_epochs=1), model=network, optimizer=adam, directory=directory)
        engine.run(batches(points(16), 8), max_epochs=9)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["ending"] == "ended at E2_U4_S32: engine.terminate() was called"


def test_facts_that_the_user_passes_take_precedence():
    network = model()
    adam = optimizer(network)
    engine = Engine(supervised_training_step(network, adam, nn.functional.cross_entropy))
    given = Run(effective_batch_size=5, run_id="mine")
    live = attach(engine, compose(), model=network, optimizer=adam, run=given, interpreter=Recorder())
    engine.run(batches(points(36), 8), max_epochs=2)
    known = (live.run.effective_batch_size, live.run.run_id, live.run.samples_per_epoch, live.run.updates_per_epoch)
    assert known == (5, "mine", 36, 5)


def test_callbacks_do_not_disturb_what_the_engine_draws(tmp_path):
    def trained(with_callbacks):
        torch.manual_seed(5)
        network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
        adam = optimizer(network)
        engine = Engine(supervised_training_step(network, adam, nn.functional.cross_entropy))
        if with_callbacks:
            given = {"model": network, "optimizer": adam, "interpreter": Recorder(), "clock": STILL}
            loader = DataLoader(points(20, seed=2), batch_size=4, shuffle=True)
            attach(engine, callbacks_without_scale(), run=run(network).replace(data={"val": loader}), **given)
        engine.run(DataLoader(points(36), batch_size=8, shuffle=True), max_epochs=3)
        return weights(network)

    assert_same(trained(with_callbacks=True), trained(with_callbacks=False))


def callbacks_without_scale():
    return compose(*(each for each in callbacks(tolerance=99).members if type(each).__name__[:8] != "ReduceLR"))
