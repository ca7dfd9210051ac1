import math

import pytest
import torch

from noether import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining, LogHistogram, LogText, Run, TrainState
from noether.core.callbacks import HistogramCallback
from noether.core.errors import SettingsError


def fire(callback, model, optimizer=None):
    state = TrainState.from_module(model, optimizer).next_epoch()
    return callback(state, AfterEpoch())[1]


def train_once(optimizer_type, **settings):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    optimizer = optimizer_type(model.parameters(), **settings)
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("kind", "settings", "slot"),
    [(torch.optim.AdamW, {}, "exp_avg"), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "momentum_buffer")],
)
def test_weights_and_momentum_of_the_chosen_params_are_counted(kind, settings, slot):
    model, optimizer = train_once(kind, **settings)
    callback = HistogramCallback(every_n_epochs=1, patterns=("1.*",), of=("weights", "momentum"), bins=3)
    effects = fire(callback, model, optimizer)
    assert [each.key for each in effects] == [
        "weights/1.weight",
        "weights/1.bias",
        "momentum/1.weight",
        "momentum/1.bias",
    ]
    for effect, tensor in zip(effects, [*model[1].parameters()], strict=False):
        assert effect.counts.sum() == tensor.numel()
    momentum = optimizer.state[model[1].weight][slot]
    assert effects[2].edges[0] <= momentum.min() <= momentum.max() <= effects[2].edges[-1]


def test_values_that_are_not_finite_are_counted_apart():
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.0, math.nan, math.inf, 1.0]])
    (effect,) = fire(HistogramCallback(every_n_epochs=1, bins=2), model)
    assert isinstance(effect, LogHistogram)
    assert (effect.counts.tolist(), effect.nan, effect.infinite) == ([1, 1], 1, 1)


def test_an_optimizer_without_momentum_is_named():
    callback = HistogramCallback(every_n_epochs=1, of=("momentum",))
    (effect,) = fire(callback, *train_once(torch.optim.SGD, lr=0.1))
    assert isinstance(effect, LogText)
    assert "keeps no momentum" in effect.text


def test_a_pattern_that_no_param_has_is_refused_before_training():
    callback = HistogramCallback(every_n_epochs=1, patterns=("wieght",))
    with pytest.raises(SettingsError, match="no param matches 'wieght'; did you mean 'weight'"):
        callback(TrainState.from_module(torch.nn.Linear(2, 1)), BeforeTraining())


def update(callback, model, **readings):
    state = TrainState.from_module(model).advance(samples=4)
    return callback(state, AfterUpdate(samples=4, **readings))[1]


def test_gradients_of_the_chosen_params_are_counted_beside_the_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    callback = HistogramCallback(every_n_updates=1, patterns=("*.weight",), of=("gradients", "weights"), bins=2)
    assert callback.readings == ("gradients",)
    gradients = {"0.weight": torch.tensor([[0.0, 1.0, math.nan]]), "0.bias": torch.ones(3)}
    first, *weights = update(callback, model, gradients=gradients)
    assert (first.key, first.counts.tolist(), first.nan) == ("gradients/0.weight", [1, 1], 1)
    assert [each.key for each in weights] == ["weights/0.weight", "weights/1.weight"]


@pytest.mark.parametrize(
    ("readings", "reason"),
    [
        ({"skipped": True}, "the update was skipped, so it has no gradients"),
        ({"gradients": {}}, "these params have no gradients"),
        ({}, "no gradients were copied in this update; a loop without Session passes AfterUpdate(gradients=...)"),
    ],
    ids=["skipped", "unused", "not copied"],
)
def test_a_firing_without_gradients_says_so(readings, reason):
    callback = HistogramCallback(every_n_updates=1, of=("gradients",))
    assert update(callback, torch.nn.Linear(2, 1), **readings) == (LogText(f"{callback.name}: {reason}"),)


def test_a_plan_can_call_it_on_the_meta_device():
    model = torch.nn.Linear(2, 1, device="meta")
    gradients = {name: parameter.detach() for name, parameter in model.named_parameters()}
    effects = update(HistogramCallback(every_n_updates=1, of=("weights", "gradients")), model, gradients=gradients)
    assert [int(effect.counts.sum()) for effect in effects] == [0, 0, 0, 0]


@pytest.mark.parametrize("pattern", ["0.*", "1.*"])
def test_a_tied_weight_is_chosen_by_any_of_its_names(pattern):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    callback = HistogramCallback(every_n_updates=1, patterns=(pattern,), of=("weights", "gradients"))
    callback(TrainState.from_module(model), BeforeTraining())
    effects = update(callback, model, gradients={"0.weight": torch.ones(2, 2)})
    assert [each.key for each in effects] == ["weights/0.weight", "gradients/0.weight"]


def test_the_histograms_at_the_end_are_those_of_the_weights():
    callback = HistogramCallback(every_n_updates=2, of=("weights", "gradients"), at_end=True)
    state = TrainState.from_module(torch.nn.Linear(2, 1)).advance(samples=4)
    effects = callback(state, AfterTraining(run=Run()))[1]
    assert [each.key for each in effects] == ["weights/weight", "weights/bias"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 1}, "of: gradients belong to an update: give every_n_updates or every_n_samples"),
        ({"every_n_updates": 1, "at_end": True}, "at_end: after training there are no gradients"),
    ],
    ids=["epochs", "end"],
)
def test_gradients_without_an_update_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        HistogramCallback(of=("gradients",), **settings)


@pytest.mark.parametrize("settings", [{"patterns": ()}, {"of": ()}, {"of": ("grads",)}, {"bins": 0}])
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(SettingsError):
        HistogramCallback(every_n_epochs=1, **settings)
