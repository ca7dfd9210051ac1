"""The runs of a law have the model, losses, outputs, groups and datasets of the user, and errors say what to give."""

import math
from typing import NamedTuple

import pytest
import torch
from law_examples import rotate
from torch import nn

from noether import AfterUpdate, Run, TrainingIteration, callback, compose, every_n_epochs, every_n_updates, log, on
from noether.core.callbacks import (
    BestCheckpointCallback,
    CheckpointCallback,
    EMACallback,
    EvaluateCallback,
    LrCallback,
    MetricCallback,
    MetricEarlyStopping,
    OfflineLossCallback,
    OnlineLossCallback,
    TrackOutputsCallback,
)
from noether.testing import (
    LawError,
    Reading,
    Trace,
    check_composition,
    check_independent,
    check_pure,
    check_rank_agreement,
    check_resumable,
    drive,
    effects_of,
    same,
)
from noether.testing.models import TracedModel
from noether.testing.strategies import runs

LAWS = [(check_pure,), (check_resumable,), (check_rank_agreement,)]


class Outputs(NamedTuple):
    scores: torch.Tensor
    labels: torch.Tensor


@every_n_updates(2)
def weight_norm(state, event):
    return log(state, event, {"weight_norm": state.params["weight"].norm()})


@every_n_updates(2)
def weight_norm_of_8_bits(state, event):
    return log(state, event, {"weight_norm": state.params["weight"].float().norm()})


@every_n_updates(1)
def ratio(state, event):
    return log(state, event, {"ratio": event.losses["mse"] / event.losses["total"]})


@on(AfterUpdate)
def score(state, event):
    return log(state, event, {"score": sum(step.scores.mean() for step in event.outputs)})


@every_n_epochs(1)
def running_mean(state, event):
    return log(state, event, {"mean": state.buffers["running_mean"].mean()})


@on(AfterUpdate)
def rate(state, event):
    return log(state, event, {"rate": event.lr["body"] + event.weight_decay["head"]})


