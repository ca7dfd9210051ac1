"""Metrics of torchmetrics as callbacks measure them: equal to torchmetrics on all data at once, and never changed."""

from itertools import pairwise

import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import classification, regression

from noether import AfterEpoch, BestCheckpointCallback, Run, Session, TrainState, open_run
from noether.core.callbacks import EvaluateCallback, MetricCallback
from noether.core.callbacks.metric_functions import MetricInputError, NamedMetric
from noether.core.callbacks.metric_objects import MetricObject, MetricResultError
from noether.core.callbacks.metric_states import MetricStateError, MetricStates
from noether.core.errors import SettingsError
from noether.core.tensors.tree import have_same_bits
from noether.testing import call_purely, check_pure, check_rank_agreement, check_resumable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")  # of memory, of classes without samples

CLASSES = 4
STATE = TrainState().advance(samples=1).next_epoch()


class LastMean(torchmetrics.Metric):
    """Depends on the order of the batches, and does not say whether its states can be merged."""

    def __init__(self):
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.mean = 0.5 * self.mean + preds.mean()

    def compute(self):
        return self.mean


class Counted(LastMean):
    """Counts batches in an attribute that is no state."""

    full_state_update = False
    batches = 0

    def update(self, preds, target):
        self.batches += 1


def classes(outputs, batch):
    return outputs, batch[1]


def numbers(outputs, batch):
    return outputs[:, 0], batch[1].float()


METRICS = {  # with what their `update` gets
    "accuracy": (lambda: classification.MulticlassAccuracy(CLASSES), classes),
    "f1 of each class": (lambda: classification.MulticlassF1Score(CLASSES, average=None), classes),
    "auroc": (lambda: classification.MulticlassAUROC(CLASSES, thresholds=None), classes),
    "auroc of bins": (lambda: classification.MulticlassAUROC(CLASSES, thresholds=5), classes),
    "calibration": (lambda: classification.MulticlassCalibrationError(CLASSES), classes),
    "mse": (regression.MeanSquaredError, numbers),
    "r2": (regression.R2Score, numbers),
    "spearman": (regression.SpearmanCorrCoef, numbers),
    "pearson": (regression.PearsonCorrCoef, numbers),
    "largest": (torchmetrics.MaxMetric, lambda outputs, batch: outputs[:, 0]),
    "weighted": (
        torchmetrics.MeanMetric,
        lambda outputs, batch: {"value": outputs[:, 0], "weight": batch[1]},
    ),
    "running": (lambda: torchmetrics.aggregation.RunningMean(window=3), lambda outputs, batch: outputs.mean()),
    "named classes": (
        lambda: torchmetrics.ClasswiseWrapper(classification.MulticlassRecall(CLASSES, average=None)),
        classes,
    ),
    "order": (LastMean, classes),
}

BY_BATCH = ("running", "order")


def make_metric(name):
    make, prepare = METRICS[name]
    return make(), prepare


def make_batches(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(sizes), CLASSES, generator=generator).softmax(1)
    targets = torch.randint(0, CLASSES, (sum(sizes),), generator=generator)
    return list(zip(scores.split(sizes), targets.split(sizes), strict=True))


def forward(state, batch):
    return {"loss": batch[0].mean()}, batch[0]


def measure(metric, batches, make=MetricCallback, **measured):
    callback = make(every_n_epochs=1, dataset_key="val", **(measured or {"metric": metric}))
    _, (effect,) = callback(STATE, AfterEpoch(run=Run(data={"val": batches}, forward=forward)))
    return callback, dict(effect.values)


def accumulate(metric, prepare, batches, **keep):
    found, states = MetricObject("metric", metric, prepare), MetricStates(metric, **keep)
    for batch in batches:
        states.add(found.arguments(batch[0], batch))
    return states


def flat(result):
    values = result.values() if isinstance(result, dict) else [result]
    return torch.cat([torch.as_tensor(value).flatten().double() for value in values])


