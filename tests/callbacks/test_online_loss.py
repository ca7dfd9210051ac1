"""`OnlineLossCallback`: the sample-weighted mean of the losses since the last firing."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callbacks import OnlineLossCallback
from noether.core.callbacks.online_loss import OnlineLoss
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval
from noether.core.state import TrainState
from noether.core.tensors.means import Mean
from noether.core.tensors.tree import FrozenDict
from noether.testing import same

NAN = math.nan
LOSSES = st.floats(-1e3, 1e3)


def go(callback, updates, state=None):
    """Return the state after `(samples, losses, skipped)` updates, and the values logged at each."""
    state, logs = state or TrainState(), []
    for samples, losses, skipped in updates:
        state = state.advance(samples=samples)
        state, effects = callback(state, AfterUpdate(samples=samples, losses=losses, skipped=skipped))
        logs.append([effect.values for effect in effects])
    return state, logs


@given(st.lists(st.tuples(st.integers(1, 64), LOSSES, st.booleans()), min_size=1, max_size=20), st.integers(1, 5),
       st.booleans())  # fmt: skip
def test_the_weighted_mean_of_every_interval(updates, n, as_tensors):
    made = [(s, {"total": torch.tensor(x, dtype=torch.float64) if as_tensors else x}, skip) for s, x, skip in updates]
    _, logs = go(OnlineLossCallback(every_n_updates=n), made)
    for end in range(1, len(updates) + 1):
        if end % n:
            assert logs[end - 1] == []
            continue
        sizes, losses, skipped = (np.array(column) for column in zip(*updates[end - n : end], strict=True))
        (values,) = logs[end - 1]
        assert list(values) == [f"loss/online/total/U{n}"]
        applied = ~skipped
        expected = np.average(losses[applied], weights=sizes[applied]) if applied.any() else NAN
        np.testing.assert_allclose(values[f"loss/online/total/U{n}"].item(), expected, rtol=1e-12, atol=1e-12)


@given(st.lists(st.tuples(st.integers(1, 64), LOSSES), min_size=1, max_size=20), st.integers(1, 100))
def test_the_mean_of_an_interval_in_samples(updates, n):
    _, logs = go(OnlineLossCallback(every_n_samples=n), [(s, {"a": x}, False) for s, x in updates])
    since, sample = [], 0
    for (size, loss), values in zip(updates, logs, strict=True):
        since.append((size, loss))
        crossed = (sample + size) // n > sample // n
        sample += size
        assert bool(values) == crossed
        if crossed:
            sizes, losses = zip(*since, strict=True)
            expected = np.average(losses, weights=sizes)
            np.testing.assert_allclose(values[0][f"loss/online/a/S{n}"].item(), expected, rtol=1e-12, atol=1e-12)
            since = []


def test_a_loop_of_the_users_own_gives_losses_their_weights():
    callback = OnlineLossCallback(every_n_updates=3)
    state, effects = TrainState(), ()
    for loss, tokens in ((1.0, 10), (NAN, 0), (3.0, 30)):
        event = AfterUpdate(samples=4, losses={"ce": Mean(torch.tensor(loss), weight=tokens)})
        state, effects = callback(state.advance(samples=4), event)
    assert effects[0].values == {"loss/online/ce/U3": 2.5}


def test_single_precision_losses_are_summed_in_double():
    losses = [torch.tensor(1e8), torch.tensor(1.0)] * 50
    _, logs = go(OnlineLossCallback(every_n_updates=100), [(1, {"total": loss}, False) for loss in losses])
    value = logs[-1][0]["loss/online/total/U100"]
    assert value.dtype == torch.float64
    assert value.item() == 50000000.5


def test_the_graph_of_a_loss_is_not_kept():
    loss = torch.ones((), requires_grad=True) * 2
    state, _ = go(OnlineLossCallback(every_n_updates=2), [(1, {"total": loss}, False)])
    kept = state.memory("OnlineLossCallback/U2")["sums"]["total"]
    assert not kept.requires_grad


def test_firings_at_an_epoch_and_at_the_end():
    callback = OnlineLossCallback(every_n_epochs=1, at_end=True)
    state, logs = go(callback, [(3, {"total": 1.0}, False), (1, {"total": 5.0}, False)])
    assert logs == [[], []]
    state, effects = callback(state.next_epoch(), AfterEpoch())
    assert effects[0].values == {"loss/online/total/E1": 2.0}
    assert callback(state, AfterTraining()) == (state, ())
    state, _ = go(callback, [(2, {"total": 7.0}, False)], state)
    state, effects = callback(state, AfterTraining())
    assert effects[0].values == {"loss/online/total/E1": 7.0}


UPDATES = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.dictionaries(st.sampled_from(["a", "b", "total"]), st.integers(-99, 99), max_size=3),
        st.dictionaries(st.sampled_from(["a", "b"]), st.integers(1, 50)),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(UPDATES)
def test_every_loss_has_its_own_denominator(updates):
    callback, state = OnlineLossCallback(every_n_updates=len(updates)), TrainState()
    terms = {}
    for samples, losses, weights, skipped in updates:
        event = AfterUpdate(samples=samples, losses=losses, loss_weights=weights, skipped=skipped)
        state, effects = callback(state.advance(samples=samples), event)
        for name, loss in losses.items():
            terms.setdefault(name, []).append((loss, 0 if skipped else weights.get(name, samples)))
    if not terms:
        assert effects == ()
        return
    expected = {}
    for name, pairs in terms.items():
        total = sum(weight for _, weight in pairs)
        expected[name] = float(Fraction(sum(loss * weight for loss, weight in pairs), total)) if total else NAN
    others = [mean for name, mean in expected.items() if name != "total"]
    if any(weights for _, _, weights, _ in updates) and others and "total" in expected:
        expected["total"] = sum(others)
    found = {key.split("/")[2]: float(value) for key, value in effects[0].values.items()}
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


def test_a_run_resumes_with_memory_of_an_earlier_version():
    callback = OnlineLossCallback(every_n_updates=2)
    state, _ = go(callback, [(4, {"total": 1.0}, False)])
    memory = FrozenDict(sums=state.memory(callback.name)["sums"], samples=4)
    _, logs = go(callback, [(12, {"total": 5.0}, False)], state.remember(callback.name, memory))
    assert logs[0][0]["loss/online/total/U2"].item() == 4.0


def test_every_named_loss_has_a_key():
    _, logs = go(OnlineLossCallback(every_n_updates=1), [(2, {"total": 3.0, "ce": 1.0, "l2": 2.0}, False)])
    assert logs[0][0] == {"loss/online/total/U1": 3.0, "loss/online/ce/U1": 1.0, "loss/online/l2/U1": 2.0}


def test_nothing_is_logged_without_an_update():
    callback, state = OnlineLossCallback(every_n_epochs=1), TrainState().next_epoch()
    assert callback(state, AfterEpoch())[1] == ()
    assert callback(state, AtEval()) == (state, ())


def test_nan_of_an_applied_update_is_raised():
    callback = OnlineLossCallback(every_n_updates=2)
    with pytest.raises(FloatingPointError) as refused:
        go(callback, [(1, {"total": NAN}, False), (1, {"total": 1.0}, False)])
    assert str(refused.value) == (
        "loss/online/total/U2 is NaN at E0_U2_S2: training has diverged. Lower the learning rate, clip gradients, "
        "skip such updates with trainer.nonfinite: skip, or continue with nan: log"
    )


def test_nan_of_an_applied_update_is_logged_with_nan_log():
    _, logs = go(
        OnlineLossCallback(every_n_updates=1, nan="log"), [(1, {"total": NAN}, False), (1, {"total": 1.0}, False)]
    )
    assert same([values[0]["loss/online/total/U1"].item() for values in logs], [NAN, 1.0])


def test_nan_of_a_skipped_update_does_not_count():
    updates = [(4, {"total": NAN}, True), (2, {"total": 3.0}, False), (8, {"total": math.inf}, True)]
    _, logs = go(OnlineLossCallback(every_n_updates=3), updates)
    assert logs[-1][0]["loss/online/total/U3"].item() == 3.0


def test_an_interval_of_only_skipped_updates_is_nan_without_an_error():
    _, logs = go(OnlineLossCallback(every_n_updates=2), [(4, {"total": NAN}, True)] * 2)
    assert math.isnan(logs[-1][0]["loss/online/total/U2"].item())


def test_an_infinite_mean_is_logged():
    _, logs = go(OnlineLossCallback(every_n_updates=1), [(4, {"total": math.inf}, False)])
    assert logs[0][0]["loss/online/total/U1"].item() == math.inf


def test_the_alias():
    assert OnlineLoss is OnlineLossCallback
