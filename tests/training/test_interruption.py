"""Signals are caught once, in this process only; they and a time limit leave an evaluation at its next batch."""

import multiprocessing
import signal

import pytest

from noether.core.run import Run
from noether.session.timing import Clock
from noether.training.data.interruptible import DataInterrupt, interruptible
from noether.training.runs.interruption import SIGNALS, Interruption


@pytest.fixture
def ignored():
    """Ignore SIGHUP as `nohup` does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_each_signal_is_caught_and_has_its_exit_code(number, code):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interruption() as interruption:
        assert not interruption()
        signal.raise_signal(number)
        assert (interruption(), interruption.exit_code) == (True, code)
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.usefixtures("ignored")
def test_a_hangup_that_the_process_ignores_stays_ignored():
    with Interruption(second_kills=True) as interruption:
        signal.raise_signal(signal.SIGHUP)
        assert not interruption()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert interruption.exit_code == 143


def test_a_second_interrupt_is_raised_where_a_script_started_the_process_in_the_background():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _send_handlers(connection):
    connection.send([repr(signal.getsignal(each)) for each in SIGNALS])


def test_a_forked_process_has_the_handlers_from_before():
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    before = [repr(signal.getsignal(each)) for each in SIGNALS]  # another library may have installed some
    with Interruption() as interruption:
        process = context.Process(target=_send_handlers, args=[sending])
        process.start()
        assert receiving.recv() == before
        process.join()
        signal.raise_signal(signal.SIGINT)
        assert interruption()


class Batched(list):
    def batched(self, batch_size):
        return [self[at : at + batch_size] for at in range(0, len(self), batch_size)]


def test_the_first_reason_decides_the_exit_code():
    hours = [1]
    with Interruption(clock=Clock(elapsed_s=lambda: 3600 * hours[0])) as interruption:
        interruption.limit_time(2)
        hours[0] = 2.9
        assert (interruption(), interruption.exit_code, interruption.reason) == (False, 0, "")
        hours[0] = 3
        assert interruption()
        signal.raise_signal(signal.SIGTERM)
        assert (interruption(), interruption.exit_code) == (True, 75)
    with Interruption(clock=Clock(elapsed_s=lambda: 3600 * hours[0])) as interruption:
        interruption.limit_time(2)
        signal.raise_signal(signal.SIGTERM)
        hours[0] = 10
        assert (interruption(), interruption.exit_code, interruption.reason) == (True, 143, "")


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("by_time", [True, False])
def test_an_evaluation_is_left_before_the_next_batch(batch_size, by_time):
    hours = [0]
    interruption = Interruption(clock=Clock(elapsed_s=lambda: 3600 * hours[0]))
    interruption.limit_time(2.5)
    data = interruptible(Run(data={"val": Batched(range(6))}), interruption).data["val"]
    batches = data if batch_size is None else data.batched(batch_size)
    with interruption:
        batches = iter(batches)
        next(batches)
        next(batches)
        if by_time:
            hours[0] = 3
        else:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(DataInterrupt):
            next(batches)
    assert len(data) == 6


def test_ranks_leave_an_evaluation_at_the_exchange_after_it():
    """The share of a rank ends; a rank that iterates all batches goes on, because no rank may leave alone."""

    class Batches(list):
        def with_sizes(self, rank=0, world_size=1):
            yield from [(each, 1) for each in self[rank::world_size]]

    def gather(_, value):
        return [value, {"has_left": False, "value": 2}]

    interrupted = []
    run = interruptible(Run(data={"val": Batches(range(6))}, world_size=2, gather=gather), lambda: bool(interrupted))
    share = run.data["val"].with_sizes(0, 2)
    assert next(share) == (0, 1)
    assert run.gather("results", 1) == [1, 2]
    interrupted.append(True)
    assert list(run.data["val"]) == [*range(6)]
    assert [batch for batch, _ in run.data["val"].with_sizes()] == [*range(6)]
    assert list(share) == []
    with pytest.raises(DataInterrupt):
        run.gather("results", 1)


def test_data_without_batched_has_none_when_it_is_interruptible():
    data = interruptible(Run(data={"val": [1, 2]}), lambda: False).data["val"]
    assert list(data) == [1, 2]
    assert not hasattr(data, "batched")
