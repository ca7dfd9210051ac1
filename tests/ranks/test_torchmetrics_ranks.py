"""Metrics of torchmetrics on several ranks: the bits of one process, one gather for any number of metrics."""

import collections
import functools

import torch
import torch.distributed as dist
from processes import run_on_ranks

from noether import Run, TrainState
from noether.core.callbacks import EvaluateCallback
from noether.core.callbacks.metric_functions import NamedMetric
from noether.core.event import AfterEpoch
from noether.distributed.ranks import join
from noether.testing import assert_same
from noether.training.data.indexed import EvaluationData

CLASSES = 5
STATE = TrainState(params={"w": torch.zeros(1)}).next_epoch()


def first_score(outputs, batch):
    return outputs[:, 0], batch[1].float()


def make_callback():
    import torchmetrics
    from torchmetrics import classification, regression

    metrics = {
        "accuracy": classification.MulticlassAccuracy(CLASSES),
        "f1": classification.MulticlassF1Score(CLASSES),
        "recall": classification.MulticlassRecall(CLASSES, average=None),
        "auroc": classification.MulticlassAUROC(CLASSES),
        "classes": torchmetrics.ClasswiseWrapper(classification.MulticlassF1Score(CLASSES, average=None)),
    }
    regressions = {"mse": regression.MeanSquaredError(), "pearson": regression.PearsonCorrCoef()}
    named = [NamedMetric(name, metric) for name, metric in metrics.items()]
    named += [NamedMetric(name, metric, first_score) for name, metric in regressions.items()]
    return EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", *named))


def forward(state, batch):
    return {"loss": batch[0].mean()}, batch[0]


def make_data(length):
    generator = torch.Generator().manual_seed(length)
    scores = torch.randn(length, CLASSES, generator=generator)
    return torch.utils.data.TensorDataset(scores, torch.randint(0, CLASSES, (length,), generator=generator))


def count_collectives(counts):
    """Count the calls of each collective from now on."""

    def count(name, call, *arguments, **keywords):
        counts[name] += 1
        return call(*arguments, **keywords)

    for name in ("all_gather", "all_reduce", "barrier", "broadcast", "all_gather_object", "all_gather_into_tensor"):
        setattr(dist, name, functools.partial(count, name, getattr(dist, name)))


def metrics_have_the_bits_of_one_process():
    ranks, callback, counts = join(timeout_s=60), make_callback(), collections.Counter()
    count_collectives(counts)
    calls = []

    def gather(what, value):
        calls.append(what)
        return ranks.control.gather(what, value)

    for length in (1, 23):  # fewer batches than ranks, and more
        for data in (
            EvaluationData(make_data(length), seed=0, batch_size=4),
            torch.utils.data.DataLoader(make_data(length), 4),
        ):
            run = {"data": {"val": data}, "forward": forward}
            one = callback(STATE, AfterEpoch(run=Run(**run)))
            assert not counts
            calls.clear()
            shared = Run(**run, rank=ranks.rank, world_size=ranks.world_size, gather=gather)
            assert_same(callback(STATE, AfterEpoch(run=shared)), one)
            assert calls == ["EvaluateCallback/E1/val: results of val"]
            assert counts.keys() == {"all_gather"}
            counts.clear()
    return len(one[1][0].values)


def test_metrics_have_the_bits_of_one_process():
    assert run_on_ranks(metrics_have_the_bits_of_one_process, 2) == [1 + 3 + 2 * CLASSES + 2] * 2
