"""The order of samples: none, or that of a sampler, which is a function of the seed and the epoch."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import MODULE, make_config
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

import noether
from noether import TrainingIteration
from noether.config import ConfigError
from noether.config.loading import from_source
from noether.config.objects.kinds import Kind
from noether.config.values import source_from_values
from noether.testing import assert_same
from noether.training.data.indexed import TrainingData
from noether.training.data.orders import SamplerError, SamplerOrder
from noether.training.experiment import build

DATA = range(12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_without_shuffling_samples_come_in_order(data):
    length = data.draw(st.integers(1, 20))
    size = data.draw(st.integers(1, length))
    batches = TrainingData(torch.arange(length), seed=0, effective_batch_size=size, shuffle=False)
    per_epoch = -(-length // size)
    start = data.draw(st.integers(0, 2 * per_epoch))
    read = [
        batch.tolist()
        for update in range(start, start + per_epoch)
        for batch in batches.batch(TrainingIteration(update=update))
    ]
    whole = torch.arange(length).split(size)
    assert read == [whole[update % per_epoch].tolist() for update in range(start, start + per_epoch)]


class HoldsGenerator(Sampler):
    """Shuffles with a generator that it seeds itself, always the same way."""

    def __init__(self, dataset):
        self._samples, self._generator = len(dataset), random.Random(0)  # noqa: S311  # no secret is drawn

    def __iter__(self):
        return iter(self._generator.sample(range(self._samples), self._samples))


def rotate(dataset, seed, epoch, step=1):
    return torch.arange(len(dataset)).roll(seed + epoch * step)


SAMPLERS = {
    "function": (rotate, {"step": 2}),
    "RandomSampler": (RandomSampler, {}),
    "WeightedRandomSampler": (WeightedRandomSampler, {"weights": [1.0, 5.0, 2.0], "num_samples": 9}),
    "SubsetRandomSampler": (SubsetRandomSampler, {"indices": [3, 1, 7]}),
    "DistributedSampler": (DistributedSampler, {"num_replicas": 1, "rank": 0}),
    "HoldsGenerator": (HoldsGenerator, {}),
    "batches": (lambda dataset, generator: torch.randperm(12, generator=generator).split(5), {}),
}


def make_order(name, seed=3):
    target, options = SAMPLERS[name]
    return SamplerOrder(Kind(name, target, options), DATA, seed=seed, effective_batch_size=5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_order_of_a_sampler_is_a_function_of_seed_and_epoch(name):
    before = torch.get_rng_state(), random.getstate()
    order = make_order(name)
    orders = [order(epoch) for epoch in range(4)]
    assert len(set(map(tuple, orders))) > 1
    assert order(2) == orders[2]
    assert make_order(name)(3) == orders[3]
    assert make_order(name, seed=4)(1) != orders[1]
    assert_same((torch.get_rng_state(), random.getstate()), before)


@pytest.mark.parametrize(("target", "message"), [
    (lambda epoch: range(3 + epoch), "yields 4 indices in epoch 1, and 3 in epoch 0: the number of samples"),
    (lambda: [0, 12], r"yields 12, which is no index of the training set of 12 samples: .* from 0 to 11"),
    (lambda: [0.5], "yields 0.5, which is no index"),
    (list, "yields no index: check its settings"),
    (lambda: 3, "returns 3: return an iterable of indices"),
    (lambda dataset: DistributedSampler(dataset, 2, 0), "yields one of 2 shares, as its num_replicas says"),
    (lambda: [[0, 1], [2, 3, 4]], "yields a batch of 2 samples, and trainer.effective_batch_size is 5: yield batches"),
])  # fmt: skip
def test_a_sampler_that_yields_no_order_of_an_epoch_is_refused(target, message):
    with pytest.raises(SamplerError, match=f"^mine.sampler {message}"):
        SamplerOrder(Kind("mine.sampler", target), DATA, seed=0, effective_batch_size=5)(1)


TINY = (
    MODULE
    + """
class Counted(Data):
    def __getitem__(self, index):
        seen.append(index)
        return super().__getitem__(index)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())

seen = []

def backwards(dataset, epoch):
    return range(len(dataset))[:: -1 if epoch % 2 else 1]
"""
)
WEIGHTED = {"kind": "torch.utils.data.WeightedRandomSampler", "weights": [1, 9, 1, 1], "num_samples": 12}


@pytest.fixture
def tiny(tiny_module, tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)


def configure(**trainer):
    config = make_config(**{"max_epochs": 3, **trainer})
    return {**config, "data": {"train": {"kind": "tiny.Counted"}}}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("order", [{"shuffle": False}, {"sampler": WEIGHTED}, {"sampler": "tiny.backwards"}])
def test_a_run_that_is_cut_reads_the_same_samples(order):
    import tiny

    def read(*steps):
        tiny.seen.clear()
        for step in steps:
            run = step()
        return list(tiny.seen), run

    whole, expected = read(lambda: noether.train(configure(**order)))
    stop = {"max_epochs": None, "max_updates": 4 if "sampler" in order and order["sampler"] is WEIGHTED else 3}
    first, cut = read(lambda: noether.train(configure(**order, **stop)))
    end = ["trainer.max_updates=null", "trainer.max_epochs=3"]
    rest, resumed = read(lambda: noether.train(resume=cut.directory, overrides=end))
    assert [*first, *rest] == whole
    assert_same(resumed.state.params, expected.state.params)
    if "shuffle" in order:
        assert whole == [*range(8)] * 3
    elif order["sampler"] is not WEIGHTED:
        assert whole == [*range(8), *range(7, -1, -1), *range(8)]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("trainer", "data", "message"), [
    ({"sampler": WEIGHTED, "shuffle": True}, "tiny.Data", "trainer.shuffle: the sampler gives the order"),
    ({"sampler": "tiny.backwards"}, "tiny.Stream", r"trainer.sampler: data.train is a stream \(Stream\)"),
    ({"shuffle": True}, "tiny.Stream", r"trainer.shuffle: data.train is a stream \(Stream\)"),
    ({"sampler": {"kind": WEIGHTED["kind"]}}, "tiny.Data", "trainer.sampler.weights: is missing"),
    ({"sampler": {**WEIGHTED, "weights": [0] * 8 + [1]}}, "tiny.Data", r"trainer.sampler: .* yields 8, which is no"),
    ({"sampler": "tiny.nothing"}, "tiny.Data", r"trainer.sampler\S*: .*nothing"),
])  # fmt: skip
def test_an_order_that_the_data_cannot_have_is_refused_at_its_setting(trainer, data, message):
    config = {**configure(**trainer), "data": {"train": {"kind": data}}}
    with pytest.raises(ConfigError, match=message):
        build(from_source(source_from_values(config)))
