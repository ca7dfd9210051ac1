"""Callbacks that evaluate: losses and metrics over a dataset do not depend on its batches."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callbacks import (
    EvaluateCallback,
    Mean,
    MetricCallback,
    OfflineLossCallback,
    OnlineLossCallback,
    PeriodicDataIteratorCallback,
    Sum,
)
from noether.core.callbacks.dataset_results import DatasetResults
from noether.core.effect import LogScalars
from noether.core.errors import WeightsError
from noether.core.event import AfterEpoch, AfterUpdate, AtEval
from noether.core.metrics import log
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.losses import read_losses
from noether.testing import same

STATE = TrainState(params={"w": torch.tensor(2.0)}).advance(samples=4).next_epoch()


def squares(state, batch):
    """A forward that scales the input; the loss is the mean of squares."""
    outputs = batch[0] * state.params["w"]
    return {"mse": (outputs - batch[1]).square().mean(), "total": (outputs - batch[1]).square().mean()}, outputs


def error(outputs, batch):
    return (outputs - batch[1]).abs()


def mean_error(outputs, batch):
    return (outputs - batch[1]).abs().mean()


def event(batches, forward=squares, event_type=AfterEpoch, **run):
    return event_type(run=Run(data={"val": batches}, forward=forward, **run))


def values(callback, *arguments, state=STATE, **keywords):
    _, effects = callback(state, event(*arguments, **keywords))
    (effect,) = effects
    assert type(effect) is LogScalars
    return effect.values


def make_batches(x, y, sizes):
    return list(zip(torch.from_numpy(x).split(sizes), torch.from_numpy(y).split(sizes), strict=True))


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(SIZES, st.integers(0, 2**31))
def test_means_over_unequal_batches_equal_those_of_numpy(sizes, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, sum(sizes)))
    logged = values(
        EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", error, mean_error)),
        make_batches(x, y, sizes),
    )
    assert set(logged) == {"loss/val/mse", "loss/val/total", "val/error", "val/mean_error"}
    np.testing.assert_allclose(logged["loss/val/mse"].item(), np.square(2 * x - y).mean(), rtol=1e-12)
    np.testing.assert_allclose(logged["val/error"].item(), np.abs(2 * x - y).mean(), rtol=1e-12)
    np.testing.assert_allclose(logged["val/mean_error"].item(), np.abs(2 * x - y).mean(), rtol=1e-12)


@given(SIZES, st.integers(0, 2**31))
def test_accuracy_is_the_share_of_correct_samples(sizes, seed):
    rng = np.random.default_rng(seed)
    scores, targets = rng.normal(size=(sum(sizes), 4)), rng.integers(0, 4, size=sum(sizes))
    logged = values(MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy"),
                    make_batches(scores, targets, sizes), lambda state, batch: ({}, batch[0]))  # fmt: skip
    np.testing.assert_allclose(logged["val/accuracy"].item(), (scores.argmax(1) == targets).mean(), rtol=1e-12)


def test_accuracy_of_a_batch_that_is_a_dict():
    scores, labels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 1, 0])
    batch = {"image": scores, "label": labels}
    logged = values(MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy"), [batch],
                    lambda state, batch: ({}, batch["image"]))  # fmt: skip
    assert logged["val/accuracy"].item() == 2 / 3


def test_a_batch_without_target_is_refused():
    with pytest.raises(ValueError, match=r"the batch has no target: make it \(inputs, target\), or a dict with one of"):
        values(MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy"), [torch.zeros(2, 2)],
               lambda state, batch: ({}, batch))  # fmt: skip


def test_one_batch_computed_by_hand():
    batches = [
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 5.0, 7.0])),
        (torch.tensor([0.0]), torch.tensor([2.0])),
    ]
    state, effects = OfflineLossCallback(every_n_epochs=1, dataset_key="val")(STATE, event(batches))
    assert effects == (LogScalars({"loss/val/mse": 1.75, "loss/val/total": 1.75}),)  # (1 + 1 + 1 + 4) / 4
    assert state.metrics["loss/val/mse"].iteration == STATE.iteration


@pytest.mark.parametrize("shape", [(3, 1), (2,), (1, 3)])
def test_a_metric_with_another_shape_is_refused(shape):
    def shapeless(outputs, batch):
        return torch.zeros(shape)

    with pytest.raises(ValueError, match="metric/shapeless") as refused:
        values(
            MetricCallback(every_n_epochs=1, dataset_key="val", metric=shapeless), [(torch.zeros(3), torch.zeros(3))]
        )
    right = (
        "return one value for each sample, (batch,), or their mean, (); if only n samples count, "
        "noether.Mean(mean, weight=n)"
    )
    source = "process_data of MetricCallback/E1/val/shapeless"
    assert str(refused.value) == f"{source}: 'metric/shapeless' has shape {shape} for 3 samples; {right}"


def test_a_metric_leaves_out_batches_and_samples_as_its_message_says():
    def of_positive(outputs, batch):
        positive = batch[0][batch[0] > 0]
        return Mean(positive.mean(), weight=len(positive)) if len(positive) else result

    callback = MetricCallback(every_n_epochs=1, dataset_key="val", metric=of_positive)
    batches = [(torch.tensor(xs), torch.zeros(len(xs))) for xs in ([1.0, -9.0], [-9.0], [3.0, 5.0])]
    result = None
    with pytest.raises(TypeError, match=r"for a batch that does not count, noether\.Mean\(0\.0, weight=0\)$"):
        values(callback, batches)
    result = Mean(0.0, weight=0)
    assert values(callback, batches) == {"val/of_positive": 3.0}


def test_difference_to_the_online_loss_of_the_same_interval():
    online, offline = OnlineLossCallback(every_n_epochs=1), OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    state, _ = online(TrainState(params=STATE.params).advance(samples=2), AfterUpdate(samples=2, losses={"mse": 0.75}))
    state, _ = online(state.next_epoch(), AfterEpoch())
    batches = [(torch.tensor([1.0]), torch.tensor([1.0]))]
    assert values(offline, batches, state=state) == {
        "loss/val/mse": 1.0,
        "lossdiff/val/mse": 0.25,
        "loss/val/total": 1.0,
    }
    later = state.advance(samples=2).next_epoch()  # the online loss is no longer current
    assert set(values(offline, batches, state=later)) == {"loss/val/mse", "loss/val/total"}


def stored_average(w):
    return {"weights/ema=0.9": {"params": {"w": torch.tensor(w)}, "buffers": {}}}


def test_the_weights_of_an_average_are_evaluated_and_appear_in_the_key():
    state = STATE.replace(callback_states=stored_average(3.0))
    batches = [(torch.tensor([1.0]), torch.tensor([1.0]))]
    both = EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", error), weights="ema=0.9")
    assert values(both, batches, state=state) == {
        "loss/val/mse/ema=0.9": 4.0,
        "loss/val/total/ema=0.9": 4.0,
        "val/error/ema=0.9": 2.0,
    }
    after, _ = both(state, event(batches))
    assert after.params is state.params
    assert set(both.produces) == {"loss/val/*/ema=0.9", "lossdiff/val/*/ema=0.9", "val/error/ema=0.9"}


def test_unknown_weights_are_refused():
    callback = MetricCallback(every_n_epochs=1, dataset_key="val", metric=error, weights="ema=0.99")
    with pytest.raises(WeightsError, match=r"no weights 'ema=0.99' are stored; stored: none"):
        callback(STATE, event([]))
    with pytest.raises(WeightsError, match=r"stored: ema=0.9\b"):
        callback(STATE.replace(callback_states=stored_average(1.0)), event([]))


def test_an_unknown_dataset_is_refused_with_the_nearest_name():
    callback = MetricCallback(every_n_epochs=1, dataset_key="vall", metric=error)
    with pytest.raises(KeyError, match=r"no dataset 'vall'; datasets: 'val'; did you mean 'val'?"):
        callback(STATE, event([]))


def test_a_standalone_evaluation_fires_at_any_interval():
    callback = MetricCallback(every_n_epochs=7, dataset_key="val", metric=error)
    batches = [(torch.tensor([1.0]), torch.tensor([1.0]))]
    assert callback(STATE, event(batches)) == (STATE, ())
    assert values(callback, batches, event_type=AtEval) == {"val/error": 1.0}


class Rebatched:
    def __init__(self, tensor):
        self.tensor = tensor

    def batched(self, n):
        return [(part, part) for part in self.tensor.split(n)]


def test_another_batch_size():
    seen = []

    def count(outputs, batch):
        seen.append(len(batch[0]))
        return torch.ones(len(batch[0]))

    callback = MetricCallback(every_n_epochs=1, dataset_key="val", metric=count, batch_size=4)
    assert values(callback, Rebatched(torch.zeros(10))) == {"val/count": 1.0}
    assert seen == [4, 4, 2]
    with pytest.raises(
        TypeError, match="MetricCallback/E1/val/count: batch_size: dataset 'val' has no method `batched"
    ):
        callback(STATE, event([]))


class Collect(PeriodicDataIteratorCallback):
    def process_data(self, state, batch, forward):
        return {"whole": batch.sum(), "each": batch, "float": Sum(batch.double().mean())}

    def process_results(self, state, event, results):
        return log(state, event, {self.key("samples"): results["samples"]}), (results,)


def results(batches, **run):
    _, (collected,) = Collect(every_n_epochs=1, dataset_key="val")(STATE, event(batches, None, **run))
    return collected


def test_results_are_summed_or_concatenated_in_order():
    collected = results([torch.tensor([3, 1]), torch.tensor([2]), torch.tensor([7, 8, 9])])
    assert collected["samples"] == 6
    assert collected["whole"].item() == 30
    assert not collected["whole"].is_floating_point()
    assert collected["each"].tolist() == [3, 1, 2, 7, 8, 9]
    assert collected["float"].item() == 2.0 + 2.0 + 8.0


def test_each_mean_covers_the_batches_that_have_it():
    class Several(PeriodicDataIteratorCallback):
        def process_data(self, state, batch, forward):
            return batch

        def process_results(self, state, event, results):
            return state, (results,)

    one = torch.tensor(1.0, dtype=torch.float64)
    batches = [
        {"a": Mean(one), "each": Mean(torch.tensor([1.0, 5.0])), "count": 2, "none": Mean(one * np.nan, weight=0)},
        {"b": Mean(3 * one), "tokens": Mean(one, weight=30), "empty": Mean(one, weight=0), "count": 3},
        {"b": Mean(one), "tokens": Mean(5 * one, weight=torch.tensor(10)), "empty": Mean(2 * one)},
        {"tokens": Mean(one * np.nan, weight=0), "count": torch.tensor(4, dtype=torch.uint8)},
    ]
    run = Run(data={"val": batches}, forward=None, batch_size=lambda batch: 2)
    _, (found,) = Several(every_n_epochs=1, dataset_key="val")(STATE, AfterEpoch(run=run))
    found = {name: float(value) for name, value in found.items()}
    assert np.isnan(found.pop("none"))
    assert found == {"a": 1, "each": 3, "b": 2, "tokens": 2, "empty": 2, "count": 9, "samples": 8}


def test_small_integers_are_summed_without_overflow():
    results = DatasetResults()
    for _ in range(3):
        results.add({"count": torch.tensor(200, dtype=torch.uint8), "correct": torch.tensor(True)}, 1)
    assert results.values() == {"count": 600, "correct": 3, "samples": 3}


FLOATS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
SPECIAL = st.none() | st.none() | st.sampled_from([None, None, np.nan, np.inf, -0.0, 1e38])
WEIGHTS = {
    "whole": lambda rng: int(rng.integers(0, 100)),
    "large": lambda rng: int(rng.integers(2**51, 2**52)),
    "real": lambda rng: rng.uniform(),
    "one": lambda _: 1.0,
}


@pytest.mark.parametrize("kind", WEIGHTS)
@given(terms=st.lists(st.tuples(SPECIAL, FLOATS), min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_sums_have_the_bits_of_sums_of_tensors(kind, terms, seed):
    rng = np.random.default_rng(seed)
    terms = [(rng.normal() if number is None else number, dtype, WEIGHTS[kind](rng)) for number, dtype in terms]
    results, weights, weighted, summed = DatasetResults(), 0, None, None
    for number, dtype, weight in terms:
        term = torch.tensor(number, dtype=torch.float64).to(dtype)
        results.add({"mean": Mean(term, weight=weight), "sum": Sum(term)}, 2)
        summed = term.double() if summed is None else torch.add(summed, term)
        if weight:
            weighted = term.double() * weight if weighted is None else torch.add(weighted, term, alpha=weight)
        elif weighted is None:
            weighted = torch.zeros((), dtype=torch.float64)
        weights += weight
    found = results.values()
    assert same(found["mean"], weighted / weights)
    assert same(found["sum"], summed)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"mse": torch.tensor(0.5)}, "returned 'mse' as one number, .*: return noether.Mean.value., noether.Sum"),
        ({"mse": 0.5}, "returned 'mse' as one number, which may be the mean or the sum of the batch"),
        ({"mse": None}, "returned 'mse' as None: return noether.Mean"),
        ({"mse": "low"}, "returned 'mse' as a str: return noether.Mean"),
        ({"mse": Sum(torch.ones(2))}, r"returned 'mse' as a Sum of shape \(2,\): pass one number, Sum\(tensor.sum"),
        ({"mse": Sum(None)}, "returned 'mse' as None"),
        (None, "returned nothing: return results by name, such as {'error': noether.Mean"),
        (0.5, "returned a float: return results by name"),
        ((torch.ones(2), torch.ones(2)), "returned a tuple: return results by name"),
        (torch.ones(2), "returned a Tensor: return results by name"),
    ],
    ids=["mean-or-sum", "float", "none", "text", "vector-sum", "no-sum", "nothing", "number", "tuple", "tensor"],
)
def test_results_without_meaning_are_refused(result, message):
    class Mine(PeriodicDataIteratorCallback):
        def process_data(self, state, batch, forward):
            return result

    callback = Mine(every_n_epochs=1, dataset_key="val")
    with pytest.raises((TypeError, ValueError), match=f"process_data of Mine/E1/val {message}"):
        callback(STATE, event([torch.zeros(2)]))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda state, batch: None,
            r"test_evaluation\.<lambda>, the forward of the run, returned a NoneType: return \(los",
        ),
        (lambda state, batch: (None, batch), "the forward of the run, returned losses as a NoneType"),
    ],
    ids=["nothing", "no-losses"],
)
def test_another_result_of_forward_is_refused(forward, message):
    callback = OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    with pytest.raises(TypeError, match=message):
        values(callback, [torch.zeros(2)], forward)


def test_forward_may_return_one_loss_or_numbers():
    callback = OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([5.0])]
    for forward in (
        lambda state, batch: (batch.mean(), batch),
        lambda state, batch: ({"loss": batch.mean().item()}, 0),
    ):
        assert values(callback, batches, forward) == {"loss/val/loss": 3.0}


ROW = st.tuples(st.integers(-9, 9), st.sampled_from([0, 1, 2, 5]), st.sampled_from([0, 1, 3]))


@given(st.lists(st.lists(ROW, min_size=1, max_size=4), min_size=1, max_size=5))
def test_weighted_losses_do_not_depend_on_the_batches(batches):
    """Each row has a value and its weights in two losses; a loss is absent from a batch where its weights are 0."""

    def make_forward(batch):
        x, *columns = batch.double().T
        totals = {name: weights.sum() for name, weights in zip("ab", columns, strict=True)}
        sums = {name: (x * weights).sum() for name, weights in zip("ab", columns, strict=True)}
        losses = {"plain": x.mean()} | {name: Mean(sums[name] / n, weight=n) for name, n in totals.items() if n}
        return read_losses(losses, make_forward)

    callback = OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    tensors = [torch.tensor(rows) for rows in batches]
    found = values(callback, tensors, lambda state, batch: (make_forward(batch), None))
    rows = [row for batch in batches for row in batch]
    expected = {"plain": sum(Fraction(x) for x, _, _ in rows) / len(rows)}
    for name, column in (("a", 1), ("b", 2)):
        if total := sum(row[column] for row in rows):
            expected[name] = Fraction(sum(row[0] * row[column] for row in rows), total)
    expected["total"] = sum(expected.values())
    assert {key.removeprefix("loss/val/"): float(value) for key, value in found.items()} == pytest.approx(
        {name: float(mean) for name, mean in expected.items()}, rel=1e-12, abs=1e-12
    )


def test_a_metric_with_a_weight():
    def token_accuracy(outputs, batch):
        return Mean(batch[0].mean(), weight=len(batch[0]) * 10)

    batches = [(torch.ones(1), torch.ones(1)), (torch.zeros(3), torch.zeros(3))]
    found = values(MetricCallback(every_n_epochs=1, dataset_key="val", metric=token_accuracy), batches)
    assert found == {"val/token_accuracy": 0.25}


def test_samples_are_counted_by_the_batch_size_of_the_run():
    assert results([torch.tensor([3, 1])], batch_size=lambda batch: 5)["samples"] == 5


def test_a_result_named_samples_is_refused():
    class Samples(PeriodicDataIteratorCallback):
        def process_data(self, state, batch, forward):
            return {"samples": batch.sum()}

    with pytest.raises(ValueError, match="process_data returned a result named 'samples', which is the number of"):
        Samples(every_n_epochs=1, dataset_key="val")(STATE, event([torch.zeros(1)]))


def test_losses_are_weighted_by_the_batch_size_of_the_run():
    def forward(state, batch):
        return {"total": batch["x"].mean()}, None

    batches = [
        {"scale": torch.ones(7), "x": torch.tensor([1.0, 3.0])},
        {"scale": torch.ones(7), "x": torch.tensor([5.0])},
    ]
    callback = OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    logged = values(callback, batches, forward, batch_size=lambda batch: len(batch["x"]))
    assert logged["loss/val/total"].item() == 3.0


def test_callbacks_with_different_settings_have_different_names():
    a = MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy")
    names = {dataclasses.replace(a, **change).name for change in ({}, {"dataset_key": "test"}, {"metric": error},
             {"weights": "ema=0.9"}, {"every_n_epochs": 2}, {"id": "mine"})}  # fmt: skip
    assert names == {
        "MetricCallback/E1/val/accuracy",
        "MetricCallback/E1/test/accuracy",
        "MetricCallback/E1/val/error",
        "MetricCallback/E1/val/ema=0.9/accuracy",
        "MetricCallback/E2/val/accuracy",
        "mine",
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float32])
def test_means_of_any_dtype_are_in_double_precision(dtype):
    def third(outputs, batch):
        return torch.tensor(1 if batch[0].sum() > 0 else 0, dtype=dtype)

    batches = [(torch.full((200,), sign), torch.zeros(200)) for sign in (1.0, -1.0, 1.0)]
    found = values(MetricCallback(every_n_epochs=1, dataset_key="val", metric=third), batches)["val/third"]
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(2 / 3, rel=1e-12)


def results_of(*batches):
    class Collect(PeriodicDataIteratorCallback):
        def process_data(self, state, batch, forward):
            return {"error": batch}

        def process_results(self, state, event, results):
            return log(state, event, {"error": results["error"].mean()})

    run = Run(data={"val": batches}, forward=None, batch_size=lambda batch: 4)
    return Collect(every_n_epochs=1, dataset_key="val", id="mine")(TrainState().next_epoch(), AfterEpoch(run=run))


@pytest.mark.parametrize(
    "batches", [(torch.tensor(3), Mean(torch.tensor(0.5))), (Mean(0.5), torch.ones(4)), (torch.ones(4), Sum(2.0))]
)
def test_a_result_that_is_combined_in_two_ways_is_refused(batches):
    with pytest.raises(
        ValueError, match=r"^process_data of mine returned 'error' as .* for one batch, and as .* for ano"
    ):
        results_of(*batches)


def test_shapes_that_cannot_be_concatenated_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"^process_data of mine returned 'error' in shapes that cannot be concatenated"
    ):
        results_of(torch.ones(4, 2), torch.ones(4, 3))
