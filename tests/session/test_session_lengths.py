"""A plain loop over epochs of any lengths: training goes on, and a run that is cut equals the uncut run."""

import logging

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from law_examples import examples
from plain_loop import Loop, Points
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import noether
from noether.core.event import AfterEpoch, AfterUpdate
from noether.effects.checkpoints.state_codec import encode_state
from noether.session.errors import SessionError
from noether.testing import assert_same

POINTS = Points(40, 1)
SAVE = noether.CheckpointCallback(every_n_updates=1, save_weights=True, save_optim=True)
BATCH = 4


class Unsized:
    """Batches of epochs of different lengths."""

    def __init__(self, lengths):
        self.lengths, self.epoch = lengths, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    @property
    def batches(self):
        return self.lengths[self.epoch % len(self.lengths)]

    def __iter__(self):
        order = torch.randperm(len(POINTS))[: BATCH * self.batches].tolist()
        for start in range(0, len(order), BATCH):
            samples = [POINTS[index] for index in order[start : start + BATCH]]
            yield torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


class Sized(Unsized):
    """The same; it announces the length of its epoch."""

    def __len__(self):
        return self.batches


class Wrong(Unsized):
    """The same; it announces another length."""

    def __len__(self):
        return 3


class Samples(IterableDataset):
    """Samples of epochs of different lengths, of which one is announced."""

    def __init__(self, lengths):
        self.lengths, self.epoch = lengths, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return BATCH * self.lengths[0]

    def __iter__(self):
        return (POINTS[index] for index in range(BATCH * self.lengths[self.epoch % len(self.lengths)]))


class Sampler:
    """Indices of batches, another number in each epoch."""

    def __init__(self, lengths):
        self.lengths, self.epoch = lengths, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.lengths[self.epoch % len(self.lengths)]

    def __iter__(self):
        order = torch.randperm(len(POINTS)).tolist()
        return (order[BATCH * index : BATCH * (index + 1)] for index in range(len(self)))


LOADERS = {
    "unsized": Unsized,
    "sized": Sized,
    "wrong": Wrong,
    "stream": lambda lengths: DataLoader(Samples(lengths), batch_size=BATCH),
    "sampler": lambda lengths: DataLoader(POINTS, batch_sampler=Sampler(lengths)),
}


def callbacks():
    return [
        noether.OnlineLossCallback(every_n_epochs=1),
        noether.OnlineLossCallback(every_n_samples=12),
        noether.ProgressCallback(every_n_epochs=1),
        noether.EtaCallback(every_n_updates=2),
        noether.EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("accuracy",)),
        SAVE,
    ]


