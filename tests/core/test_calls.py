"""Arguments that a model gets from a batch, and messages for first mistakes in a model or a loss."""

from __future__ import annotations

from typing import TypedDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from noether import TrainState, forward
from noether.core.tensors.batch import model_arguments
from noether.core.tensors.calls import call_model, compute_losses, describe_value
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

NAMED = {"image": torch.ones(4, 2), "label": torch.zeros(4, 1)}
PAIR = [NAMED["image"], NAMED["label"]]


class Sample(TypedDict):
    image: torch.Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))

    def forward(self, x):
        return self.body(x)


class TakesBatch(Net):
    def forward(self, batch, scale=1.0):
        return self.body(batch["image"] if isinstance(batch, dict) else batch[0]) * scale


class TakesDict(Net):
    def forward(self, inputs: dict[str, torch.Tensor]):
        return self.body(inputs["image"])


class TakesTyped(Net):
    def forward(self, inputs: Sample):
        return self.body(inputs["image"])


class TakesUnknown(Net):
    def forward(self, inputs: Mapping[str, Missing]):  # noqa: F821  # as names that are imported for type checkers only
        return self.body(inputs["image"])


class TakesKeyword(Net):
    def forward(self, *, image):
        return self.body(image)


class TakesTwo(Net):
    def forward(self, x, y):
        return self.body(x) + y


@pytest.mark.parametrize("model", [TakesBatch, TakesDict, TakesTyped, TakesUnknown])
@pytest.mark.parametrize(
    "wrap", [lambda model: model, nn.DataParallel, torch.compile], ids=["plain", "parallel", "compiled"]
)
def test_a_model_whose_forward_takes_the_whole_batch_gets_it(model, wrap):
    """As Lightning#10541 and Lightning#7878."""
    (batch,), keywords = model_arguments(wrap(model()), NAMED)
    assert batch is NAMED
    assert not keywords


def test_a_parameter_named_batch_gets_all_of_a_tuple():
    assert model_arguments(TakesBatch(), PAIR) == ((PAIR,), {})
    assert model_arguments(TakesDict(), PAIR) == ((PAIR[0],), {})
    assert model_arguments(TakesBatch(), {"batch": PAIR}) == ((), {"batch": PAIR})  # an entry of this name


class TakesBatchOrNothing(Net):
    def forward(self, batch=None, scale=1.0):
        return self.body(batch["image"]) * scale


class TakesAny(Net):
    def forward(self, *args):
        return self.body(args[0]["image"])


class TakesOptional(Net):
    def forward(self, pixels=None):
        return torch.zeros(4, 1) if pixels is None else self.body(pixels)


@pytest.mark.parametrize("model", [TakesBatchOrNothing, TakesAny])
def test_a_model_that_requires_no_argument_gets_the_whole_batch(model):
    assert call_model(model(), NAMED).shape == (4, 1)
    assert model_arguments(TakesAny(), PAIR) == ((PAIR[0],), {})


def test_a_model_that_takes_no_entry_of_a_batch_does_not_compute_with_its_defaults():
    with pytest.raises(
        TypeError, match=r"TakesOptional.forward\(pixels\) takes none of the entries .* image, label: name"
    ):
        call_model(TakesOptional(), NAMED)
    assert call_model(TakesOptional(), {"pixels": PAIR[0], "label": PAIR[1]}).any()


class TakesTensor(Net):
    def forward(self, batch):
        return self.body(batch)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_gets_what_the_model_gets(wrap):
    assert model_arguments(wrap(TakesKeyword()), NAMED) == ((), {"image": NAMED["image"]})


class Deep(Net):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 8), nn.Linear(4, 1))


class Counts(Net):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)

    def forward(self, x):
        return self.body(self.embed(x[:, 0].long() + 2))


