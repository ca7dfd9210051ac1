"""A micro-batch without samples is left out: an update with such micro-batches equals the update without them."""

import logging
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

from noether import AfterUpdate, Run, Session, TrainingIteration, TrainState, compose, forward, on
from noether.core.callbacks import (
    EMACallback,
    EtaCallback,
    GradNormCallback,
    LrCallback,
    MetricCallback,
    NanGuardCallback,
    OfflineLossCallback,
    OnlineLossCallback,
    ProgressCallback,
    TrackOutputsCallback,
    TrainTimeCallback,
)
from noether.core.effect import LogScalars, LogText
from noether.core.event import AfterAccumulationStep, AfterEpoch
from noether.session.errors import SessionError
from noether.session.timing import Clock
from noether.testing import same
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.data.sample_counts import NoSamplesError, SampleCounts
from noether.training.step.compiled import CompiledStep
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer

EMPTY = {
    "none": lambda: None,
    "tuple": lambda: (torch.zeros(0, 3), torch.zeros(0, 2)),
    "no entries": lambda: (),
    "mapping": dict,
}
STILL = Clock(wall_s=lambda: 0.0, elapsed_s=lambda: 0.0)


class Net(nn.Module):
    """Has buffers, draws random numbers, and has a loss that does not depend on samples."""

    def __init__(self, norm=nn.BatchNorm1d, dropout=0.3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Dropout(dropout), nn.Linear(4, 2))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return {"out": self.layers(x) * self.scale, "drift": self.scale}


def loss(outputs, batch):
    return {"mse": (outputs["out"] - batch[1]).square().mean(), "size": 0.1 * outputs["drift"].square()}


def make_batch(index, size=3):
    generator = torch.Generator().manual_seed(index)
    return torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)


def make_step(cls=torch.optim.AdamW, norm=nn.BatchNorm1d, **options):
    torch.manual_seed(0)
    model = Net(norm).train()
    optimizer = FunctionalOptimizer(cls, {"lr": 0.05})
    state = TrainState.from_module(model, seed=3)
    state = state.replace(opt_state=optimizer.init(state.params))
    lr = {"default": lambda position: 0.05 / (1 + position)}
    return Step(model=model, loss=loss, optimizer=optimizer, lr=lr, **options), state


