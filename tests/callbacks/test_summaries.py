"""Callbacks that describe the run before training, and `PeakMemoryCallback`."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from noether.core.callback import listens_to
from noether.core.callbacks import (
    DatasetStatsCallback,
    HyperparamsCallback,
    ParamCountCallback,
    PeakMemoryCallback,
)
from noether.core.callbacks.peak_memory import PeakMemory
from noether.core.effect import LogText, MeasurePeakMemory, SetSummary
from noether.core.errors import SettingsError
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState

DESCRIBING = (ParamCountCallback(), DatasetStatsCallback(), HyperparamsCallback())
RUN = Run(config={"seed": 0}, data={"val": [torch.zeros(4, 2)]}, frozen=frozenset())


def describe_run(callback, run=RUN, state=None):
    """Return the console text and the summary of a callback, or None for either."""
    state = TrainState() if state is None else state
    after, effects = callback(state, BeforeTraining(run=run))
    assert after is state
    texts = [effect.text for effect in effects if isinstance(effect, LogText)]
    (summary,) = (dict(effect.values) for effect in effects if isinstance(effect, SetSummary))
    assert len(effects) == len(texts) + 1
    return texts, summary


def make_model():
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return nn.Sequential(nn.ModuleDict({"body": body, "head": nn.Linear(4, 2, bias=False)}))


# --- parameters


def test_parameters_are_counted_in_total_and_by_direct_sub_module():
    params = {
        "scale": torch.zeros(()),
        "body.0.weight": torch.zeros(4, 3),
        "body.0.bias": torch.zeros(4),
        "body.1.weight": torch.zeros(4),
        "head.weight": torch.zeros(2, 4),
    }
    frozen = frozenset({"scale", "body.0.weight", "body.0.bias"})
    texts, summary = describe_run(ParamCountCallback(), Run(frozen=frozen), TrainState(params=params))
    assert summary == {
        "params/trainable": 12,
        "params/frozen": 17,
        "params/body/trainable": 4,
        "params/body/frozen": 16,
        "params/head/trainable": 8,
        "params/head/frozen": 0,
    }
    (text,) = texts
    assert text.splitlines() == [
        "params/trainable       12",
        "params/frozen          17",
        "params/body/trainable  4",
        "params/body/frozen     16",
        "params/head/trainable  8",
        "params/head/frozen     0",
    ]


def test_the_parameters_of_a_module_are_counted_and_its_buffers_are_not():
    model = make_model()
    _, summary = describe_run(ParamCountCallback(), RUN, TrainState.from_module(model))
    assert summary["params/trainable"] == sum(param.numel() for param in model.parameters()) == 32
    assert summary["params/0/trainable"] == 32
    assert summary["params/frozen"] == summary["params/0/frozen"] == 0


def test_a_shared_parameter_is_counted_once():
    model = nn.ModuleDict({"one": nn.Linear(3, 3, bias=False), "two": nn.Linear(3, 3, bias=False)})
    model["two"].weight = model["one"].weight
    _, summary = describe_run(ParamCountCallback(), RUN, TrainState.from_module(model))
    assert summary == {
        "params/trainable": 9, "params/frozen": 0, "params/one/trainable": 9, "params/one/frozen": 0,
    }  # fmt: skip


def test_a_run_without_parameters():
    assert describe_run(ParamCountCallback())[1] == {"params/trainable": 0, "params/frozen": 0}


# --- datasets


class Sized:
    """A dataset with a length that refuses to be iterated."""

    def __len__(self):
        return 1000

    def __iter__(self):
        raise AssertionError("it was read")


def test_the_lengths_of_datasets():
    points = TensorDataset(torch.zeros(10, 2), torch.zeros(10))
    data = {
        "batches": [(torch.zeros(4, 2), torch.zeros(4)), (torch.zeros(3, 2), torch.zeros(3))],
        "pair": (torch.zeros(5, 2), torch.zeros(1, 2)),
        "dicts": [{"x": torch.zeros(2, 3)}],
        "none": [],
        "loader": DataLoader(points, batch_size=4),
        "dropping": DataLoader(points, batch_size=4, drop_last=True),
        "sized": Sized(),
        "dataset": points,
    }
    texts, summary = describe_run(DatasetStatsCallback(), Run(data=data))
    assert summary == {
        "samples/batches": 7,
        "samples/pair": 6,
        "samples/dicts": 2,
        "samples/none": 0,
        "samples/loader": 10,
        "samples/dropping": 10,
        "samples/sized": 1000,
        "samples/dataset": 10,
    }
    assert texts[0].splitlines()[:2] == ["samples/batches   7", "samples/pair      6"]


class Stream(IterableDataset):
    """A dataset without a length."""

    def __iter__(self):
        raise AssertionError("it was read")


def test_a_dataset_without_length_is_left_out():
    data = {"stream": Stream(), "loader": DataLoader(Stream(), batch_size=4), "batches": [torch.zeros(4, 2)]}
    assert describe_run(DatasetStatsCallback(), Run(data=data))[1] == {"samples/batches": 4}


@pytest.mark.parametrize("data", [{}, {"stream": Stream()}])
def test_without_facts_there_are_no_effects(data):
    assert DatasetStatsCallback()(TrainState(), BeforeTraining(run=Run(data=data)))[1] == ()


def test_batches_are_counted_by_the_batch_size_of_the_run():
    run = Run(data={"words": [["a", "b"], ["c"]]}, batch_size=len)
    assert describe_run(DatasetStatsCallback(), run)[1] == {"samples/words": 3}


# --- configuration


def test_the_configuration_is_in_the_summary_and_not_on_the_console():
    config = {"optimizer": {"kind": "torch.optim.AdamW", "lr": 0.1}, "callbacks": [{"kind": "a"}, {"kind": "b"}]}
    texts, summary = describe_run(HyperparamsCallback(), Run(config=config))
    assert texts == []
    assert json.loads(json.dumps(summary)) == {"config": config}


# --- all of them


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("callback", DESCRIBING, ids=lambda callback: callback.name)
def test_the_state_does_not_change_and_a_resumed_run_repeats_the_facts(callback, resumed):
    state = TrainState(params={"weight": torch.zeros(3)}).advance(samples=4)
    after, effects = compose(callback)(state, BeforeTraining(run=RUN, resumed=resumed))
    assert after is state
    assert effects == callback(state, BeforeTraining(run=RUN))[1] != ()


@pytest.mark.parametrize("callback", DESCRIBING, ids=lambda callback: callback.name)
def test_later_events_do_nothing(callback):
    state = TrainState().advance(samples=4)
    for event in (AfterUpdate(samples=4), AfterEpoch(), AfterTraining(), AtEval()):
        assert callback(state, event) == (state, ())
        assert not listens_to(callback, type(event))
    assert callback.produces == ()


# --- peak memory


def test_peak_memory_is_requested_at_its_interval_under_its_key():
    reducer = compose(
        PeakMemoryCallback(every_n_updates=2),
        PeakMemoryCallback(every_n_samples=12),
        PeakMemoryCallback(every_n_epochs=1, at_end=True),
    )
    state, requests = TrainState(), []
    for _ in range(4):
        state, effects = reducer(state.advance(samples=4), AfterUpdate(samples=4))
        requests.append([effect.key for effect in effects])
    assert requests == [[], ["memory/peak_bytes/U2"], ["memory/peak_bytes/S12"], ["memory/peak_bytes/U2"]]
    assert reducer(state, AfterTraining()) == (state, (MeasurePeakMemory(key="memory/peak_bytes/E1"),))
    state = state.next_epoch()
    assert reducer(state, AfterEpoch()) == (state, (MeasurePeakMemory(key="memory/peak_bytes/E1"),))
    assert reducer(state, AfterTraining()) == (state, ())


def test_no_callback_can_consume_peak_memory():
    callback = PeakMemoryCallback(every_n_updates=1)
    assert callback.produces == ()
    state, _ = callback(TrainState().advance(samples=4), AfterUpdate(samples=4))
    assert dict(state.metrics) == dict(state.callback_states) == {}
    assert PeakMemory is PeakMemoryCallback


@pytest.mark.parametrize(
    ("callback", "fix"),
    [
        (ParamCountCallback(), r"ParamCountCallback reads run.frozen: pass Run\(frozen=...\), the names"),
        (DatasetStatsCallback(), r"DatasetStatsCallback reads run.data: pass Run\(data=...\), the datasets"),
        (HyperparamsCallback(), r"HyperparamsCallback reads run.config: pass Run\(config=...\), the conf"),
    ],
)
def test_a_loop_that_does_not_know_the_facts_is_refused_at_its_start(callback, fix):
    with pytest.raises(SettingsError, match=fix):
        callback(TrainState(), BeforeTraining())