@pytest.mark.parametrize(
    ("model", "batch", "note"),
    [
        (Deep, PAIR, "in body.1 (Linear(in_features=4, out_features=1, bias=True)), called with input (4, 8) float32"),
        (Counts, PAIR, "in embed (Embedding(3, 2)), called with input (4,) int64 from 3 to 3"),
        (Net, [PAIR[0].double(), PAIR[1]], "called with input (4, 2) float64"),
        (TakesTyped, PAIR, "in forward of the model (TakesTyped), called with inputs (4, 2) float32"),
        (
            TakesTwo,
            PAIR,
            "in the call of TakesTwo.forward(x, y) for the batch [(4, 2) float32, (4, 1) float32]: of a tuple",
        ),
        (TakesTensor, PAIR, "named batch gets the whole batch: rename it to get the inputs alone"),
        (TakesKeyword, PAIR, "in the call of TakesKeyword.forward(*, image) for the batch"),
        (
            Net,
            NAMED,
            "in the call of Net.forward(x) for the batch {image: (4, 2) float32, label: (4, 1) float32}: of a",
        ),
    ],
    ids=["shape", "index", "dtype", "kind", "two-arguments", "named-batch", "keyword", "unnamed-entry"],
)
def test_an_error_of_a_model_names_the_module_and_its_inputs(model, batch, note):
    network = model()
    for call in (
        lambda: call_model(network, batch),
        lambda: forward(network, loss)(TrainState.from_module(model()), batch),  # the weights of another one
    ):
        with pytest.raises(Exception) as raised:  # noqa: PT011  # of any type; the note is what counts
            call()
        (found,) = raised.value.__notes__
        assert note in found
        assert "\n" not in found


def loss(outputs, batch):
    return {"mse": functional.mse_loss(outputs, batch[1])}


@pytest.mark.parametrize(
    ("function", "labels", "note"),
    [
        (functional.cross_entropy, None, "and the whole batch [(4, 2) float32, (4,) int64 from 0 to 5]"),
        (lambda outputs, batch: functional.cross_entropy(outputs, batch[1]), torch.tensor([0, 1, 2, 5]), "from 0 to 5"),
        (lambda outputs, batch: functional.cross_entropy(outputs, batch[1]), torch.ones(4, dtype=torch.int32), "int32"),
        (
            lambda outputs, batch: functional.mse_loss(outputs, batch["label"]),
            None,
            "batch [(4, 2) float32, (4,) int64",
        ),
    ],
    ids=["whole-batch", "out-of-range", "dtype", "name"],
)
def test_an_error_of_a_loss_names_it_and_what_it_was_called_with(function, labels, note):
    labels = torch.tensor([0, 1, 2, 5]) if labels is None else labels
    with pytest.raises(Exception) as raised:  # noqa: PT011  # as above
        compute_losses(function, torch.ones(4, 3), [PAIR[0], labels])
    (found,) = raised.value.__notes__
    assert found.startswith("in the loss ")
    assert "called with outputs (4, 3) float32" in found
    assert note in found


def test_values_are_described_inside_of_a_transform():
    described = []
    torch.func.vmap(lambda labels: (described.append(describe_value(labels)), labels)[1])(torch.zeros(2, 3).long())
    assert described == ["(3,) int64"]


def make_step(function):
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1})
    return Step(model=Net(), loss=function, optimizer=optimizer, lr={"default": Constant(value=0.1)})


@pytest.mark.parametrize(
    "function",
    [
        lambda outputs, batch: {"mse": (outputs - batch[1]).square().mean().detach()},
        lambda outputs, batch: {"mse": (outputs.argmax(1) == batch[1][:, 0]).double().mean()},
    ],
    ids=["detached", "argmax"],
)
def test_a_loss_without_a_gradient_is_refused_by_name(function):
    step = make_step(function)
    with pytest.raises(ValueError, match=r"lambda> returned 'mse' without a gradient: the model and the loss must not"):
        step(TrainState.from_module(step.model), [PAIR])


def test_a_constant_among_other_losses_has_no_gradient():
    def with_constant(outputs, batch):
        return loss(outputs, batch) | {"penalty": torch.tensor(3.0)}

    steps = [make_step(loss), make_step(with_constant)]
    states, events = zip(*(step(TrainState.from_module(steps[0].model), [PAIR]) for step in steps), strict=True)
    torch.testing.assert_close(*(dict(state.params) for state in states))
    assert events[1].losses["total"] == events[0].losses["total"] + 3
