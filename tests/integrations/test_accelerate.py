"""The same callbacks in a loop with Accelerate: the same effects and weights, and every resume is exact."""

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from reference import (
    LR,
    STILL,
    EventCollector,
    Recorder,
    batches,
    callbacks,
    loss,
    model,
    open_silent,
    points,
    reference_run,
    run,
    weights,
)

from noether import AfterUpdate, Mean, Session, TrainingIteration, compose
from noether.core.callbacks import FixedUpdateEarlyStopping, GradNormCallback, HistogramCallback, OnlineLossCallback
from noether.integrations.accelerate import AcceleratedSession
from noether.testing import assert_same

SIZE = 2
EPOCHS = 3
POINTS = points(12)


def make_parts(steps=1, *, samples=POINTS, reducer=None, directory=None, shuffle=False):
    """Return the prepared parts of a loop, and the recorder of its effects."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    network = model()
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    loader = torch.utils.data.DataLoader(samples, batch_size=SIZE, shuffle=shuffle)
    network, optimizer, scheduler, loader = accelerator.prepare(network, optimizer, scheduler, loader)
    recorder = Recorder(directory.interpreter) if directory else Recorder()
    watched = AcceleratedSession(
        reducer or callbacks(),
        accelerator=accelerator,
        model=network,
        optimizer=optimizer,
        scheduler=scheduler,
        run=run(accelerator.unwrap_model(network), end=TrainingIteration(epoch=EPOCHS)),
        directory=directory,
        interpreter=recorder,
        clock=STILL,
    )
    accelerator.register_for_checkpointing(watched)
    return accelerator, network, optimizer, scheduler, loader, watched, recorder


def train(accelerator, network, optimizer, scheduler, loader, watched, recorder, *, cut=None):
    """Train in a usual loop, and return the recorder; `cut` is a number of updates."""
    network.train()
    for batch in watched.batches(loader):
        with accelerator.accumulate(network):
            watched.backward(loss(network(batch[0]), batch))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        watched.update()
        if cut is not None and watched.session.state.iteration.update == cut:
            break
    return recorder


def halving(update):
    return LR * 0.5 ** (update // 2)


@pytest.mark.parametrize("steps", [1, 2])
def test_events_and_weights_equal_those_of_the_trainer(steps):
    parts = make_parts(steps)
    recorder = train(*parts)
    expected, state = reference_run(batches(POINTS, SIZE), steps=steps, lr=halving, epoch=EPOCHS)
    assert state.hyperparams["lr_scale"] < 1
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(parts[1]), weights(state))


def test_a_short_last_group_makes_a_smaller_update_with_unchanged_losses():
    collector = EventCollector()
    train(*make_parts(2, samples=points(10), reducer=compose(collector)))
    expected = EventCollector()
    reference_run(batches(points(10), SIZE), steps=2, lr=halving, epoch=EPOCHS, reducer=compose(expected))
    first, others = collector.of(AfterUpdate)[:3], expected.of(AfterUpdate)[:3]
    assert [event.accumulated for event in first] == [event.accumulated for event in others] == [(2, 2), (2, 2), (2,)]
    assert_same([event.losses for event in first], [event.losses for event in others])  # those before the update


@pytest.fixture(scope="module")
def uncut():
    parts = make_parts(2, shuffle=True)
    return train(*parts), weights(parts[1]), parts[5].session.state.callback_states


@pytest.mark.parametrize("after", [1, 3, 4])
def test_resumes_from_a_checkpoint_of_accelerate(after, uncut, tmp_path):
    parts = make_parts(2, shuffle=True)
    before = train(*parts, cut=after)
    assert before.lines[-1][0] == "AfterUpdate"
    parts[0].save_state(tmp_path)
    parts = make_parts(2, shuffle=True)
    parts[0].load_state(tmp_path)
    recorder = train(*parts)
    assert recorder.lines[0][:2] == ("BeforeTraining", before.lines[-1][1])
    assert_same([*before.history, *recorder.history], uncut[0].history)
    assert_resumed(parts, uncut)


def assert_resumed(parts, uncut):
    assert_same(weights(parts[1]), uncut[1])
    assert_same(parts[5].session.state.callback_states, uncut[2])


@pytest.mark.parametrize("after", [3, 4])
def test_resumes_from_a_checkpoint_of_noether(after, uncut, tmp_path):
    with open_silent(tmp_path) as directory:
        before = train(*make_parts(2, directory=directory, shuffle=True), cut=after)
    with open_silent(tmp_path) as directory:
        parts = make_parts(2, directory=directory, shuffle=True)
        recorder = train(*parts)
    assert recorder.lines[0][:2] == ("BeforeTraining", before.lines[-1][1])
    assert_same([*before.history, *recorder.history], uncut[0].history)
    assert_resumed(parts, uncut)


def test_early_stopping_ends_the_batches_and_they_stay_ended(tmp_path):
    reducer = callbacks(FixedUpdateEarlyStopping(stop_at_update=4))
    expected, _ = reference_run(batches(POINTS, SIZE), steps=2, lr=halving, epoch=EPOCHS, reducer=reducer)
    with open_silent(tmp_path) as directory:
        recorder = train(*make_parts(2, reducer=reducer, directory=directory))
    assert_same(recorder.lines, expected.lines)
    with open_silent(tmp_path) as directory:
        again = train(*make_parts(2, reducer=reducer, directory=directory))
    assert [line[0] for line in again.lines] == ["BeforeTraining"]


def test_an_update_before_the_optimizer_steps_is_refused():
    accelerator, network, _, _, loader, watched, _ = make_parts()
    batch = next(watched.batches(loader))
    with accelerator.accumulate(network):
        watched.backward(loss(network(batch[0]), batch))
    with pytest.raises(ValueError, match=r"after optimizer.step()"):
        watched.update()


def test_gradients_are_measured_before_they_are_clipped():
    collector = EventCollector()
    accelerator, network, optimizer, _, loader, watched, _ = make_parts(
        reducer=compose(
            GradNormCallback(every_n_updates=1), HistogramCallback(every_n_updates=1, of=("gradients",)), collector
        )
    )
    clipped = []
    for batch in watched.batches(loader):
        with accelerator.accumulate(network):
            watched.backward(loss(network(batch[0]), batch))
            clipped.append(float(accelerator.clip_grad_norm_(network.parameters(), 1e-3)))
            optimizer.step()
            optimizer.zero_grad()
        watched.update()
    events = collector.of(AfterUpdate)
    assert [float(event.grad_norm) for event in events] == pytest.approx(clipped)
    assert [float(torch.nn.utils.get_total_norm(list(event.gradients.values()))) for event in events] == pytest.approx(
        clipped
    )


def test_the_weight_of_a_loss_is_used_in_its_means():
    collector = EventCollector()
    accelerator, network, optimizer, _, loader, watched, _ = make_parts(2, reducer=collector)
    weights = iter([30, 10, 0, 5] * len(loader) * EPOCHS)
    seen = []
    for batch in watched.batches(loader):
        with accelerator.accumulate(network):
            mean, weight = loss(network(batch[0]), batch)["ce"], next(weights)
            seen.append((mean.item(), weight))
            watched.backward({"ce": Mean(mean if weight else mean * torch.nan, weight=weight)})
            optimizer.step()
            optimizer.zero_grad()
        watched.update()
    events = collector.of(AfterUpdate)
    (a, m), (b, n) = seen[:2]
    assert float(events[0].losses["ce"]) == pytest.approx((a * m + b * n) / (m + n))
    assert [event.loss_weights["ce"] for event in events[:2]] == [40, 5]
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def on_two_processes():
    torch.set_num_threads(1)
    # This process is a fork, and inherits the accelerator's global state.
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  # as accelerate's own tests do
    GradientState._reset_state()  # noqa: SLF001  # likewise
    collector, reducer = EventCollector(), compose(OnlineLossCallback(every_n_updates=1))
    parts = make_parts(samples=POINTS[:8], reducer=compose(reducer, collector))
    accelerator, recorder = parts[0], train(*parts)
    updates = collector.of(AfterUpdate)
    assert [event.samples for event in updates] == [2 * SIZE] * 2 * EPOCHS
    assert updates[0].run.samples_per_epoch == 8
    rank = accelerator.process_index
    assert updates[0].run.rank == rank
    losses = torch.tensor([event.losses["ce"] for event in updates])
    assert_same(*accelerator.gather(losses).chunk(2))  # both have the mean over both
    assert recorder.lines[-1:] == ([] if rank else [("AfterTraining", "E3_U6_S24", ())])  # rank 0 runs effects
    session = Session([], interpreter=recorder, model=model(), data={"val": parts[4]}, loss=loss)
    sizes = [[size for _, size in session.run.data["val"].with_sizes(each, 2)] for each in range(2)]
    assert sizes == [[SIZE, SIZE], [SIZE, SIZE]]  # of 8 samples, each once
    collector.events.clear()
    session = Session(collector, interpreter=recorder, model=model())
    session.begin()
    session.update({"ce": Mean([1.0, 5.0][rank], [3, 1][rank]), "gone": Mean(torch.nan, 0)}, samples=SIZE)
    (event,) = collector.of(AfterUpdate)
    assert_same((dict(event.losses), dict(event.loss_weights)), ({"ce": 2.0, "total": 2.0}, {"ce": 4}))


# Newer versions of Python warn of every fork of a process with threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_samples_are_summed_and_losses_averaged_over_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate warns where it has to choose
    debug_launcher(on_two_processes, num_processes=2)