# A stream may announce another length than it has: torch warns of it, and the session has to train on.
@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
@examples(25, quick=8)
@given(
    kind=st.sampled_from(sorted(LOADERS)),
    lengths=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    accumulation=st.sampled_from([1, 2, 3]),
    end=st.sampled_from([{"max_epochs": 3}, {"max_updates": 8}, {"max_samples": 30}]),
    leave=st.sampled_from(["raise", "break"]),
    cuts=st.lists(st.integers(1, 14), max_size=3),
)
@example(kind="sampler", lengths=[1, 1, 2], accumulation=1, end={"max_updates": 8}, leave="break", cuts=[8])
@example(kind="unsized", lengths=[3, 5, 1], accumulation=2, end={"max_samples": 30}, leave="break", cuts=[5, 5])
def test_uncut_equals_cut_anywhere(tmp_path_factory, kind, lengths, accumulation, end, leave, cuts):
    path = tmp_path_factory.mktemp("runs")
    whole, cut = (
        Loop(
            path / name,
            callbacks(),
            accumulation=accumulation,
            loader=lambda: LOADERS[kind](lengths),
            settings=end,
        )
        for name in ("whole", "cut")
    )
    whole.train()
    for update in sorted(cuts):
        cut.train(cut=update, leave=leave)
    cut.train()
    assert_same(cut.result(), whole.result())
    assert cut.log == whole.log
    if "max_epochs" in end:
        updates = sum(-(-length // accumulation) for length in lengths)
        assert whole.session.state.iteration == noether.TrainingIteration(3, updates, BATCH * sum(lengths))


def train(loader, *callbacks, lines=None, **settings):
    """Train a session over a loader, and return it with the events and the counts of each."""
    seen = []
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    interpreter = lambda effects, state, event: seen.append((type(event), str(state.iteration), effects))  # noqa: E731  # the test reads better in one line
    session = noether.Session(callbacks, model=model, optimizer=optimizer, interpreter=interpreter, **settings)
    for x, _ in session.batches(loader):
        optimizer.step()
        session.update(model(x).mean())
    return session, seen


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", ["sized", "wrong", "stream", "sampler"])
def test_a_change_is_named_in_one_line(kind, caplog):
    _, seen = train(LOADERS[kind]([3, 3, 2, 5]), max_epochs=4)
    assert [at for kind, at, _ in seen if kind is AfterEpoch] == ["E1_U3_S12", "E2_U6_S24", "E3_U8_S32", "E4_U13_S52"]
    (line,) = warnings_in(caplog)
    assert "epoch 2 ha" in line
    assert "2 updates, not updates_per_epoch=3: the session ignores updates_per_epoch" in line


def test_an_epoch_with_more_batches_than_the_first_is_named_when_it_has_them(caplog):
    train(Wrong([3, 5]), max_epochs=2)
    (line,) = warnings_in(caplog)
    assert "epoch 1 has more updates than updates_per_epoch=3: the session ignores" in line


def test_lengths_that_hold_are_not_forgotten(caplog):
    session, _ = train(Sized([3]), max_epochs=3)
    assert session.run.updates_per_epoch == 3
    assert session.state.lengths == {"updates_per_epoch": 3}
    assert not warnings_in(caplog)


def test_samples_that_are_counted_otherwise_are_forgotten_and_updates_are_not(caplog):
    run = noether.Run(batch_size=lambda batch: 10 * len(batch[0]))
    session, _ = train(DataLoader(POINTS, batch_size=10), max_epochs=2, run=run)
    (line,) = warnings_in(caplog)
    assert (
        "epoch 0 had 400 samples, not samples_per_epoch=40: the session ignores samples_per_epoch, effective_batch_size"
        in line
    )
    assert session.state.lengths == {"updates_per_epoch": 4}


@pytest.mark.parametrize("cut", [2, 4], ids=["middle of an epoch", "end of an epoch"])
@pytest.mark.parametrize("batches", [1, 2, 3, 6])
def test_a_resumed_loop_with_another_length_goes_on(tmp_path, cut, batches, caplog):
    def loop(batches):
        return Loop(tmp_path / "run", [SAVE], loader=lambda: DataLoader(Points(BATCH * batches, 1), BATCH))

    loop(4).train(cut=cut)
    caplog.clear()
    resumed = loop(batches)
    at = resumed.train().state.iteration
    first = 4 if cut == 4 else max(batches, cut)  # the saved run counts all of its first epoch, or goes on in it
    assert (at.epoch, at.update) == (3, first + 2 * batches)
    named = [line for line in warnings_in(caplog) if "the session ignores" in line]
    assert len(named) == 1
    change = f"made with updates_per_epoch=4, samples_per_epoch=16, and this loop has updates_per_epoch={batches}"
    assert change in named[0]
    shorter = [line for line in warnings_in(caplog) if "the epoch ends" in line]
    assert len(shorter) == int(cut == 2 and batches == 1)


def test_a_stop_in_the_last_batch_of_an_epoch_counts_the_epoch_and_one_before_does_not():
    for update, epoch in ((3, 1), (4, 1), (5, 2)):
        stop = noether.FixedUpdateEarlyStopping(stop_at_update=update)
        session, _ = train(Sized([3, 2, 4]), stop, max_epochs=3)
        assert (session.state.iteration.epoch, session.stop is not None) == (epoch, True)


def test_an_epoch_without_batches_is_refused():
    class Empty(Unsized):
        def __iter__(self):
            return iter(())

    with pytest.raises(SessionError, match="yielded 0 batches in epoch 0"):
        train(Empty([1]), max_epochs=2)


def test_a_loop_of_a_framework_counts_epochs_as_it_reports_them(caplog):
    seen = []
    record = lambda effects, state, event: seen.append((type(event), str(state.iteration)))  # noqa: E731  # the test reads better in one line
    session = noether.Session([], model=torch.nn.Linear(2, 1), interpreter=record)
    session.begin(updates_per_epoch=2)
    for updates in (2, 1, 3):
        for _ in range(updates):
            session.micro_batch(0.5, samples=1)
            session.update()
        session.end_epoch()
    ends = [at for kind, at in seen if kind is AfterEpoch]
    assert ends == ["E1_U2_S2", "E2_U3_S3", "E3_U6_S6"]
    assert ["epoch 1 had 1 updates, not updates_per_epoch=2" in line for line in warnings_in(caplog)] == [True]
    # A process that resumes there does not take up the lengths again.
    resumed = noether.Session([], model=torch.nn.Linear(2, 1), interpreter=lambda *_: None)
    resumed.load_state_dict(encode_state(session.state))
    resumed.begin(updates_per_epoch=2, samples_per_epoch=2)
    assert "epoch 3 of the saved run began after 6 updates, not 6" not in caplog.text
    assert resumed.run.updates_per_epoch == 2  # three epochs of two updates would have ended there, too
    session.micro_batch(0.5, samples=1)
    session.update()
    resumed.load_state_dict(encode_state(session.state.next_epoch()))
    resumed.begin(updates_per_epoch=2)
    assert "epoch 4 of the saved run began after 7 updates, not 8" in caplog.text
    assert not hasattr(resumed.run, "updates_per_epoch")


def test_gradients_that_are_carried_over_the_end_of_an_epoch_are_named_once(caplog):
    seen = []
    record = lambda effects, state, event: seen.append((type(event), str(state.iteration)))  # noqa: E731  # the test reads better in one line
    session = noether.Session([], model=torch.nn.Linear(2, 1), interpreter=record)
    session.begin()
    for _ in range(2):
        for _ in range(3):
            session.micro_batch(0.5, samples=1, of=2)
            if session.pending_micro_batches == 2:
                session.update()
        session.end_epoch()
    assert seen[1:] == [
        (AfterUpdate, "E0_U1_S2"),
        (AfterEpoch, "E1_U1_S2"),
        (AfterUpdate, "E1_U2_S4"),
        (AfterUpdate, "E1_U3_S6"),
        (AfterEpoch, "E2_U3_S6"),
    ]
    (line,) = warnings_in(caplog)
    assert (
        "epoch 0 ended inside of an update: the next epoch completes it with the gradients of the last 1 micro" in line
    )


class Shared(IterableDataset):
    """Eight samples, of which each worker reads all, or a share."""

    def __init__(self, shares):
        self.shares = shares

    def __iter__(self):
        info = get_worker_info()
        share = slice(info.id, None, info.num_workers) if self.shares else slice(None)
        return iter(POINTS.inputs[:8][share])


@pytest.mark.parametrize("shares", [True, False])
def test_workers_that_each_read_the_whole_stream_are_named(shares, caplog):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = noether.Session([], interpreter=lambda *_: None, model=model, optimizer=optimizer, max_epochs=1)
    for batch in session.batches(DataLoader(Shared(shares), batch_size=2, num_workers=2)):
        loss = model(batch).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        session.update(loss)
    named = [record.message for record in caplog.records if "each of the 2 workers" in record.message]
    assert session.state.iteration.sample == (8 if shares else 16)
    assert len(named) == (0 if shares else 1)
    assert shares or "yield the share of a worker from __iter__ of Shared" in named[0]
