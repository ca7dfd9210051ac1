"""Losses that a loop reports with weights, and loss functions of a session that return one loss or something else."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether import AfterUpdate, Mean, Session, TrainState, on
from noether.core.callbacks import OfflineLossCallback, OnlineLossCallback
from noether.core.pending import set_pending, take_pending
from noether.core.tensors.losses import WeightedLosses
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.session.losses import MicroBatch, mean_losses, named_losses


def make(callbacks, **options):
    """Return a session, and the values that it logs."""
    logged = {}

    def interpret(effects, state, event):
        for effect in effects:
            logged.update(effect.values)

    model = torch.nn.Linear(2, 1)
    return Session(callbacks, interpreter=interpret, model=model, **options), logged


LOSSES = st.dictionaries(
    st.sampled_from("ab"), st.tuples(st.integers(-99, 99), st.sampled_from([None, 0, 1, 2, 30])), min_size=1
)


@given(st.lists(st.tuples(st.integers(1, 9), LOSSES), min_size=1, max_size=5))
def test_the_mean_of_each_reported_loss_has_its_own_denominator(reports):
    """Exact numbers: fractions behave as the floats that a loop reports."""
    parts, terms = [], {}
    for samples, losses in reports:
        given = {name: Mean(math.nan if w == 0 else x, weight=w) for name, (x, w) in losses.items()}
        parts.append(MicroBatch(samples=samples, losses=named_losses(given), outputs=None))
        for name, (loss, weight) in losses.items():
            terms.setdefault(name, []).append((loss, samples if weight is None else weight))
    expected = {}
    for name, pairs in terms.items():
        if total := sum(weight for _, weight in pairs):
            expected[name] = float(Fraction(sum(loss * weight for loss, weight in pairs), total))
    found = mean_losses(parts)
    if any(isinstance(part.losses, WeightedLosses) and part.losses.weights for part in parts) and expected:
        expected["total"] = sum(expected.values())
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)
    else:
        assert {name: x for name, x in found.items() if name != "total"} == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_a_loop_reports_weights_per_micro_batch_and_per_update():
    events = []
    watch = on(AfterUpdate)(lambda state, event: (events.append(event), (state, ()))[1])
    session, logged = make([watch, OnlineLossCallback(every_n_updates=2)])
    session.begin()
    session.micro_batch({"ce": Mean(torch.tensor(1.0), weight=30), "l1": 0.5}, samples=2, of=2)
    session.micro_batch({"ce": Mean(torch.tensor(5.0), weight=torch.tensor(10)), "l1": 2.5}, samples=2, of=2)
    session.update()
    session.update(Mean(torch.tensor(math.nan), weight=0), samples=4)
    session.update({"ce": Mean(torch.tensor(4.0), weight=40), "l1": 0.0}, samples=4)
    assert [event.loss_weights for event in events] == [{"ce": 40, "l1": 4}, {}, {"ce": 40}]
    assert [event.skipped for event in events] == [False, True, False]
    assert {name: float(loss) for name, loss in events[0].losses.items()} == {"ce": 2.0, "l1": 1.5, "total": 3.5}
    assert {key: float(value) for key, value in logged.items()} == {
        "loss/online/ce/U2": 2.0,
        "loss/online/l1/U2": 1.5,
        "loss/online/total/U2": 3.5,
    }


def test_a_loss_function_of_a_session_may_return_one_loss():
    data = {"val": [torch.ones(3, 2), torch.zeros(1, 2)]}
    callback = OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    for loss in (lambda outputs, batch: batch.mean(), lambda outputs, batch: Mean(batch.mean(), weight=len(batch))):
        session, logged = make([callback], data=data, loss=loss)
        session.begin()
        session.update(1.0, samples=4)
        session.end_epoch()
        assert {key: float(value) for key, value in logged.items()} == {"loss/val/loss": 0.75, "loss/val/total": 0.75}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"loss= returned nothing: return a tensor, .* from .*<locals>\.my_loss"),
        (0.5, r"loss= returned a float: return a tensor, or {name: tensor}, without \.item\(\), from .*my_loss"),
        (torch.ones(1), r"<locals>\.my_loss returned the loss 'loss' of shape \(1,\)"),
    ],
    ids=["nothing", "float", "vector"],
)
def test_another_result_of_it_is_refused_with_its_name(result, message):
    def my_loss(outputs, batch):
        return result

    callback = OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    session, _ = make([callback], data={"val": [torch.ones(3, 2)]}, loss=my_loss)
    session.begin()
    session.update(1.0, samples=4)
    with pytest.raises((TypeError, ValueError), match=message):
        session.end_epoch()


def test_a_pending_event_keeps_the_weights():
    losses = WeightedLosses({"ce": torch.tensor(2.0), "total": torch.tensor(2.0)}, {"ce": 30})
    event = AfterUpdate(samples=4, losses=losses, loss_weights=losses.weights)
    state = set_pending(TrainState().advance(samples=4), event)
    _, readings = take_pending(decode_state(encode_state(state)))
    assert (dict(readings["losses"]), readings["loss_weights"]) == (dict(losses), {"ce": 30})


@pytest.mark.parametrize(
    "batch", [["a", "b"], {"weight_of_class": torch.ones(3), "x": torch.ones(2, 2)}], ids=["text", "sizes"]
)
def test_a_loop_gives_the_samples_of_batches_that_do_not_tell_them(batch):
    session, logged = make([OnlineLossCallback(every_n_updates=3)], max_updates=3)
    losses = iter([1.0, 2.0, 6.0])
    for count, _ in enumerate(session.batches([batch] * 3), 1):
        session.update(next(losses), samples=count)
    assert session.state.iteration.sample == 6
    assert session.state.lengths == {"updates_per_epoch": 3}
    assert logged == {"loss/online/total/U3": pytest.approx((1 + 4 + 18) / 6)}