def whole_value(name, batches):
    """Return the value that torchmetrics gives: for all data at once, unless the metric depends on the batches."""
    metric, prepare = make_metric(name)
    together = batches if name in BY_BATCH else [tuple(map(torch.cat, zip(*batches, strict=True)))]
    for batch in together:
        positional, named = MetricObject(name, metric, prepare).arguments(batch[0], batch)
        metric.update(*positional, **named)
    return metric.compute()


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=6)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=6),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    seed=st.integers(0, 99),
)
def test_batches_and_ranks_do_not_change_a_metric(name, sizes, cuts, seed):
    metric, prepare = make_metric(name)
    counts = [each.update_count for each in metric.modules()]
    batches = make_batches(sizes, seed)
    value = flat(accumulate(metric, prepare, batches).value())
    edges = [0, *sorted(min(cut, len(batches)) for cut in cuts), len(batches)]
    ranks = [accumulate(metric, prepare, batches[start:end], keep=True) for start, end in pairwise(edges)]
    parts = [part for rank in ranks for part in rank.parts()]
    for rank in ranks:
        rank.merge(parts)
        assert have_same_bits(flat(rank.value()), value)
    torch.testing.assert_close(value, flat(whole_value(name, batches)), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert [each.update_count for each in metric.modules()] == counts


def test_states_that_merge_exactly_are_exchanged_once():
    batches = make_batches([3, 2, 4], seed=0)
    parts = {name: len(accumulate(*make_metric(name), batches, keep=True).parts()) for name in METRICS}
    assert {name for name, count in parts.items() if count == 1} == {
        "accuracy", "f1 of each class", "auroc", "auroc of bins", "calibration", "spearman",
    }  # fmt: skip
    assert set(parts.values()) == {1, len(batches)}


def test_random_numbers_of_a_metric_are_those_of_one_process():
    boots, batches = torchmetrics.BootStrapper(regression.MeanSquaredError(), num_bootstraps=3), make_batches([3, 4], 0)
    state = torch.get_rng_state()
    one = accumulate(boots, numbers, batches).value()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)  # as a rank draws that has other batches
    rank = accumulate(boots, numbers, batches[:1], keep=True)
    rank.merge([*rank.parts(), *accumulate(boots, numbers, batches[1:], keep=True).parts()])
    assert have_same_bits(flat(rank.value()), flat(one))
    assert one["std"] > 0


def test_keys_are_known_before_training():
    batches = make_batches([5, 4, 3], seed=1)
    f1, recall = classification.MulticlassF1Score(CLASSES), classification.MulticlassRecall(CLASSES, average="none")
    auroc = classification.MulticlassAUROC(CLASSES)
    several = torchmetrics.MetricCollection({"f1": f1, "each": recall})
    expected = {
        ("val/MulticlassF1Score",): f1,
        ("val/auroc",): NamedMetric("auroc", auroc),
        tuple(f"val/recall/{i}" for i in range(CLASSES)): NamedMetric("recall", recall),
        tuple(f"val/named/multiclassrecall_{i}" for i in range(CLASSES)): NamedMetric(
            "named", torchmetrics.ClasswiseWrapper(recall)
        ),
        ("val/f1", *(f"val/each/{i}" for i in range(CLASSES))): several,
        ("val/all/f1", *(f"val/all/each/{i}" for i in range(CLASSES))): NamedMetric("all", several),
    }
    for keys, metric in expected.items():
        callback, values = measure(metric, batches)
        assert sorted(callback.produces) == sorted(values) == sorted(keys)
    both, values = measure(None, batches, EvaluateCallback, measures=("loss", f1, NamedMetric("a", auroc)))
    assert sorted(values) == ["loss/val/loss", "val/MulticlassF1Score", "val/a"]
    assert both.produces[-2:] == ("val/MulticlassF1Score", "val/a")


