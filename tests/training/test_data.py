"""Batches are a function of the iteration, whatever the number of workers and wherever loading starts."""

import multiprocessing
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from noether import Run, TrainingIteration
from noether.testing import same
from noether.training.data.batches import collate
from noether.training.data.indexed import EvaluationData, TrainingData, epoch_order

SEED = 7


class Recording(Dataset):
    """Counts, in memory that all processes share, how often each sample was read."""

    def __init__(self, length):
        self.reads = torch.zeros(length, dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        return index

    def read(self):
        return {index for index, count in enumerate(self.reads.tolist()) if count}


class Augmenting(Dataset):
    """Each sample with random numbers of all three generators."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return index, torch.rand(2), np.random.rand(2), random.random(), torch.randn(1)  # noqa: NPY002, S311  # the global generators are tested


class Collating(Augmenting):
    def __getitem__(self, index):
        return {"length": index % 3 + 1}

    def collate(self, samples):
        return {"longest": max(sample["length"] for sample in samples), "samples": torch.zeros(len(samples))}


class Failing(Dataset):
    """One sample cannot be read the first time."""

    def __init__(self, bad):
        self._bad = {bad}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index in self._bad:
            self._bad.clear()
            raise OSError("the disk slept")
        return index


def at(update):
    return TrainingIteration(update=update)


def lists(batches):
    return [batch.tolist() for batch in batches]


def chunks(items, size):
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def expected_update(length, effective, micro, update, *, drop_last):
    """Return the micro-batches of an update as documented, computed without `Batching`."""
    per_epoch = length // effective if drop_last else -(-length // effective)
    epoch, place = divmod(update, per_epoch)
    return chunks(chunks(epoch_order(SEED, epoch, length), effective)[place], micro or effective)


@st.composite
def shapes(draw, longest=20):
    """Return the length of a dataset and settings to make batches of it."""
    length = draw(st.integers(1, longest))
    effective = draw(st.integers(1, length))
    micro = draw(st.none() | st.integers(1, effective + 2))
    return length, {"effective_batch_size": effective, "max_batch_size": micro, "drop_last": draw(st.booleans())}


@given(st.integers(0, 2**63 - 1), st.integers(0, 100), st.integers(0, 50))
def test_order_is_a_permutation_and_a_function_of_seed_and_epoch(seed, epoch, samples):
    torch.rand(1)
    order = epoch_order(seed, epoch, samples)
    assert sorted(order) == list(range(samples))
    before = torch.default_generator.get_state()
    assert epoch_order(seed, epoch, samples) == order
    assert torch.equal(torch.default_generator.get_state(), before)


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


@given(shapes(), st.lists(st.integers(0, 15), min_size=1, max_size=8))
@settings(deadline=None)
def test_batch_depends_on_the_iteration_alone(shape, positions):
    """The order of the calls does not matter: the same update again, a jump back, a jump ahead."""
    length, batch_settings = shape
    data = TrainingData(torch.arange(length), seed=SEED, **batch_settings)
    effective, micro, drop_last = batch_settings.values()
    for position in positions:
        for update in (position, position + 1):
            expected = expected_update(length, effective, micro, update, drop_last=drop_last)
            assert lists(data.batch(at(update))) == expected


@given(shapes(), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_reads_each_sample_once(shape, epoch):
    length, batch_settings = shape
    data = TrainingData(torch.arange(length), seed=SEED, **batch_settings)
    batching = data.batching
    updates = range(epoch * batching.updates_per_epoch, (epoch + 1) * batching.updates_per_epoch)
    batches = [lists(data.batch(at(update), last=updates[-1] + 1)) for update in updates]
    read = [index for update in batches for micro in update for index in micro]
    assert read == epoch_order(SEED, epoch, length)[: batching.samples_per_epoch]
    sizes = [sum(map(len, update)) for update in batches]
    assert set(sizes[:-1]) <= {batching.effective_batch_size}
    # A run counts the same samples.
    counted = Run(
        updates_per_epoch=batching.updates_per_epoch,
        samples_per_epoch=batching.samples_per_epoch,
        effective_batch_size=batching.effective_batch_size,
    )
    first, last = (counted.iteration_after(update).sample for update in (updates[0], updates[-1] + 1))
    assert sum(sizes) == last - first == batching.samples_per_epoch
    if batch_settings["drop_last"]:
        assert set(sizes) == {batching.effective_batch_size}


@given(shapes(), shapes(), st.integers(0, 5))
@settings(deadline=None)
def test_augmentation_is_a_function_of_seed_epoch_and_index(shape, other, start):
    """It does not depend on the sample's batch or on the update at which loading starts."""
    length, ours = shape
    _, theirs = other
    theirs = {**theirs, "effective_batch_size": min(theirs["effective_batch_size"], length), "drop_last": False}

    def samples(batch_settings, first):
        """Return each sample of an epoch that was read, by its index; loading begins at the update `first`."""
        data = TrainingData(Augmenting(length), seed=SEED, **batch_settings)
        end = data.batching.updates_per_epoch
        updates = range(min(first, end - 1), end)
        batches = [micro for update in updates for micro in data.batch(at(update))]
        return {int(row[0]): row[1:] for batch in batches for row in zip(*batch, strict=True)}

    whole, part = samples(theirs, 0), samples(ours, start)
    assert len(whole) == length
    assert part.keys() <= whole.keys()
    assert all(same(part[index], whole[index]) for index in part)


def test_augmentation_differs_between_samples_epochs_and_seeds():
    read = [
        tuple(float(part.flatten()[0]) for part in row[1:])
        for seed in (0, 1)
        for epoch in (0, 1)
        for row in zip(*TrainingData(Augmenting(6), seed=seed, effective_batch_size=6).batch(at(epoch))[0], strict=True)
    ]
    for column in zip(*read, strict=True):
        assert len(set(column)) == 24


# With workers. Warnings are errors here: a loader that was not shut down or a fork that might hang fails the test.


@pytest.mark.parametrize(
    ("length", "start", "batch_settings"),
    [
        (11, 0, {"effective_batch_size": 4, "max_batch_size": 3}),
        (11, 2, {"effective_batch_size": 4, "drop_last": True}),
        (7, 5, {"effective_batch_size": 3, "max_batch_size": 2}),
    ],
)
def test_two_workers_load_the_same_batches_as_none(length, start, batch_settings):
    alone, helped = (
        TrainingData(Augmenting(length), seed=SEED, num_workers=workers, **batch_settings) for workers in (0, 2)
    )
    order = [*range(start, start + 5), 1, 2]  # over an epoch's end, and back
    for update in order:
        assert same(alone.batch(at(update), last=start + 5), helped.batch(at(update), last=start + 5))
    helped.close()
    assert multiprocessing.active_children() == []


def states():
    numpy_state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  # the global generators are tested
    return torch.default_generator.get_state().tolist(), numpy_state["key"].tolist(), random.getstate()


def test_workers_leave_the_generators_of_the_step_alone():
    torch.rand(3)
    before = states()
    data = TrainingData(Augmenting(8), seed=SEED, effective_batch_size=3, num_workers=2)
    for update in range(3):
        data.batch(at(update), last=3)
    data.close()
    assert states() == before


def test_evaluation_seeds_the_generator_for_each_batch():
    """The numbers that a model draws in evaluation are a function of the seed and the batch."""
    places = []
    for before, workers in ((1, 0), (2, 2)):
        torch.default_generator.manual_seed(before)
        data = EvaluationData(Augmenting(5), seed=SEED, batch_size=3, num_workers=workers)
        places.append([(len(batch[0]), torch.rand(2).tolist()) for batch in data])
    assert places[0] == places[1]
    assert [size for size, _ in places[0]] == [3, 2]
    assert places[0][0][1] != places[0][1][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_reads_no_sample_before_its_start_or_after_the_last_update(workers):
    dataset = Recording(40)
    data = TrainingData(dataset, seed=SEED, effective_batch_size=4, max_batch_size=3, num_workers=workers)
    batches = [lists(data.batch(at(update), last=7)) for update in (5, 6)]
    data.close()  # waits for the workers, and so for all that they read
    assert batches == [chunks(part, 3) for part in chunks(epoch_order(SEED, 0, 40)[20:28], 4)]
    assert dataset.read() == set(epoch_order(SEED, 0, 40)[20:28])
    assert dataset.reads.max() == 1


def test_without_workers_nothing_is_prefetched():
    dataset = Recording(40)
    data = TrainingData(dataset, seed=SEED, effective_batch_size=4)
    data.batch(at(0))
    assert dataset.read() == set(epoch_order(SEED, 0, 40)[:4])


def test_loading_continues_after_close():
    data = TrainingData(torch.arange(8), seed=SEED, effective_batch_size=4, num_workers=2)
    order = epoch_order(SEED, 0, 8)
    assert lists(data.batch(at(0))) == [order[:4]]
    data.close()
    assert multiprocessing.active_children() == []
    assert lists(data.batch(at(1))) == [order[4:]]
    assert lists(data.batch(at(0))) == [order[:4]]
    data.close()


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("after", [0, 1])
def test_loading_continues_after_a_sample_that_failed(place, after):
    order = epoch_order(SEED, 0, 8)
    data = TrainingData(Failing(order[place]), seed=SEED, effective_batch_size=4, max_batch_size=2)
    with pytest.raises(OSError, match="the disk slept"):
        data.batch(at(0))
    assert lists(data.batch(at(after))) == chunks(order[4 * after : 4 * after + 4], 2)


# Collation and evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_collate_of_the_dataset_makes_the_batches(workers):
    data = TrainingData(Collating(6), seed=SEED, effective_batch_size=6, max_batch_size=4, num_workers=workers)
    order = epoch_order(SEED, 0, 6)
    batches = data.batch(at(0), last=1)
    data.close()
    expected = [max(index % 3 + 1 for index in part) for part in (order[:4], order[4:])]
    assert [(batch["longest"], len(batch["samples"])) for batch in batches] == list(zip(expected, (4, 2), strict=True))
    evaluated = list(EvaluationData(Collating(6), seed=SEED, batch_size=2, num_workers=workers))
    assert [batch["longest"] for batch in evaluated] == [2, 3, 3]


def test_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="the dataset has no samples"):
        EvaluationData([], seed=SEED, batch_size=2)


@given(st.integers(1, 12), st.integers(1, 14), st.integers(1, 14))
@settings(deadline=None)
def test_evaluation_is_in_order_with_a_short_last_batch(length, size, other_size):
    data = EvaluationData(torch.arange(length), seed=SEED, batch_size=size)
    assert len(data) == length
    assert lists(data) == chunks(list(range(length)), size)
    assert lists(data) == lists(data)  # a pass takes nothing from the next
    assert lists(data.batched(other_size)) == chunks(list(range(length)), other_size)
    assert lists(data) == chunks(list(range(length)), size)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_augments_each_sample_the_same_in_every_pass_and_batch(workers):
    data = EvaluationData(Augmenting(5), seed=SEED, batch_size=2, num_workers=workers)
    passes = [list(data), list(data), list(data.batched(3))]
    columns = [[torch.cat(column) for column in zip(*batches, strict=True)] for batches in passes]
    alone = [torch.cat(c) for c in zip(*EvaluationData(Augmenting(5), seed=SEED, batch_size=5), strict=True)]
    assert all(same(each, alone) for each in columns)
    assert len(alone[1].unique()) == 10


# Refusals


def test_batch_larger_than_the_dataset_is_refused():
    with pytest.raises(ValueError, match="5 is larger than the training set, which has 4 samples"):
        TrainingData(torch.arange(4), seed=SEED, effective_batch_size=5)
    assert TrainingData(torch.arange(4), seed=SEED, effective_batch_size=4).batching.updates_per_epoch == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


class SizedStream(Stream):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


class Unsized(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("dataset", [Stream(), SizedStream(), Unsized(), iter([1, 2])], ids=lambda d: type(d).__name__)
def test_dataset_that_cannot_be_read_by_index_is_refused(dataset):
    message = f"{type(dataset).__name__} cannot be read by index.*give a dataset with __len__ and __getitem__"
    with pytest.raises(TypeError, match=message):
        TrainingData(dataset, seed=SEED, effective_batch_size=1)
    with pytest.raises(TypeError, match=message):
        EvaluationData(dataset, seed=SEED, batch_size=1)


def test_warnings_are_errors():
    """The tests with workers rely on it."""
    with pytest.raises(UserWarning, match="as if"):
        warnings.warn("as if", UserWarning, stacklevel=1)


@pytest.mark.parametrize("second", [None, torch.zeros(2)], ids=["another type", "another shape"])
def test_samples_that_torch_cannot_collate_are_answered_with_what_to_write(second):
    with pytest.raises((TypeError, RuntimeError)) as raised:
        collate([], [torch.zeros(3), second])
    (note,) = raised.value.__notes__
    assert note.endswith("for other samples, give list a method collate(samples) that returns a batch")