nested = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
batches = [(torch.randn(5, 3), torch.arange(5) % 4), (torch.randn(2, 3), torch.tensor([3, 0]))]
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(torch.randn(5, 3), torch.arange(5) % 4), batch_size=2, shuffle=True
)
SOUND = {
    "a shuffling loader": (
        MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy"),
        {"model": nn.Linear(3, 4), "data": {"val": loader}},
    ),
    "a dtype of 8 bits": (weight_norm_of_8_bits, {"model": {"weight": torch.ones(2).to(torch.float8_e4m3fn)}}),
    "a weight": (weight_norm, {"model": nn.Linear(2, 1)}),
    "weights by name": (weight_norm, {"model": {"weight": torch.ones(3)}}),
    "a loss": (ratio, {"losses": ("mse",)}),
    "a loss as a multiple": (ratio, {"losses": {"mse": 0.25}}),
    "outputs of a type": (score, {"outputs": Outputs(torch.rand(4), torch.arange(4))}),
    "a buffer": (running_mean, {"model": nn.BatchNorm1d(3)}),
    "groups": (rate, {"groups": ("body", "head")}),
    "groups of a callback": (LrCallback(every_n_updates=1), {"groups": ("body",)}),
    "an output": (TrackOutputsCallback(every_n_updates=1, keys=("x",)), {"outputs": {"x": torch.ones(4)}}),
    "a synthetic output": (TrackOutputsCallback(every_n_updates=1, keys=("residual",)), {}),
    "a sub-module": (EMACallback(every_n_epochs=1, target_factors=(0.9,), model_paths=("encoder",)), {"model": nested}),
    "a synthetic sub-module": (EMACallback(every_n_epochs=1, target_factors=(0.9,), model_paths=("encoder",)), {}),
    "a saved sub-module": (CheckpointCallback(every_n_epochs=1, save_weights=True, model_names=("encoder",)), {}),
    "the best of a sub-module": (
        BestCheckpointCallback(every_n_epochs=1, metric_key="loss/x", model_names=("encoder",)), {},
    ),
    "a dataset": (
        MetricCallback(every_n_epochs=1, dataset_key="exam", metric="accuracy"),
        {"model": nn.Linear(3, 4), "data": {"exam": batches}},
    ),
    "a dataset and a forward": (
        OfflineLossCallback(every_n_epochs=1, dataset_key="exam"),
        {"data": {"exam": batches}, "forward": lambda state, batch: ({"total": state.params["w"].sum()}, batch)},
    ),
    "losses of a dataset": (
        EvaluateCallback(every_n_epochs=1, dataset_key="exam", measures=("loss",)), {"losses": ("mse",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "law"), rotate([(kind,) for kind in SOUND], LAWS))
def test_a_sound_callback_passes_with_its_model(kind, law):
    tested, given = SOUND[kind]
    law(tested, **given, examples=8)


def test_laws_about_several_callbacks_take_a_model():
    given = {"model": nn.Linear(2, 1), "losses": ("mse",), "groups": ("body", "head"), "examples": 8}
    check_independent(weight_norm, ratio, **given)
    check_composition(weight_norm, ratio, rate, **given)


@pytest.mark.parametrize(
    ("tested", "given", "right"),
    [
        (weight_norm, {}, "give model="),
        (running_mean, {}, "give model="),
        (ratio, {}, r"give losses=\('mse',\)"),
        (rate, {"groups": ("body",)}, r"give groups=\('head',\)"),
        (on(AfterUpdate)(lambda s, e: log(s, e, {"x": e.outputs[0]["y"].mean()})), {}, "give outputs={'y'"),
        (TrackOutputsCallback(every_n_updates=1, keys=("residual",)), {"outputs": {"x": torch.ones(1)}}, "outputs={"),
    ],
    ids=["param", "buffer", "loss", "group", "output", "tracked output"],
)  # fmt: skip
def test_the_error_of_a_missing_name_says_what_to_give(tested, given, right):
    with pytest.raises(LawError, match=right) as error:
        check_resumable(tested, **given)
    assert isinstance(error.value.__cause__, LookupError)


def test_an_error_that_no_argument_avoids_stays_as_it_is():
    @every_n_updates(1)
    def reads_its_own_table(state, event):
        return log(state, event, {"x": {}["mse"]})

    with pytest.raises(KeyError, match="mse") as error:
        check_pure(reads_its_own_table)
    assert any(note.startswith("in a run to ") for note in error.value.__notes__)


@callback("strict", consumes=("loss/x",))
@every_n_updates(1)
def refuses_nan_of_a_metric(state, event):
    if not math.isfinite(state.metrics["loss/x"].value):
        raise FloatingPointError("loss/x is not finite")
    return log(state, event, {"y": 1.0})


@every_n_updates(1)
def refuses_nan_of_a_loss(state, event):
    if not math.isfinite(event.losses["total"]):
        raise RuntimeError("diverged")
    return log(state, event, {"y": 1.0})


REFUSES_NAN = {
    "loss": refuses_nan_of_a_loss,
    "metric": refuses_nan_of_a_metric,
    "OnlineLossCallback": OnlineLossCallback(every_n_updates=2),
    "MetricEarlyStopping": MetricEarlyStopping(every_n_updates=1, metric_key="loss/x", tolerance=2, nan="raise"),
}


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.parametrize(("name", "law"), rotate([(name,) for name in REFUSES_NAN], LAWS))
def test_the_error_of_a_callback_that_refuses_nan_names_finite_runs(name, law):
    tested = REFUSES_NAN[name]
    with pytest.raises(LawError, match=r"not finite; if that is meant, check it with traces=runs\(finite=True\)"):
        law(tested, examples=200)
    law(tested, traces=runs(finite=True), examples=20)


def test_an_error_that_finite_values_do_not_avoid_stays_as_it_is():
    @every_n_updates(1)
    def fails(state, event):
        raise FloatingPointError("always")

    with pytest.raises(FloatingPointError, match="always"):
        check_pure(fails)


def test_runs_take_a_model_too():
    given = {"model": nn.Linear(2, 1), "losses": ("mse",)}
    check_pure(compose(weight_norm, ratio), traces=runs(finite=True, **given), examples=10)
    check_pure(compose(weight_norm, ratio), traces=runs(finite=True), **given, examples=10)


def test_a_frozen_parameter_does_not_change_and_dtypes_and_shapes_stay():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1).half())
    model[0].weight.requires_grad_(requires_grad=False)
    example = {"scores": torch.rand(4, dtype=torch.bfloat16), "labels": torch.arange(6).reshape(2, 3), "text": "x"}
    traced = TracedModel().with_arguments(model=model, outputs=example)
    run = Run(end=TrainingIteration(epoch=1), updates_per_epoch=3, samples_per_epoch=6, effective_batch_size=2)
    trace = Trace(run, (Reading((0.5, 2.0)),)).with_model(traced)
    driven = drive(compose(), trace)
    first, last = driven.states[0], driven.states[-1]
    assert trace.run.frozen == {"0.weight"}
    for name, param in model.named_parameters():
        assert torch.equal(first.params[name], param)
        assert (last.params[name].shape, last.params[name].dtype) == (param.shape, param.dtype)
        assert torch.equal(last.params[name], param) == (name == "0.weight")
    assert {name: buffer.dtype for name, buffer in last.buffers.items()} == {
        name: buffer.dtype for name, buffer in model.named_buffers()
    }
    steps = [step for event in driven.events if isinstance(event, AfterUpdate) for step in event.outputs]
    assert len({tuple(step["scores"].tolist()) for step in steps}) > 1
    for step in steps:
        assert (step["scores"].shape, step["scores"].dtype) == ((4,), torch.bfloat16)
        assert sorted(step["labels"].flatten().tolist()) == list(range(6))
        assert step["text"] == "x"


