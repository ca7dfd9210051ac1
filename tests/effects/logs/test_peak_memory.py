"""Peak memory: every key gets the peak since its own last measurement."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether import AfterUpdate, MeasurePeakMemory, TrainState
from noether.core.callbacks import PeakMemoryCallback
from noether.core.reducer import compose
from noether.effects.logs import peak_memory
from noether.effects.logs.peak_memory import PeakMemory, peak_memory_bytes

EVENT = AfterUpdate(samples=4)


@pytest.fixture
def device_peaks(monkeypatch):
    """Future readings of the device, each the peak since the previous reading; and the devices that were read."""
    readings, devices = [], []

    def read(device):
        devices.append(device.type)
        return readings.pop(0)

    monkeypatch.setattr(peak_memory, "peak_memory_bytes", read)
    return readings, devices


def measure(peak, key):
    return peak.measure(MeasurePeakMemory(key=key), TrainState(), EVENT)


def test_a_key_gets_the_peak_since_its_last_measurement(device_peaks):
    device_peaks[0].extend([70, 30, 50])
    peak = PeakMemory()
    assert [measure(peak, "a") for _ in range(3)] == [{"a": 70}, {"a": 30}, {"a": 50}]
    assert device_peaks[1] == ["cpu"] * 3


def test_two_keys_do_not_affect_each_other(device_peaks):
    device_peaks[0].extend([90, 20, 40, 10, 60, 30])
    peak = PeakMemory()
    assert measure(peak, "a") == {"a": 90}
    assert measure(peak, "a") == {"a": 20}
    assert measure(peak, "b") == {"b": 90}  # never measured: since the process started
    assert measure(peak, "a") == {"a": 40}  # measuring b read the 40, but a gets it, too
    assert measure(peak, "a") == {"a": 60}
    assert measure(peak, "b") == {"b": 60}  # the largest of 10, 60 and 30


def test_two_intervals_each_get_the_peak_since_their_own_last_measurement(device_peaks):
    used = [5, 80, 10, 20, 70, 15, 30, 5, 25, 60, 5, 10]  # the peak of each update
    reducer = compose(PeakMemoryCallback(every_n_updates=2), PeakMemoryCallback(every_n_updates=3))
    peak, state, since, seen = PeakMemory(), TrainState(), 0, []
    for update, peak_of_update in enumerate(used, 1):
        since = max(since, peak_of_update)
        state, effects = reducer(state.advance(samples=4), EVENT)
        for effect in effects:
            device_peaks[0].append(since)
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
def test_keys_in_any_order(requests):
    """Reading resets the peak of the device, as on CUDA, but not the peaks of other keys."""
    peak, history, since = PeakMemory(), [], dict.fromkeys("abc", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak_memory, "peak_memory_bytes", lambda device: history[-1])
        for used, key in requests:
            history.append(used)
            assert measure(peak, key) == {key: max(history[since[key] :])}
            since[key] = len(history)


def test_the_device_of_the_params_is_measured(device_peaks):
    device_peaks[0].append(1)
    state = TrainState(params={"weight": torch.empty(2, device="meta")})
    PeakMemory().measure(MeasurePeakMemory(), state, EVENT)
    assert device_peaks[1] == ["meta"]


def test_on_the_cpu_the_peak_of_the_process_is_measured():
    before = peak_memory_bytes(torch.device("cpu"))
    tensor = torch.ones(8_000_000, dtype=torch.float64)
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before
    assert after >= tensor.nbytes
