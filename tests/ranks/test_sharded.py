"""Parameters that are sharded over ranks: their placement, sums and updates are those of whole parameters."""

import torch
import torch.distributed as dist
from processes import run_on_ranks

from noether import TrainState, lease
from noether.core.tensors.dtensors import is_distributed, local_part, whole_tensor
from noether.core.tensors.tree import tensors
from noether.distributed.gradients import start_all_reduce
from noether.distributed.ranks import join, leave_at_end
from noether.distributed.sharded_sums import ShardedReduction
from noether.distributed.sharding import Sharding
from noether.testing.array_bits import same_tensors
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.sharded import apply_to_shards, place_state

SHAPES = {"a": (70, 31), "bias": (7,), "scalar": (), "b": (1100,), "few_rows": (2, 2000), "half": (64, 33)}
SHARDED = {"a", "b", "half", "complex"}
OPTIMIZERS = {
    "fused": (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "class": (torch.optim.Adagrad, {"lr": 0.1}),
}


def make_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return made | {"half": made["half"].bfloat16(), "complex": torch.complex(made["a"], made["a"].sin())}


def check_placement(ranks, params, sharding):
    state = place_state(TrainState(params=params, opt_state={"state": {"a": {"exp_avg": params["a"]}}}), sharding)
    assert place_state(state, sharding) is state
    assert {name for name, param in state.params.items() if is_distributed(param)} == SHARDED
    assert is_distributed(state.opt_state["state"]["a"]["exp_avg"])
    whole = sharding.gather(state.params)
    for name, param in params.items():
        assert same_tensors(whole[name], param), name
        assert same_tensors(whole_tensor(state.params[name]), param), name
    assert sum(local_part(each).numel() for each in state.params.values()) < sum(
        each.numel() for each in params.values()
    )
    return state


def check_sums(ranks, params, sharding):
    """Compare sums of weighted gradients, and their norm, to those of whole gradients."""
    grads = [make_tensors(rank + 7) for rank in range(ranks.world_size)]
    own = dict(grads[ranks.rank])
    if ranks.rank == 0:
        own["b"] = None
    reduction = ShardedReduction(sharding, params, 2, start_all_reduce(ranks.training))
    tail = reduction.sum_over_ranks(own, float(ranks.rank), lambda place: place.fill_(ranks.rank))
    assert tail.tolist() == [sum(range(ranks.world_size))] * 2
    divided = reduction.divide(set(params) - {"half"}, by=4.0)
    assert divided.pop("half") is None
    for name, part in divided.items():
        expected = sum(grad[name] * rank for rank, grad in enumerate(grads)) / 4
        expected = sharding.place(name, expected.to(params[name].dtype))
        torch.testing.assert_close(part, local_part(expected), msg=name)
    total = {name: sharding.place(name, grad) for name, grad in grads[0].items()}
    local = {name: local_part(grad) for name, grad in total.items()}
    norm = torch.cat([grad.to(torch.complex128).flatten() for grad in grads[0].values()]).norm().float()
    torch.testing.assert_close(sharding.total_norm(local), norm)
    assert sharding.all_finite(local)
    if ranks.rank == ranks.world_size - 1:
        local["a"] = local["a"] + torch.inf
    assert not sharding.all_finite(local)


def check_updates(ranks, params, sharding, kind):
    """Compare updates of shards to those of whole parameters, and check which of them write in place."""
    cls, settings = OPTIMIZERS[kind]
    if kind == "fused":  # torch has no such kernel for complex numbers
        params = {name: param for name, param in params.items() if name != "complex"}
    params = {**params, "half": params["half"].float()}  # kernels round bfloat16 by position
    optimizer = FunctionalOptimizer(cls, settings)
    whole, memory = dict(params), optimizer.init(params)
    state = place_state(TrainState(params=params, opt_state=memory), sharding)
    addresses, kept, before = [], None, None
    for update in range(5):
        grads = {name: grad for name, grad in make_tensors(update + 20).items() if name in params}
        grads["half"] = grads["half"].float()
        del grads["scalar"]
        whole, memory = optimizer.update(grads, memory, whole, settings={"default": {"lr": 0.1 / (update + 1)}})
        local = {name: local_part(sharding.place(name, grad)) for name, grad in grads.items()}
        state = apply_to_shards(
            state,
            local,
            {"default": {"lr": 0.1 / (update + 1)}},
            {},
            sharding=sharding,
            optimizer=optimizer,
            donate=True,
        )
        addresses.append(local_part(state.params["a"]).data_ptr())
        if update == 3:
            kept = lease(state)
            before = {name: tensor.clone() for name, tensor in tensors({"p": kept.params, "o": kept.opt_state})}
    found = dict(tensors({"p": state.params, "o": state.opt_state}))
    expected = dict(tensors({"p": whole, "o": memory}))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(whole_tensor(tensor), expected[name], msg=f"{kind}: {name}")
    for name, tensor in tensors({"p": kept.params, "o": kept.opt_state}):
        assert same_tensors(tensor, before[name]), "an update wrote to a state that was kept"
    writes_in_place = kind != "class"
    assert (len(set(addresses[:4])) == 1) is writes_in_place
    assert addresses[3] != addresses[4]


def check_thaw(sharding, params):
    """Check that an optimizer which trains more parameters than the one before writes to no state that is kept."""
    sgds = [FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}, frozen=frozenset(each)) for each in (["a"], [])]
    state = place_state(TrainState(params=params, opt_state=sgds[0].init(params)), sharding)
    for optimizer in (sgds[0], sgds[0], sgds[1]):
        kept = lease(state)
        before = {name: local_part(param).clone() for name, param in kept.params.items()}
        grads = {name: local_part(kept.params[name]) + 1 for name in optimizer.trainable(params)}
        how = {"sharding": sharding, "optimizer": optimizer, "donate": True}
        state = apply_to_shards(state, grads, {"default": {"lr": 0.1}}, {}, **how)
        assert all(same_tensors(local_part(kept.params[name]), value) for name, value in before.items())
    assert not same_tensors(local_part(state.params["a"]), local_part(kept.params["a"]))


def check_everything():
    ranks = join(timeout_s=60)
    params = make_tensors(0)
    sharding = Sharding(params, ranks, bucket_bytes=20_000)
    assert set(sharding.shapes) == SHARDED
    check_placement(ranks, params, sharding)
    check_sums(ranks, params, sharding)
    for kind in OPTIMIZERS:
        check_updates(ranks, params, sharding, kind)
    check_thaw(sharding, {name: params[name] for name in ("a", "b")})


def test_shards_are_updated_like_whole_parameters():
    run_on_ranks(check_everything, 3)


@leave_at_end()
def place_in_run(params):
    placed = Sharding(params, join(timeout_s=60)).place("a", params["a"])
    assert same_tensors(whole_tensor(placed), params["a"])
    return placed


def read_after_runs():
    """Read what two runs returned whose own groups are gone, on ranks with a group that neither has made."""
    dist.init_process_group("gloo")
    returned = [place_in_run(make_tensors(seed)) for seed in range(2)]
    for seed, placed in enumerate(returned):
        assert same_tensors(whole_tensor(placed), make_tensors(seed)["a"])


def test_shards_outlive_the_run_that_made_them():
    run_on_ranks(read_after_runs, 2)
