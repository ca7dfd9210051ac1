"""Callbacks that decide on each rank by something else: all ranks end at once, or say so."""

import contextlib
import logging

import pytest
import torch
from processes import run_on_ranks
from recorded_runs import make_config

import noether
from noether import AfterUpdate
from noether.distributed.ranks import join
from noether.training.replicated.agreement import RankStateError


@noether.on(AfterUpdate)
def stop_on_rank_1(state, event):
    is_last = event.run.rank == 1 and state.iteration.update == 2
    return (state.replace(stop="seen enough"), ()) if is_last else (state, ())


@noether.on(AfterUpdate)
def stop_everywhere(state, event):
    return (state.replace(stop="enough"), ()) if state.iteration.update == 2 else (state, ())


@noether.on(AfterUpdate)
def scale_by_rank(state, event):
    return state.replace(hyperparams={**state.hyperparams, "lr_scale": 1.0 / (1 + event.run.rank)}), ()


@noether.on(AfterUpdate)
def add_noise(state, event):
    return state.replace(params={name: param + torch.rand(()) for name, param in state.params.items()}), ()


class SumOutputs(noether.core.callbacks.CallbackBase):
    def init(self, state):
        return {"outputs": torch.zeros(())}

    def after_update(self, state, event):
        total = state.callback_states["outputs"] + sum(float(each.sum()) for each in event.outputs)
        return state.replace(callback_states={**state.callback_states, "outputs": total}), ()


def train(name):
    config = make_config(max_updates=6)
    config["callbacks"] = [{"kind": f"test_state_agreement.{name}"}]
    return noether.train(config, allow=["recorded_runs", "test_state_agreement"])


def train_all(folder):
    messages, warnings = {}, []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("noether").addHandler(handler)
    with contextlib.chdir(folder):
        for name in ("stop_on_rank_1", "scale_by_rank", "add_noise"):
            with pytest.raises(RankStateError) as caught:
                train(name)
            messages[name] = str(caught.value)
        messages["stop_everywhere"] = train("stop_everywhere").ending
        train("SumOutputs")
    with pytest.raises(TypeError) as caught:
        join(timeout_s=30).control.gather("predictions", {"of": [1, 2]})
    messages["list"] = str(caught.value)
    return messages, warnings


def test_ranks_that_decide_differently_end_at_once_and_say_why(tmp_path):
    (messages, warnings), (others, no_warnings) = run_on_ranks(train_all, 2, tmp_path)
    assert others == messages
    assert messages["stop_on_rank_1"].startswith(
        "at E0_U2_S14, rank 1 stops the run ('seen enough'), and rank 0 does not. A callback decides by something that"
    )
    different = "rank 1 and rank 0 have different values of "
    assert f"at E0_U4_S24, {different}state.hyperparams['lr_scale'] and " in messages["scale_by_rank"]
    assert f"{different}state.params['layers.0.weight'] and 3 more. A callback" in messages["add_noise"]
    assert "event.run.gather(name, value)" in messages["add_noise"]
    assert messages["stop_everywhere"] == "ended at E0_U2_S14: enough"
    assert messages["list"].startswith("predictions: of is a list, which ranks cannot exchange; gather tensors, ")
    (warning,) = [each for each in warnings if different in each]
    assert f"{different}state.callback_states['outputs']; checkpoints have those of rank 0" in warning
    assert not [each for each in no_warnings if different in each]