def test_the_keys_of_stored_weights_end_in_their_name():
    callback = MetricCallback(
        every_n_epochs=1, dataset_key="val", weights="ema=0.9", metric=classification.MulticlassF1Score(CLASSES)
    )
    assert callback.produces == ("val/MulticlassF1Score/ema=0.9",)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (classification.MulticlassConfusionMatrix(3), r"^metric: .*a tensor of shape \(3, 3\).*noether.SaveTensors"),
        (torchmetrics.MeanMetric(), r"MeanMetric.update takes \(value, weight\), not outputs and targets.*`prepare`"),
        (torchmetrics.retrieval.RetrievalMAP(), r"takes \(preds, target, indexes\), not outputs and targets alone"),
        (classification.BinaryF1Score, r"BinaryF1Score is a class: give a metric, BinaryF1Score\(...\)"),
        (NamedMetric("f1", numbers, numbers), r"f1 is a function, which gets outputs and batch: leave `prepare` out"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_construction(metric, message):
    with pytest.raises(SettingsError, match=message):
        MetricCallback(every_n_epochs=1, dataset_key="val", metric=metric)


def test_two_metrics_of_one_key_are_refused():
    f1 = classification.MulticlassF1Score(CLASSES)
    with pytest.raises(SettingsError, match="not a list of different measures"):
        EvaluateCallback(
            every_n_epochs=1, dataset_key="val", measures=(f1, torchmetrics.MetricCollection([f1.clone()]))
        )


def test_an_error_of_torchmetrics_names_the_metric_and_the_callback():
    batches = make_batches([3], seed=0)
    with pytest.raises(RuntimeError, match="same shape") as raised:
        measure(NamedMetric("f1", classification.BinaryF1Score()), batches)
    assert raised.value.__notes__[0] == (
        "in the metric f1 of MetricCallback/E1/val/f1, whose update got (3, 4) float32, (3,) int64 from 0 to 1"
    )
    with pytest.raises(MetricResultError, match=r"the metric roc gives a tuple, and a log takes numbers"):
        measure(NamedMetric("roc", classification.MulticlassROC(CLASSES)), batches)
    with pytest.raises(MetricStateError, match=r"Counted.update changes batches, which is no state.*add_state"):
        measure(NamedMetric("count", Counted()), batches)
    outputs = {"logits": batches[0][0], "extra": batches[0][1]}
    several = Run(data={"val": batches}, forward=lambda state, batch: ({}, outputs))
    callback = MetricCallback(every_n_epochs=1, dataset_key="val", metric=classification.MulticlassF1Score(CLASSES))
    with pytest.raises(MetricInputError, match=r"the model returns logits, extra: give `prepare`, such as def prepare"):
        callback(STATE, AfterEpoch(run=several))
    with pytest.raises(TypeError, match="which a call would change"):
        NamedMetric("f1", classification.BinaryF1Score())(*batches[0])


MODEL = {"data": {"val": make_batches([4, 3, 2], seed=2)}, "forward": forward}


def test_a_measurement_is_pure_and_resumes():
    callback = MetricCallback(every_n_epochs=1, dataset_key="val", metric=classification.MulticlassF1Score(CLASSES))
    call_purely(callback, STATE, AfterEpoch(run=Run(data=MODEL["data"], forward=forward)))
    check_resumable(callback, examples=1, **MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("law", [check_pure, check_resumable, check_rank_agreement])
def test_the_laws_of_callbacks_hold(law):
    metrics = (NamedMetric(name, *make_metric(name)) for name in ("f1 of each class", "spearman", "pearson"))
    law(EvaluateCallback(every_n_updates=2, dataset_key="val", measures=tuple(metrics)), **MODEL)


def test_a_session_measures_and_keeps_the_best_checkpoint(tmp_path):
    model = torch.nn.Linear(CLASSES, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1])  # noqa: E731  # short
    batches = make_batches([6, 5], seed=3)
    f1 = classification.MulticlassF1Score(CLASSES)
    callbacks = [
        MetricCallback(every_n_epochs=1, dataset_key="val", metric=NamedMetric("f1", f1)),
        BestCheckpointCallback(every_n_epochs=1, metric_key="val/f1", mode="higher"),
    ]
    with open_run(tmp_path) as directory:
        session = Session(
            callbacks, model=model, optimizer=optimizer, data={"val": batches}, loss=loss, max_epochs=2,
            directory=directory,
        )  # fmt: skip
        for batch in session.batches(batches):
            value = loss(model(batch[0]), batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            session.update(value)
    outputs = torch.cat([model(batch[0]) for batch in batches]), torch.cat([batch[1] for batch in batches])
    assert float(session.state.metrics["val/f1"].value) == float(f1.clone()(*outputs))
    assert not f1.update_called
    assert next(tmp_path.glob("checkpoints/best_model.val*f1"))
