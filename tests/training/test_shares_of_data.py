"""The ranks of a run read together what one process reads: each sample of an update or an evaluation once, in order."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from noether import AfterUpdate, Run, TrainingIteration, TrainState
from noether.testing import assert_same
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.data.stream_shards import StreamShardError
from noether.training.data.streamed import StreamedData
from noether.training.data.streamed_evaluation import StreamedEvaluationData

SEED = 7


@st.composite
def shapes(draw, longest=17):
    length = draw(st.integers(1, longest))
    effective = draw(st.integers(1, length))
    micro = draw(st.none() | st.integers(1, effective + 2))
    return length, {"effective_batch_size": effective, "max_batch_size": micro, "drop_last": draw(st.booleans())}


class Augmented(Dataset):
    """Each sample with a random number; `collate` leaves every third one out."""

    def __init__(self, length, *, leaves_out=False):
        self.length, self.leaves_out = length, leaves_out

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index), torch.rand(1).item()])

    def collate(self, samples):
        samples = [each for each in samples if not self.leaves_out or each[0] % 3]
        return torch.stack(samples) if samples else torch.zeros(0, 2)


def read(batches):
    """Return the samples of the micro-batches of an update."""
    assert [len(batch) for batch in batches] == list(batches.sizes)
    return torch.cat([torch.zeros(0, 2), *batches])


@given(shapes(), st.booleans(), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=3))
@settings(deadline=None)
def test_ranks_read_the_updates_of_one_process(shape, leaves_out, pieces):
    """A run in several pieces, each on another number of ranks, that begin at any update."""
    length, sizes = shape
    dataset = Augmented(length, leaves_out=leaves_out)
    whole = TrainingData(dataset, seed=SEED, **sizes)
    for world_size, start in pieces:
        ranks = [TrainingData(dataset, seed=SEED, **sizes, rank=r, world_size=world_size) for r in range(world_size)]
        assert all(each.batching == whole.batching for each in ranks)
        for update in range(start, start + 3):
            at = TrainingIteration(update=update)
            parts = [each.batch(at, last=start + 2) for each in ranks]
            assert_same(torch.cat([read(each) for each in parts]), read(whole.batch(at)))
            limit = sizes["max_batch_size"] or length
            assert all(len(batch) <= limit for each in parts for batch in each)
            given_samples = [sum(part.stop - part.start for part in whole.batching.parts(update, r, world_size))
                             for r in range(world_size)]  # fmt: skip
            assert max(given_samples) - min(given_samples) <= 1


def test_a_rank_reads_its_share_only_and_prefetches_over_updates_without_samples():
    reads = torch.zeros(7, dtype=torch.int64).share_memory_()

    class Counted(Augmented):
        def __getitem__(self, index):
            reads[index] += 1
            return super().__getitem__(index)

    data = TrainingData(Counted(7), seed=0, effective_batch_size=3, num_workers=1, shuffle=False, rank=0, world_size=3)
    read_samples = [read(data.batch(TrainingIteration(update=update), last=5)) for update in range(5)]
    assert [each[:, 0].tolist() for each in read_samples] == [[0], [3], [], [0], [3]]
    assert reads.tolist() == [2, 0, 0, 2, 0, 0, 0]
    never = TrainingData(Counted(7), seed=0, effective_batch_size=2, num_workers=1, rank=0, world_size=3)
    assert never.batch(TrainingIteration()) == ()
    data.close()
    never.close()


class Stream(IterableDataset):
    """Samples with random numbers; of several ranks, each yields its own and knows the position of all."""

    def __init__(self, length, rank=0, world_size=1):
        self.length, self.rank, self.world_size, self.at = length, rank, world_size, 0

    def shard(self, rank, world_size):
        return type(self)(self.length, rank, world_size)

    def __iter__(self):
        for start in range(self.at, self.length, self.world_size):
            self.at = start + self.world_size
            if start + self.rank < self.length:
                yield torch.tensor([float(start + self.rank), torch.rand(1).item()])
        self.at = 0

    def state_dict(self):
        return {"at": torch.tensor(self.at)}

    def load_state_dict(self, saved):
        self.at = int(saved["at"])


class Sized(Stream):
    def __len__(self):
        return self.length


def streams(dataset, sizes, world_size, **options):
    return [
        StreamedData(dataset, seed=SEED, **sizes, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@given(st.data())
@settings(deadline=None)
def test_ranks_read_the_stream_of_one_process(data):
    """A run in pieces, each on another number of ranks; all ranks have one memory, that of the whole stream."""
    length, sizes = data.draw(shapes())
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, 8), max_size=2))), 8]
    (whole,) = streams(Sized(length), sizes, 1)
    expected = state = TrainState(callback_states=whole.init(TrainState()))
    for begin, end in pairwise(cuts):
        divisors = [n for n in range(1, 5) if sizes["effective_batch_size"] % n == 0]
        world_size = data.draw(st.sampled_from(divisors))
        ranks = streams(Sized(length), sizes, world_size)
        for _ in range(begin, end):
            expected, batches = whole.next_batches(expected)
            results = [rank.next_batches(state) for rank in ranks]
            rows = [read(each) for _, each in results]
            joined = [rows[i % world_size][i // world_size] for i in range(sum(map(len, rows)))]
            assert_same(torch.stack(joined), read(batches))
            states = [each for each, _ in results]
            if world_size > 1:
                assert_same([each.callback_states for each in states], [states[0].callback_states] * world_size)
            samples = len(joined)
            expected, state = expected.advance(samples=samples), states[0].advance(samples=samples)
            if state.iteration.update % whole.batching.updates_per_epoch == 0:
                expected, state = expected.next_epoch(), state.next_epoch()


class OfOneRank(Sized):
    def state_dict(self):
        return {"at": torch.tensor(self.at), "rank": self.rank}


class OwnCount(Sized):
    """Its position is the number of samples that one rank has read."""

    def __iter__(self):
        for index in range(self.at * self.world_size + self.rank, self.length, self.world_size):
            self.at += 1 + self.rank
            yield torch.tensor([float(index), 0.0])
        self.at = 0


class Whole(Sized):
    shard = property()  # as if it had none


class OfAnotherLibrary(Sized):
    def shard(self, num_shards, index):
        return type(self)(self.length, index, num_shards)


class TooLong(Sized):
    def shard(self, rank, world_size):
        return Sized(self.length * 2, rank, world_size)


REFUSED = {
    "without a shard": (Whole, {}, TypeError, r"Whole is a stream, and each of the 2 ranks would read all of it: give"),
    "another shard": (OfAnotherLibrary, {}, TypeError, r"give it a method shard\(rank, world_size\) that returns"),
    "workers": (Sized, {"num_workers": 1}, TypeError, "set trainer.num_workers: 0"),
    "a batch of 3": (Sized, {"effective_batch_size": 3}, ValueError, "3 is not a multiple of the number of ranks, 2"),
    "a state of a rank": (OfOneRank, {}, StreamShardError, r"OfOneRank.shard\(1, 2\) is not that of the whole stream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stream_that_cannot_be_split_is_refused(case):
    kind, changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        streams(kind(8), {"effective_batch_size": 4} | changes, 2)


def test_a_stream_that_reads_or_ends_elsewhere_is_refused():
    def train(kind, length, updates, **options):
        ranks = streams(kind(length), {"effective_batch_size": 4}, 2, **options)
        states = [TrainState(callback_states=each.init(TrainState())) for each in ranks]
        for _ in range(updates):
            states = [rank.next_batches(state)[0].advance(samples=4) for rank, state in zip(ranks, states, strict=True)]
        digests = []
        for rank, state in zip(ranks, states, strict=True):
            run = Run(world_size=2, gather=lambda _, digest: (digests.append(digest), digests)[1])
            rank(state, AfterUpdate(samples=4, run=run))
        return digests

    assert len(set(train(Sized, 8, 1))) == 1
    with pytest.raises(StreamShardError, match=r"the state_dict of data.train on rank 1 is not that of rank 0"):
        train(OwnCount, 8, 1, name="train")
    with pytest.raises(StreamShardError, match=r"TooLong.shard\(0, 2\) yields more than every 2th of the 8 samples"):
        train(TooLong, 8, 2)
    with pytest.raises(StreamShardError, match=r"without __len__, the stream of several ranks must not end"):
        train(Stream, 6, 3, run_samples=16)


@given(st.integers(1, 14), st.integers(1, 6), st.integers(1, 5))
@settings(deadline=None)
def test_ranks_read_the_batches_of_an_evaluation_in_one_process(length, batch_size, world_size):
    for data in (
        EvaluationData(Augmented(length), seed=SEED, batch_size=batch_size),
        EvaluationData(Augmented(length, leaves_out=True), seed=SEED, batch_size=batch_size),
        StreamedEvaluationData(Sized(length), seed=SEED, batch_size=batch_size),
    ):

        def evaluate(rank, ranks, data=data):
            return [(batch, size, torch.rand(2)) for batch, size in data.with_sizes(rank, ranks)]  # as dropout draws

        whole = evaluate(0, 1)
        shares = [evaluate(rank, world_size) for rank in range(world_size)]
        assert_same([batch for share in shares for batch in share], whole)
        assert_same(list(data), [batch for batch, *_ in whole])


@pytest.mark.parametrize("wrong", [-3, 3])
def test_a_stream_of_another_length_than_it_says_is_refused_in_an_evaluation_of_ranks(wrong):
    class Wrong(Stream):
        def __len__(self):
            return self.length + wrong

    data = StreamedEvaluationData(Wrong(8), seed=SEED, batch_size=2)
    with pytest.raises(ValueError, match=rf"Wrong yields .* samples, and its __len__ is {8 + wrong}: yield all"):
        list(data.with_sizes(rank=0, world_size=2))
