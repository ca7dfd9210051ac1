"""Built-in metrics: their value where they have one, and a refusal by name where they have not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callbacks import EvaluateCallback, MetricCallback, OfflineLossCallback, TrackOutputsCallback
from noether.core.callbacks.metric_functions import METRICS, MetricInputError, accuracy, binary_accuracy
from noether.core.errors import OutputError
from noether.core.event import AfterEpoch, AfterUpdate
from noether.core.run import Run
from noether.core.state import TrainState
from noether.testing import same

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)
NUMBERS = [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64]


def measure(metric, outputs, targets, sizes=None):
    """Return what `MetricCallback` logs over batches of these sizes."""
    sizes = sizes or [len(targets)]
    batches = list(zip(torch.split(outputs, sizes), torch.split(targets, sizes), strict=True))
    run = Run(data={"val": batches}, forward=lambda state, batch: ({"x": torch.zeros(())}, batch[0]))
    callback = MetricCallback(every_n_epochs=1, dataset_key="val", metric=metric)
    _, effects = callback(TrainState().advance(samples=1).next_epoch(), AfterEpoch(run=run))
    return float(effects[0].values[f"val/{metric}"])


@given(SIZES, st.integers(2, 5), st.integers(0, 2**31), st.sampled_from(NUMBERS), st.sampled_from(["", "one-hot", "1"]))
def test_accuracy_is_the_share_of_right_classes_however_targets_are_written(sizes, classes, seed, dtype, shape):
    rng = np.random.default_rng(seed)
    scores, targets = rng.normal(size=(sum(sizes), classes)), rng.integers(0, classes, size=sum(sizes))
    expected = (scores.argmax(1) == targets).mean()
    written = np.eye(classes)[targets] if shape == "one-hot" else targets[:, None] if shape else targets
    found = measure("accuracy", torch.tensor(scores), torch.tensor(written).to(dtype), sizes)
    assert found == pytest.approx(expected, rel=1e-12)


@given(SIZES, st.integers(0, 2**31), st.sampled_from([*NUMBERS, torch.bool]), st.booleans(), st.booleans())
def test_binary_accuracy_is_that_of_two_classes(sizes, seed, dtype, column, target_column):
    rng = np.random.default_rng(seed)
    logits, targets = torch.tensor(rng.normal(size=sum(sizes))), torch.tensor(rng.integers(0, 2, size=sum(sizes)))
    expected = measure("accuracy", torch.stack([-logits, logits], dim=1), targets, sizes)
    logits, targets = logits[:, None] if column else logits, targets[:, None] if target_column else targets
    assert measure("binary_accuracy", logits, targets.to(dtype), sizes) == pytest.approx(expected, rel=1e-12)


LABELS = torch.tensor([0, 1, 1])
SCORES = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("metric", "outputs", "targets", "message"),
    [
        ("accuracy", torch.randn(3), LABELS, r"accuracy needs scores of two or more classes.*shape \(3,\).*binary_acc"),
        ("accuracy", torch.randn(3, 1), LABELS.float(), r"the outputs have shape \(3, 1\): for one logit per sample"),
        ("accuracy", torch.randn(3, 1), LABELS[:, None].float(), r"use binary_accuracy"),
        ("accuracy", torch.randn(3, 2, 4), torch.zeros(3, 4).long(), r"needs scores of shape \(batch, classes\), but "),
        ("accuracy", torch.randn(3, 4, 4), torch.zeros(3, 4).long(), r"the outputs have shape \(3, 4, 4\)"),
        ("accuracy", torch.randn(()), LABELS, r"accuracy needs scores of shape"),
        ("accuracy", torch.randn(3, 0), LABELS, r"accuracy needs scores of shape"),
        (
            "accuracy",
            SCORES,
            LABELS[:2],
            r"accuracy needs targets of shape \(3,\) or \(3, 1\), or one-hot.* \(2,",
        ),
        ("accuracy", SCORES, LABELS[None], r"but they have shape \(1, 3\)"),
        ("accuracy", SCORES, torch.zeros(3, 3).long(), r"but they have shape \(3, 3\)"),
        ("accuracy", SCORES, torch.tensor([0, 1, 2]), r"whole numbers from 0 to 1, but one of them is 2"),
        ("accuracy", SCORES, torch.tensor([0, 1, -100]), r"but one of them is -100: give a function"),
        ("accuracy", SCORES, torch.tensor([0, 1, 0.5]), r"but one of them is 0.5"),
        ("accuracy", SCORES, torch.tensor([0, 1, math.nan]), r"but one of them is nan"),
        ("accuracy", SCORES, torch.tensor([[1, 0], [0, 1], [1, 1]]), r"a target is \[1, 1\], which is not one-hot"),
        ("accuracy", SCORES, torch.tensor([[1, 0], [0, 1], [0.3, 0.7]]), r"a target is \[0.3, 0.7\], which is not one"),
        ("accuracy", SCORES > 0, LABELS, r"accuracy cannot compare outputs of torch.bool"),
        ("accuracy", SCORES + 0j, LABELS, r"accuracy cannot compare outputs of torch.complex64"),
        ("accuracy", {"scores": SCORES}, LABELS, r"accuracy needs a tensor of outputs, but they are of type dict"),
        ("accuracy", SCORES, [0, 1, 1], r"accuracy needs a tensor of targets, but they are of type list"),
        ("binary_accuracy", SCORES, LABELS, r"the outputs have shape \(3, 2\); for scores of several classes, use acc"),
        (
            "binary_accuracy",
            torch.randn(3, 1, 1),
            LABELS,
            r"needs logits of shape \(batch,\) or \(batch, 1\), but ",
        ),
        (
            "binary_accuracy",
            torch.randn(3),
            LABELS[:2],
            r"needs targets of shape \(3,\) or \(3, 1\), but they ",
        ),
        (
            "binary_accuracy",
            torch.randn(3),
            torch.tensor([0, 1, 0.9]),
            r"whole numbers from 0 to 1, but .* is 0.89",
        ),
        ("binary_accuracy", torch.randn(3), torch.tensor([-1, 1, 1]), r"but one of them is -1"),
    ],
)
def test_a_number_without_meaning_is_refused_by_name(metric, outputs, targets, message):
    with pytest.raises(MetricInputError, match=message) as refused:
        METRICS[metric](outputs, (None, targets))
    assert str(refused.value).startswith(metric)


def test_no_sample_has_no_accuracy():
    assert accuracy(torch.zeros(0, 3), (None, torch.zeros(0).long())).shape == (0,)
    assert binary_accuracy(torch.zeros(0), (None, torch.zeros(0))).shape == (0,)


def test_a_score_of_nan_is_neither_right_nor_wrong():
    scores = torch.tensor([[math.nan, 1.0], [0.0, math.nan], [0.0, math.inf]])
    assert str(accuracy(scores, (None, torch.tensor([0, 0, 1]))).tolist()) == "[nan, nan, 1.0]"
    assert math.isnan(measure("accuracy", scores, torch.tensor([0, 0, 1])))
    assert str(binary_accuracy(torch.tensor([math.nan, -1.0]), (None, LABELS[:2])).tolist()) == "[nan, 0.0]"


@pytest.mark.parametrize(
    ("output", "message"),
    [(torch.ones(2) * 1j, "the output 'a' is complex"), ("text", "the output 'a' is of type str, which has no mean")],
)
def test_an_output_without_a_mean_is_refused_by_name(output, message):
    forward = lambda state, batch: ({"x": torch.zeros(())}, {"a": output})  # noqa: E731  # short
    run = Run(data={"val": [torch.zeros(2)]}, forward=forward)
    offline = OfflineLossCallback(every_n_epochs=1, dataset_key="val", output_patterns_to_log=("a",))
    with pytest.raises(OutputError, match=message):
        offline(TrainState().advance(samples=1).next_epoch(), AfterEpoch(run=run))
    track = TrackOutputsCallback(every_n_updates=1, keys=("a",))
    with pytest.raises(OutputError, match=message):
        track(TrainState().advance(samples=2), AfterUpdate(samples=2, outputs=({"a": output},)))


NUMBERS_OF_ALL_KINDS = st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3e38, -3e38])


@given(
    st.lists(st.tuples(*[NUMBERS_OF_ALL_KINDS] * 3), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_accuracy_of_each_sample_is_that_of_its_first_highest_score(rows, dtype):
    scores = torch.tensor(rows, dtype=dtype)
    targets = torch.arange(len(rows)) % 3
    expected = [
        math.nan if any(map(math.isnan, row)) else float(row.index(max(row)) == index % 3)
        for index, row in enumerate(scores.tolist())
    ]
    assert same(accuracy(scores, (None, targets)), torch.tensor(expected))
    logits, binary = scores[:, 0], targets % 2
    expected = [
        math.nan if math.isnan(row[0]) else float((row[0] > 0) == (index % 3 == 1))
        for index, row in enumerate(scores.tolist())
    ]
    assert same(binary_accuracy(logits, (None, binary)), torch.tensor(expected))


def test_callbacks_take_every_metric_by_its_name():
    callback = EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", *METRICS))
    assert callback.produces[-len(METRICS) :] == tuple(f"val/{name}" for name in METRICS)