def test_the_runs_do_not_change_the_model():
    model = nn.Linear(2, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_pure(weight_norm, model=model, examples=5)
    assert same(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modl": 1}, "unknown argument 'modl'; the model of a run has data, forward, groups, losses, model, outputs"),
        ({"model": 3}, "model: give a torch.nn.Module or its parameters by name, not int"),
        ({"model": nn.Linear(2, 1, device="meta")}, "model: weight has no values yet"),
        ({"model": nn.LazyLinear(1)}, "model: weight has no values yet"),
        ({"losses": ()}, r"losses: give names, like losses=\('mse',\)"),
        ({"groups": (1,)}, "groups: give names"),
        ({"data": [1]}, "data: give datasets by key"),
        ({"data": {"val": iter([1])}}, "data: 'val' can be iterated once only"),
    ],
    ids=["unknown", "model", "meta", "lazy", "losses", "groups", "data", "iterator"],
)
def test_wrong_arguments_are_refused(given, message):
    for refuse in (lambda: check_pure(ratio, **given), lambda: runs(**given)):
        with pytest.raises(TypeError, match=message):
            refuse()


def test_a_single_name_is_one_name():
    assert dict(TracedModel().with_arguments(losses="mse").losses) == {"total": 1.0, "mse": 0.5}


def test_losses_are_multiples_of_the_total():
    run = Run(end=TrainingIteration(update=1), updates_per_epoch=2, samples_per_epoch=4, effective_batch_size=2)
    trace = Trace(run, model=TracedModel().with_arguments(losses={"mse": 0.25}))
    driven = drive(every_n_updates(1)(lambda state, event: log(state, event, event.losses)), trace)
    (logged,) = effects_of(driven, type(driven.effects[2][0]))
    assert same(dict(logged.values), {"total": torch.tensor(1.0), "mse": torch.tensor(0.25)})
