"""Streams that workers share, and streams of unknown length: a run that is cut anywhere reads the same samples."""

import multiprocessing

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from noether import TrainState
from noether.testing import assert_same
from noether.training.data.streamed import StreamedData

UPDATES = 8


class Stream(IterableDataset):
    """Eleven samples, each with a random number; a worker yields every second one."""

    shares = True

    def __init__(self, length=11, bad=None):
        self.length, self.bad, self.at = length, bad, 0

    def __iter__(self):
        info = get_worker_info() if self.shares else None
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(self.at, self.length):
            self.at = (index + 1) % self.length  # after the last sample, the start of the next epoch
            if index == self.bad:
                raise OSError("broken")
            if index % workers == worker:
                yield self.sample(index)

    def sample(self, index):
        return torch.tensor([float(index), torch.rand(1).item()])

    def state_dict(self):
        return {"at": torch.tensor(self.at)}

    def load_state_dict(self, saved):
        self.at = int(saved["at"])


class Sized(Stream):
    def __len__(self):
        return self.length


class Rewound(Sized):
    """After the last sample it is at its end, and at the start again once a caller asked for one more."""

    def __iter__(self):
        info = get_worker_info()
        while self.at < self.length:
            self.at += 1
            if info is None or self.at % info.num_workers == info.id:
                yield self.sample(self.at - 1)
        self.at = 0


class Whole(Sized):
    shares = False


class Constant(Whole):
    def sample(self, index):
        return torch.zeros(1)


def make_data(kind, workers, **options):
    run_samples = None if kind in {Sized, Rewound} else 3 * UPDATES
    return StreamedData(
        kind(**options), seed=5, effective_batch_size=3, max_batch_size=2, num_workers=workers, name="train",
        run_samples=run_samples,
    )  # fmt: skip


def read(data, state=None, updates=UPDATES):
    """Return the batches of some updates, and the state after each."""
    state = TrainState(callback_states=data.init(TrainState())) if state is None else state
    batches, states = [], [state]
    try:
        for _ in range(updates):
            state, micro = data.next_batches(state)
            batches.append(torch.cat(list(micro)))
            state = state.advance(samples=len(batches[-1]))
            if state.iteration.update % data.batching.updates_per_epoch == 0:
                state = state.next_epoch()
            states.append(state)
    finally:
        data.close()
    return batches, states


@pytest.mark.parametrize("kind", [Sized, Stream])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_that_is_cut_anywhere_reads_the_same_samples(kind, workers):
    whole, states = read(make_data(kind, workers))
    indices = [[int(sample[0]) for sample in batch] for batch in whole]
    flat = [index for batch in indices for index in batch]
    first = [*range(11)] if workers < 2 else [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9]
    assert flat == ([*first, *first] if kind is Sized else [*first, *first, *first][: 3 * UPDATES])
    drawn = {float(sample[1]) for batch in whole for sample in batch}
    assert len(drawn) == len(flat) - (3 if workers == 2 else 0)  # the first three of both workers have equal numbers
    for cut in (range(UPDATES), (3, 4, 6), (1, 3, 4, 6))[workers]:
        rest, ends = read(make_data(kind, workers), states[cut], UPDATES - cut)
        assert_same(rest, whole[cut:])
        assert_same(ends[-1].callback_states, states[-1].callback_states)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_may_be_at_its_end_after_the_last_sample(workers):
    whole, states = read(make_data(Rewound, workers))
    assert [sorted(int(x[0]) for batch in whole[start : start + 4] for x in batch) for start in (0, 4)] == [
        [*range(11)]
    ] * 2
    for cut in range(3, 6):
        rest, ends = read(make_data(Rewound, workers), states[cut], UPDATES - cut)
        assert_same(rest, whole[cut:])
        assert_same(ends[-1].callback_states, states[-1].callback_states)


def test_workers_that_each_read_the_whole_stream_are_refused_at_once():
    with pytest.raises(ValueError, match=r"each of the 2 workers reads all of data.train: yield the share .* of Whole"):
        read(make_data(Whole, 2), updates=2)
    assert multiprocessing.active_children() == []


def test_workers_that_yield_too_many_equal_samples_are_refused_at_the_end_of_the_epoch():
    with pytest.raises(
        ValueError, match=r"the 2 workers of data.train yield more samples in an epoch than its __len__"
    ):
        read(make_data(Constant, 2), updates=4)


@pytest.mark.parametrize(("saved", "now"), [(1, 2), (2, 1), (0, 2), (2, 0)])
def test_another_number_of_workers_is_refused(saved, now):
    state = TrainState(callback_states=make_data(Sized, saved).init(TrainState()))
    if now:
        with pytest.raises(ValueError, match=f"saved with trainer.num_workers: {saved}, and now it is {now}"):
            read(make_data(Sized, now), state)
    lengths = [make_data(Sized, number).batching.lengths["num_workers"] for number in (saved, now)]
    assert lengths == [saved, now]  # which a resume compares


def test_an_error_in_a_worker_says_where_the_stream_was():
    with pytest.raises(OSError, match="broken") as raised:
        read(make_data(Sized, 2, bad=7))
    assert raised.value.__notes__ == [
        "while loading the next sample of data.train (Sized), after 3 samples of worker 1 in this pass"
    ]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_samples_is_refused(workers):
    with pytest.raises(ValueError, match=r"Stream yields no sample, after 0 samples of the run: after its last sample"):
        read(make_data(Stream, workers, length=0))


def test_a_stream_without_length_needs_an_end_in_updates_or_samples():
    with pytest.raises(TypeError, match=r"has no __len__, so its epochs have no known end: end the run by"):
        StreamedData(Stream(), seed=0, effective_batch_size=2)
