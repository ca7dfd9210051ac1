"""Loaded states on another device; torch's `meta` device stands for the accelerator."""

import pytest
import torch
from torch import nn

from noether import TrainState
from noether.core.state import Measured
from noether.effects import CheckpointError
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.weights import check_opt_state, to_device


def trained_state():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = TrainState.from_module(model)
    adam = FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.1})
    params, opt_state = adam.update(dict(state.params), adam.init(state.params), state.params)
    metrics = {"loss": Measured(torch.tensor(1.0), state.iteration), "accuracy": Measured(0.5, state.iteration)}
    return state.replace(params=params, opt_state=opt_state, metrics=metrics).remember("sum", {"of": torch.ones(2)})


def test_all_tensors_move_except_step_counters():
    state = to_device(trained_state(), torch.device("meta"))
    assert {param.device.type for param in state.params.values()} == {"meta"}
    assert state.buffers["1.running_mean"].device.type == "meta"
    assert state.memory("sum")["of"].device.type == "meta"
    assert state.metrics["loss"].value.device.type == "meta"
    assert state.metrics["accuracy"].value == 0.5
    memory = state.opt_state["state"]["0.weight"]
    assert memory["exp_avg"].device.type == "meta"
    assert memory["step"].device.type == "cpu"


def test_on_the_cpu_the_state_is_the_same_object():
    state = trained_state()
    assert to_device(state, torch.device("cpu")) is state


def test_memory_of_another_optimizer_is_refused():
    """Otherwise the first update after the resume would fail."""
    adam = FunctionalOptimizer(torch.optim.Adam, {"lr": 0.1})
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    grads = {name: torch.ones_like(param) for name, param in params.items()}
    state = TrainState(params=params, opt_state=adam.update(grads, adam.init(params), params)[1])
    check_opt_state(adam, state)
    memory = state.opt_state["state"]
    for wrong, message in (
        ({**memory, "c": memory["w"]}, "does not belong to this optimizer: .*'c'"),
        ({**memory, "w": memory["b"]}, "exp_avg of 'w' is not what this optimizer keeps"),
        ({**memory, "w": {**memory["w"], "step": (1,)}}, "step of 'w' is not what this optimizer keeps"),
        ({**memory, "w": 5}, "the memory of 'w' is not what this optimizer keeps"),
    ):
        with pytest.raises(CheckpointError, match=rf"^opt_state: .*{message}"):
            check_opt_state(adam, state.replace(opt_state={**state.opt_state, "state": wrong}))


@pytest.mark.parametrize("name", ["Adagrad", "Adafactor", "ASGD", "NAdam", "RMSprop", "Rprop"])
def test_memory_of_a_class_without_a_kernel_belongs_to_that_class(name):
    optimizer = FunctionalOptimizer(getattr(torch.optim, name), {"lr": 0.1})
    params = {"w": torch.ones(2)}
    state = TrainState(params=params, opt_state=optimizer.update(params, optimizer.init(params), params)[1])
    check_opt_state(optimizer, state)
    with pytest.raises(CheckpointError, match=r"does not belong to this optimizer: .*'c'"):
        check_opt_state(optimizer, state.replace(opt_state={**state.opt_state, "state": {"c": {}}}))