def make_updates(step, state, updates, observe=None):
    """Return copies of the values of the state and the event after each update."""
    found = []
    for batches in updates:
        state, event = step(state, batches, observe)
        state = state.advance(samples=event.samples)
        event = {name: value for name, value in vars(event).items() if name != "run"}
        values = {"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state}
        found.append(({name: dict(value) for name, value in values.items()}, str(state.iteration), event))
    return found


STEPS = {
    "plain": {},
    "bf16": {"precision": torch.bfloat16},
    "donated": {"donate": True},
    "clipped and checked": {"clip_grad_norm": 0.1, "nonfinite": "raise", "grad_norm": True},
    "a class without kernel": {"cls": torch.optim.NAdam, "donate": True},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@settings(max_examples=10)
@given(st.lists(st.lists(st.sampled_from([2, 3, *EMPTY]), min_size=1, max_size=4), min_size=1, max_size=3))
def test_an_update_equals_the_one_without_its_empty_micro_batches(options, rows):
    with_empty = [
        [EMPTY[size]() if size in EMPTY else make_batch(9 * i + j, size) for j, size in enumerate(row)]
        for i, row in enumerate(rows)
    ]
    without = [[batch for batch in row if batch and len(batch[0])] for row in with_empty]
    assert same(make_updates(*make_step(**options), with_empty), make_updates(*make_step(**options), without))


@pytest.mark.slow
def test_a_compiled_update_equals_the_one_without_its_empty_micro_batches():
    torch.compiler.reset()
    rows = [[make_batch(0), None], [None], [make_batch(1), EMPTY["tuple"]()], [make_batch(2), None, make_batch(3, 2)]]
    without = [[batch for batch in row if batch and len(batch[0])] for row in rows]
    step, state = make_step(donate=True)
    found = make_updates(CompiledStep(step), state, rows)
    step, state = make_step(donate=True)
    assert same(found, make_updates(CompiledStep(step), state, without))


@pytest.mark.parametrize("nonfinite", ["apply", "skip", "raise"])
def test_an_update_without_samples_is_skipped(nonfinite):
    step, state = make_step(nonfinite=nonfinite)
    after, event = step(state, [None, EMPTY["tuple"]()])
    assert after is state
    assert (event.samples, event.skipped, event.accumulated, event.outputs) == (0, True, (), ())
    assert dict(event.losses) == {}
    assert event.lr == {"default": 0.05}


def test_accumulation_steps_are_those_with_samples():
    heard = []

    def observe(state, event):
        heard.append((event.samples, event.accumulation_step, event.accumulation_steps))
        return state

    step, state = make_step()
    step(state, [None, make_batch(0), EMPTY["tuple"](), make_batch(1, 2)], observe)
    assert heard == [(3, 0, 2), (2, 1, 2)]


# --- training


class Filtered(Dataset):
    """Leaves out samples in `collate`, and returns None or an empty batch if none is left."""

    def __init__(self, length=16, usable=lambda index: index % 3 != 0, *, returns_none=True):
        self._length, self._usable, self._returns_none = length, usable, returns_none

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return index, torch.rand(())

    def collate(self, samples):
        usable = [(index, noise) for index, noise in samples if self._usable(index)]
        if not usable and self._returns_none:
            return None
        x = torch.tensor([[index / 10, noise, 1.0] for index, noise in usable]).reshape(-1, 3)
        return x, x[:, :2].clone()


def make_trainer(dataset, end, heard, members=(), workers=0):
    data = TrainingData(dataset, seed=1, effective_batch_size=4, max_batch_size=2, num_workers=workers)
    batching = data.batching
    run = Run(
        end=end,
        updates_per_epoch=batching.updates_per_epoch,
        samples_per_epoch=batching.samples_per_epoch,
        effective_batch_size=4,
        data={"val": EvaluationData(Filtered(9), seed=0, batch_size=2)},
        forward=forward(Net(nn.LayerNorm), loss),
    )
    step, state = make_step(norm=nn.LayerNorm, grad_norm=True)  # batch norm cannot train on one sample
    reducer = compose(*members)
    interpreter = lambda effects, state, event: heard.extend((str(state.iteration), effect) for effect in effects)  # noqa: E731  # the test reads better in one line
    return Trainer(run=run, step=step, data=data, reducer=reducer, interpreter=interpreter, clock=STILL), state


def members():
    return [
        NanGuardCallback(every_n_updates=2, tolerance=1),
        EMACallback(every_n_updates=2, target_factors=(0.5,)),
        OnlineLossCallback(every_n_updates=1, verbose=False),
        OnlineLossCallback(every_n_samples=5, verbose=False),
        TrackOutputsCallback(every_n_updates=1, keys=("drift",)),
        GradNormCallback(every_n_updates=1),
        LrCallback(every_n_updates=1),
        TrainTimeCallback(every_n_updates=2),
        ProgressCallback(every_n_updates=1),
        EtaCallback(every_n_updates=1),
        OfflineLossCallback(every_n_epochs=1, dataset_key="val"),
    ]


@pytest.mark.parametrize("end", [TrainingIteration(epoch=3), TrainingIteration(sample=40)], ids=str)
@pytest.mark.parametrize(("returns_none", "workers"), [(True, 0), (False, 0), (True, 1)])
def test_a_run_counts_the_samples_that_it_trained_on(end, returns_none, workers, caplog):
    usable = lambda index: index % 3 == 0  # noqa: E731  # some updates have none
    dataset, heard = Filtered(usable=usable, returns_none=returns_none), []
    train, state = make_trainer(dataset, end, heard, members(), workers)
    state = train(state)
    assert state.iteration.reached(end)
    assert state.stop is None
    assert state.iteration.sample == 6 * state.iteration.epoch + state.iteration.sample % 6
    assert all(tensor.isfinite().all() for tensor in state.params.values())
    values = {key: float(v) for _, each in heard if isinstance(each, LogScalars) for key, v in each.values.items()}
    assert values
    assert all(value == value for value in values.values())  # noqa: PLR0124  # not NaN
    by_samples = [at for at, each in heard if isinstance(each, LogScalars) and "loss/online/mse/S5" in each.values]
    assert len(by_samples) == state.iteration.sample // 5
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("has no samples: all its micro-batches are empty" in each for each in warnings) == 1
    assert sum("trained on" in each and "the dataset gave 4" in each for each in warnings) == 1


@settings(max_examples=15)
@given(cut=st.integers(0, 11))
def test_a_run_cut_at_any_update_and_resumed_equals_the_uncut_run(cut):
    end, heard, rest = TrainingIteration(sample=16), [], []
    train, state = make_trainer(Filtered(usable=lambda index: index % 3 == 0), end, heard, members())
    seen = []
    train = Trainer(**{**vars_of(train), "interrupted": lambda: len(seen) >= cut + 1 or seen.append(1)})
    middle = train(state)
    again, _ = make_trainer(Filtered(usable=lambda index: index % 3 == 0), end, rest, members())
    resumed = again(middle, resumed=True)
    whole, start = make_trainer(Filtered(usable=lambda index: index % 3 == 0), end, [], members())
    expected = whole(start)
    assert same(resumed.params, expected.params)
    assert same(resumed.callback_states, expected.callback_states)
    assert resumed.iteration == expected.iteration


def vars_of(trainer):
    names = ("run", "step", "data", "reducer", "interpreter", "clock")
    return {name: getattr(trainer, name) for name in names}


@pytest.mark.parametrize("end", [TrainingIteration(epoch=3), TrainingIteration(sample=40)], ids=str)
def test_a_run_without_any_usable_sample_ends_with_an_error(end):
    train, state = make_trainer(Filtered(usable=lambda _: False), end, [])
    with pytest.raises(NoSamplesError, match="4 updates in a row, a whole epoch, have no samples: check which samples"):
        train(state)


@given(st.lists(st.sampled_from([0, 3, 4]), max_size=12))
def test_only_empty_updates_in_a_row_end_a_run(samples):
    counts, row = SampleCounts(Run(updates_per_epoch=3, samples_per_epoch=12, effective_batch_size=4)), 0
    for update, count in enumerate(samples):
        row = 0 if count else row + 1
        with pytest.raises(NoSamplesError) if row >= 3 else nullcontext():
            counts.check(update, count) if count != 4 else None


# --- evaluation


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_an_empty_batch_adds_nothing_to_an_evaluation(empty):
    batches = [make_batch(0), make_batch(1, 2)]
    error = lambda outputs, batch: (outputs["out"] - batch[1]).abs().mean()  # noqa: E731  # the test reads better in one line
    reducer = compose(
        OfflineLossCallback(every_n_epochs=1, dataset_key="val", output_patterns_to_log=("drift",)),
        MetricCallback(every_n_epochs=1, dataset_key="val", metric=error),
    )
    _, state = make_step()

    def logged(data):
        run = Run(data={"val": data}, forward=forward(Net(), loss))
        return [dict(each.values) for each in reducer(state.next_epoch(), AfterEpoch(run=run))[1]]

    assert same(logged([empty(), batches[0], empty(), batches[1], empty()]), logged(batches))
    run = Run(data={"val": [empty(), empty()]}, forward=forward(Net(), loss))
    after, effects = reducer(state.next_epoch(), AfterEpoch(run=run))
    assert not after.metrics
    assert all(isinstance(each, LogText) and "no batch of val has samples" in each.text for each in effects)


def test_outputs_of_an_empty_accumulation_step_add_nothing():
    callback = TrackOutputsCallback(every_n_updates=1, keys=("x",))
    outputs = ({"x": torch.ones(2)}, {"x": torch.zeros(0)}, {"x": torch.tensor([4.0])})
    event = AfterUpdate(samples=3, accumulated=(2, 0, 1), outputs=outputs)
    without = AfterUpdate(samples=3, accumulated=(2, 1), outputs=outputs[::2])
    state = TrainState().advance(samples=3)
    assert same(callback(state, event), callback(state, without))
    assert float(callback(state, event)[1][0].values["x/U1"]) == 2.0


# --- session


def run_session(batches, accumulation=2):
    """Return the events and the parameters of a loop; it computes gradients of the batches with samples only."""
    heard = []

    @on(AfterUpdate, AfterAccumulationStep)
    def hear(state, event):
        known = {name: value for name, value in vars(event).items() if name not in {"run", "accumulation_steps"}}
        heard.append((str(state.iteration), {**known, "data_s": None, "step_s": None, "duration_s": None}))
        return state, ()

    torch.manual_seed(0)
    model = Net(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session(
        [hear, NanGuardCallback(every_n_updates=1, tolerance=1)], interpreter=lambda *_: None, model=model,
        optimizer=optimizer, max_epochs=2, accumulation=accumulation, clock=STILL,
    )  # fmt: skip
    for batch in session.batches(batches):
        if batch is not None and len(batch[0]):
            losses = loss(model(batch[0]), batch)
            sum(losses.values()).backward()
            session.micro_batch(losses, outputs={"size": len(batch[0])})
        else:
            session.micro_batch({"mse": torch.tensor(torch.nan)}, outputs={"size": 0})
        if session.completes_update:
            optimizer.step()
            optimizer.zero_grad()
            session.update()
    assert session.stop is None
    return heard, model.state_dict()


@pytest.mark.parametrize("empty", [EMPTY["none"], EMPTY["tuple"]])
def test_a_session_leaves_out_empty_micro_batches(empty):
    with_empty = [make_batch(0), empty(), empty(), make_batch(1, 2)]
    without = [make_batch(0), make_batch(1, 2)]
    heard = run_session(with_empty)
    assert len([event for _, event in heard[0] if "skipped" in event]) == 4
    assert same(heard, run_session(without, accumulation=1))


def test_a_session_skips_an_update_without_samples_and_says_so_once(caplog):
    heard, weights = run_session([make_batch(0), make_batch(1), None, None], accumulation=2)
    updates = [event for _, event in heard if "skipped" in event]
    assert [(each["samples"], each.get("skipped")) for each in updates] == [(6, False), (0, True)] * 2
    assert [dict(each["losses"]) for each in updates if each["skipped"]] == [{}, {}]
    assert all(value.isfinite().all() for value in weights.values())
    messages = [record.getMessage() for record in caplog.records]
    assert len([each for each in messages if each.startswith("update 2 has no samples")]) == 1


def test_a_session_may_begin_with_an_update_without_samples():
    heard, _ = run_session([None, None, make_batch(0), make_batch(1)], accumulation=2)
    assert [event["samples"] for _, event in heard if "skipped" in event] == [0, 6, 0, 6]


def test_a_session_refuses_an_epoch_without_samples():
    with pytest.raises(SessionError, match="no batch of epoch 0 has samples: check which samples the loader leaves"):
        run_session([None, None])
