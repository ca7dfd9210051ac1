"""Runs under `trainer.parallel: shard`: they equal those with whole parameters, and resume on any number of ranks."""

import json

import pytest
import torch
from processes import run_on_ranks

import noether
from noether.config.errors import ConfigError
from noether.core.tensors.dtensors import is_distributed, local_part, whole_tensor
from noether.core.tensors.tree import tensors
from noether.distributed import sharded_sums, sharding
from noether.testing.array_bits import same_tensors

CALLBACKS = "noether.core.callbacks"
END = 3
FIRST = "E0_U1_S7"


def make_config(output, **trainer):
    """Return a run whose updates have another number of samples than ranks, and whose evaluation has one batch."""
    return {
        "run": {"name": "heat", "output": str(output)},
        "model": {"kind": "noether.examples.heat.FourierNet", "width": 12, "modes": 4, "layers": 2},
        "data": {split: {"kind": "noether.examples.heat.HeatFields", "split": split} for split in ("train", "val")},
        "optimizer": {"kind": "torch.optim.AdamW", "lr": 5e-3, "weight_decay": 1e-4},
        "trainer": {
            "max_updates": END,
            "effective_batch_size": 7,
            "max_batch_size": 3,
            "eval_batch_size": 128,
            "loss": "noether.examples.heat.losses",
            "clip_grad_norm": 1.0,
            **trainer,
        },
        "callbacks": [
            {"kind": f"{CALLBACKS}.EMACallback", "every_n_updates": 2, "target_factors": [0.5]},
            {"kind": f"{CALLBACKS}.GradNormCallback", "every_n_updates": 1},
            {"kind": f"{CALLBACKS}.HistogramCallback", "every_n_updates": 1, "of": ["gradients"], "bins": 8},
            {"kind": f"{CALLBACKS}.OnlineLossCallback", "every_n_updates": 1},
            {
                "kind": f"{CALLBACKS}.OfflineLossCallback",
                "every_n_updates": 2,
                "dataset_key": "val",
                "weights": "ema=0.5",
            },
            {"kind": f"{CALLBACKS}.CheckpointCallback", "every_n_updates": 1, "save_weights": True, "save_optim": True},
        ],
    }


def values(run, read=whole_tensor):
    """Return metrics, and params, memory of optimizer and callbacks by name."""
    trees = {"params": run.state.params, "opt": run.state.opt_state, "memory": run.state.callback_states}
    return run.metrics, {name: read(tensor).clone() for name, tensor in tensors(trees)}


def ranges_of_gradients(directory):
    """Return the range of the gradients of each parameter at each update, and how many values they have."""
    ranges = {}
    for each in noether.read_run(directory).artifacts:
        histogram = json.loads(each.path.read_text())
        ranges[each.key, each.point.update] = [
            sum(histogram["counts"]),
            histogram["edges"][0],
            histogram["edges"][-1],
        ]
    return ranges


def assert_same_gradients(directory, other):
    one, other = ranges_of_gradients(directory), ranges_of_gradients(other)
    assert one.keys() == other.keys()
    assert {update for _, update in one} == {1, 2, 3}
    for key, numbers in one.items():
        assert numbers == pytest.approx(other[key], rel=1e-3, abs=1e-6), key


def assert_close(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-4, atol=2e-5, msg=name)


def count_collectives(calls, function):
    def count(*arguments, **keywords):
        calls.append(function)
        return function(*arguments, **keywords)

    return count


def train_sharded(folder):
    """Train an uncut run, and resume it at its first checkpoint; return what the uncut one is."""
    calls = []
    for module, name in ((sharding, "_all_gather"), (sharded_sums, "_reduce_scatter")):
        setattr(module, name, count_collectives(calls, getattr(module, name)))
    uncut = noether.train(make_config(folder / "uncut", parallel="shard"))
    assert len(calls) == 2 * END, "an update gathers and reduces one bucket each"
    sharded = [name for name, param in uncut.state.params.items() if is_distributed(param)]
    assert sharded == ["layers.0.mixing", "layers.1.mixing"]
    for memory in (uncut.state.opt_state["state"], {"": uncut.state.memory("weights/ema=0.5")["params"]}):
        stored = [tensor for name, tensor in tensors(memory) if any(each in name for each in sharded) and tensor.ndim]
        assert stored
        assert all(local_part(tensor).numel() * 2 == tensor.numel() for tensor in stored)
    resumed = noether.train(resume=uncut.directory, checkpoint=FIRST, into=folder / "resumed")
    expected, found = values(uncut, local_part), values(resumed, local_part)
    assert found[0] == expected[0]
    for name, tensor in found[1].items():
        assert same_tensors(tensor, expected[1][name]), name
    refuse_adafactor(folder)
    return uncut.directory, values(uncut)


def refuse_adafactor(folder):
    config = make_config(folder, parallel="shard")
    with pytest.raises(ConfigError, match="optimizer: Adafactor is not known to update each number"):
        noether.train({**config, "optimizer": {"kind": "torch.optim.Adafactor", "lr": 0.1}})


def resume_sharded(directory, folder):
    run = noether.train(resume=directory, checkpoint=FIRST, into=folder, overrides=[f"trainer.max_updates={END - 1}"])
    assert any(map(is_distributed, run.state.params.values()))
    return run.directory


def test_sharded_runs_equal_one_process_and_resume_on_any_number_of_ranks(tmp_path):
    (directory, uncut), (_, other) = run_on_ranks(train_sharded, 2, tmp_path)
    assert_close(uncut, other)
    alone = noether.train(make_config(tmp_path / "alone"))
    assert_close(uncut, values(alone))
    assert_same_gradients(directory, alone.directory)
    three = run_on_ranks(resume_sharded, 3, directory, tmp_path / "three")[0]
    assert_close(values(noether.train(resume=three, overrides=[f"trainer.max_updates={END}"])), uncut)
