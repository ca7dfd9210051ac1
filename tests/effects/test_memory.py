"""Peak memory: every key sees the peak since it was last measured itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether import AfterUpdate, MeasurePeakMemory, TrainState
from noether.core.callbacks import PeakMemoryCallback
from noether.core.reducer import compose
from noether.effects.logs import peak_memory as memory
from noether.effects.logs.peak_memory import PeakMemory, peak_memory_bytes

EVENT = AfterUpdate(samples=4)


@pytest.fixture
def reads(monkeypatch):
    """Readings of the device to come, each the peak since the one before; and the devices that were asked."""
    to_come, asked = [], []

    def read(device):
        asked.append(device.type)
        return to_come.pop(0)

    monkeypatch.setattr(memory, "peak_memory_bytes", read)
    return to_come, asked


def measure(peak, key):
    return peak.measure(MeasurePeakMemory(key=key), TrainState(), EVENT)


def test_a_key_has_the_peak_since_it_was_last_measured(reads):
    reads[0].extend([70, 30, 50])
    peak = PeakMemory()
    assert [measure(peak, "a") for _ in range(3)] == [{"a": 70}, {"a": 30}, {"a": 50}]
    assert reads[1] == ["cpu"] * 3


def test_two_keys_do_not_disturb_each_other(reads):
    reads[0].extend([90, 20, 40, 10, 60, 30])
    peak = PeakMemory()
    assert measure(peak, "a") == {"a": 90}
    assert measure(peak, "a") == {"a": 20}
    assert measure(peak, "b") == {"b": 90}  # never measured: since the process began
    assert measure(peak, "a") == {"a": 40}  # b read the 40, a has it all the same
    assert measure(peak, "a") == {"a": 60}
    assert measure(peak, "b") == {"b": 60}  # the largest of 10, 60 and 30


def test_two_intervals_each_see_the_peak_since_their_own_last_measurement(reads):
    used = [5, 80, 10, 20, 70, 15, 30, 5, 25, 60, 5, 10]  # the peak of each update
    reducer = compose(PeakMemoryCallback(every_n_updates=2), PeakMemoryCallback(every_n_updates=3))
    peak, state, since, seen = PeakMemory(), TrainState(), 0, []
    for update, peak_of_update in enumerate(used, 1):
        since = max(since, peak_of_update)
        state, effects = reducer(state.advance(samples=4), EVENT)
        for effect in effects:
            reads[0].append(since)
            since = 0
            seen.append((update, peak.measure(effect, state, EVENT)))
    assert seen == [
        (2, {"memory/peak_bytes/U2": 80}),
        (3, {"memory/peak_bytes/U3": 80}),
        (4, {"memory/peak_bytes/U2": 20}),
        (6, {"memory/peak_bytes/U2": 70}),
        (6, {"memory/peak_bytes/U3": 70}),
        (8, {"memory/peak_bytes/U2": 30}),
        (9, {"memory/peak_bytes/U3": 30}),
        (10, {"memory/peak_bytes/U2": 60}),
        (12, {"memory/peak_bytes/U2": 10}),
        (12, {"memory/peak_bytes/U3": 60}),
    ]


@given(st.lists(st.tuples(st.integers(0, 100), st.sampled_from("abc")), max_size=20))
def test_any_keys_in_any_order(requests):
    """The device forgets its peak when it is read, as CUDA's does; no key does."""
    peak, history, since = PeakMemory(), [], dict.fromkeys("abc", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak_memory_bytes", lambda device: history[-1])
        for used, key in requests:
            history.append(used)
            assert measure(peak, key) == {key: max(history[since[key] :])}
            since[key] = len(history)


def test_the_device_is_that_of_the_params(reads):
    reads[0].append(1)
    state = TrainState(params={"weight": torch.empty(2, device="meta")})
    PeakMemory().measure(MeasurePeakMemory(), state, EVENT)
    assert reads[1] == ["meta"]


def test_on_the_cpu_it_is_that_of_the_process():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(8_000_000, dtype=torch.float64)
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before
    assert after >= held.nbytes
