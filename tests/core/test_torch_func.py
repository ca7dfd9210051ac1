"""`torch.func`, `torch.compile` and `torch.export` take states and their params as they are."""

import pytest
import torch
from torch.func import functional_call, functionalize, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from noether import (
    AfterUpdate,
    BeforeTraining,
    TrainingIteration,
    TrainState,
    callback,
    compose,
    every_n_updates,
    log,
    on,
)
from noether.core.tensors.donation import donate, lease
from noether.core.tensors.tree import FrozenDict

BATCH = torch.arange(15.0).reshape(5, 3) / 10


def make_model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


MODEL = make_model()


def trained_state():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(BATCH).sum().backward()
    optimizer.step()
    return TrainState.from_module(model, optimizer).advance(samples=5).remember("seen", {"last": BATCH, "n": 1})


def frozen_state():
    state = lease(trained_state())
    return state.replace(
        params=FrozenDict(state.params), buffers=FrozenDict(state.buffers), opt_state=FrozenDict(state.opt_state)
    )


STATES = {"live": trained_state, "frozen": frozen_state, "donated": lambda: donate(frozen_state())}
every_state = pytest.mark.parametrize("make_state", STATES.values(), ids=STATES)


def loss(params, batch):
    return functional_call(MODEL, params, (batch,)).square().mean()


def loss_of_one(params, sample):
    return loss(params, sample[None])


def ones_like(tree):
    return pytree.tree_map(torch.ones_like, tree)


TRANSFORMS = {
    "no transform": loss,
    "grad": grad(loss),
    "grad_and_value": grad_and_value(loss),
    "vmap(grad)": vmap(grad(loss_of_one), in_dims=(None, 0)),
    "vmap, params closed over": lambda params, batch: vmap(lambda one: loss_of_one(params, one))(batch),
    "vmap(grad), params closed over": lambda params, batch: vmap(grad(lambda one: loss_of_one(params, one)))(batch),
    "jacrev": jacrev(loss),
    "jacfwd": jacfwd(loss),
    "hessian": hessian(loss),
    "jvp": lambda params, batch: jvp(lambda params: loss(params, batch), (params,), (ones_like(params),)),
    "vjp": lambda params, batch: vjp(lambda params: loss(params, batch), params)[1](torch.ones(())),
    "hvp": lambda params, batch: jvp(grad(lambda params: loss(params, batch)), (params,), (ones_like(params),))[1],
    "functionalize": functionalize(loss),
    "a step of descent": lambda params, batch: pytree.tree_map(
        lambda param, slope: param - 0.1 * slope, params, grad(loss)(params, batch)
    ),
    "in_dims as a tree": lambda params, batch: vmap(
        lambda params: params["0.weight"].sum(), in_dims=(pytree.tree_map(lambda _: 0, params),)
    )(pytree.tree_map(lambda tensor: torch.stack((tensor, 2 * tensor)), params)),
    "checkpoint": lambda params, batch: torch.utils.checkpoint.checkpoint(loss, params, batch, use_reentrant=False),
    "strict": lambda params, batch: functional_call(MODEL, params, (batch,), strict=True),
    "several dicts": lambda params, batch: functional_call(MODEL, (params, {}), (batch,)),
    "no ties": lambda params, batch: functional_call(MODEL, params, (batch,), tie_weights=False),
}


def plain(value):
    """The value with the types of mappings left out, as each kind of params has its own."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple) else value


def assert_same(found, expected):
    torch.testing.assert_close(plain(found), plain(expected), rtol=0, atol=0)


@every_state
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_params_of_a_state_work_like_a_dict(make_state, transform):
    state = make_state()
    found = transform(state.params, BATCH)
    assert_same(found, transform({name: param.clone() for name, param in frozen_state().params.items()}, BATCH))
    assert_same(state.params, frozen_state().params)  # nothing wrote to it


@every_state
@pytest.mark.parametrize("name", ["grad", "hessian", "jvp"])
def test_a_transform_replaces_the_params_within_a_state(make_state, name):
    state = make_state()

    def through_state(params, batch):
        return loss(state.replace(params=params).params, batch)

    transforms = {
        "grad": lambda function: grad(function)(state.params, BATCH),
        "hessian": lambda function: hessian(function)(state.params, BATCH),
        "jvp": lambda function: jvp(lambda p: function(p, BATCH), (state.params,), (ones_like(state.params),)),
    }
    assert_same(transforms[name](through_state), transforms[name](loss))


@every_state
def test_a_whole_state_is_differentiated(make_state):
    state = make_state()
    slopes = grad(lambda state: loss(state.params, BATCH))(state)
    assert_same(slopes.params, grad(loss)(state.params, BATCH))
    assert not slopes.opt_state["state"]["0.bias"]["exp_avg"].any()
    assert slopes.iteration == TrainingIteration(0, 1, 5)
    _, tangent = jvp(lambda state: loss(state.params, BATCH), (state,), (ones_like(state),))
    assert_same(tangent, jvp(lambda params: loss(params, BATCH), (state.params,), (ones_like(state.params),))[1])


def test_a_reducer_runs_on_the_members_of_stacked_states():
    @callback("largest", init=lambda state: {"norm": torch.zeros(())})
    @every_n_updates(1)
    def remember_largest(state, event):
        norm = state.params["weight"].norm().maximum(state.memory("largest")["norm"])
        return log(state.remember("largest", {"norm": norm}), event, {"norm": norm})

    def run(state):
        state, _ = reducer(state, BeforeTraining())
        return reducer(state.advance(samples=1), AfterUpdate(samples=1))[0]

    reducer = compose(remember_largest)
    members = [TrainState(params={"weight": torch.full((4,), value)}) for value in (1.0, 2.0, 3.0)]
    result = vmap(run)(pytree.tree_map(lambda *tensors: torch.stack(tensors), *members))
    assert result.memory("largest")["norm"].tolist() == result.metrics["norm"].value.tolist() == [2.0, 4.0, 6.0]


@every_state
def test_vmap_sees_the_members_of_stacked_states(make_state):
    state = make_state()
    members = [pytree.tree_map(lambda tensor, factor=factor: tensor * factor, state) for factor in (1.0, 2.0, 3.0)]
    ensemble = pytree.tree_map(lambda *tensors: torch.stack(tensors), *members)
    assert ensemble.iteration == state.iteration
    seen = []

    def train_more(member):
        seen.append((member.iteration, member.memory("seen")["n"], member.params["0.weight"].shape))
        return member.advance(samples=4).replace(params=grad(loss)(member.params, BATCH))

    result = vmap(train_more)(ensemble)
    assert seen == [(state.iteration, 1, (2, 3))]
    assert result.iteration == state.advance(samples=4).iteration
    for index, member in enumerate(members):
        part = pytree.tree_map(lambda tensor, index=index: tensor[index], result)
        expected = grad(loss)(member.params, BATCH)
        torch.testing.assert_close(plain(part.params), plain(expected))
        assert_same(part.opt_state["state"], member.opt_state["state"])


@every_state
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda state: loss(state.params, BATCH), id="functional_call"),
        pytest.param(lambda state: sum(param.square().sum() for param in state.params.values()), id="values"),
        pytest.param(lambda state: sum(state.params[name].sum() for name in state.params), id="names"),
        pytest.param(lambda state: pytree.tree_map(torch.square, state.params), id="tree_map"),
        pytest.param(lambda state: (state.params | {"new": BATCH})["new"].sum(), id="merge"),
        pytest.param(
            lambda state: vmap(grad(loss_of_one), in_dims=(None, 0))(state.params, BATCH)["0.weight"], id="vmap(grad)"
        ),
    ],
)
def test_a_function_of_a_state_compiles_to_one_graph(make_state, backend, function):
    torch._dynamo.reset()  # noqa: SLF001  # the tests share nothing
    state = make_state()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(plain(compiled(state)), plain(function(state)))


@every_state
def test_a_function_of_params_is_exported(make_state):
    class Norm(torch.nn.Module):
        def forward(self, params):
            return params["0.weight"].norm()

    params = make_state().params
    exported = torch.export.export(Norm(), (params,))
    assert_same(exported.module()(params), params["0.weight"].norm())


def test_a_buffer_that_forward_assigns_is_refused_for_frozen_buffers():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, batch):
            self.calls = self.calls + 1
            return batch

    model, buffers = Counter(), FrozenDict(calls=torch.zeros(()))
    with pytest.raises(TypeError, match="never written to"):
        functional_call(model, buffers, (BATCH,))
    assert model.calls == 0
    copy = dict(buffers)
    functional_call(model, copy, (BATCH,))
    assert (buffers["calls"], copy["calls"]) == (0, 1)


def test_a_callback_measures_gradients_of_each_sample_in_our_own_loop():
    norms = []

    @on(AfterUpdate)
    def measure(state, event):
        each = vmap(grad(loss_of_one), in_dims=(None, 0))(state.params, BATCH)
        norms.append(torch.stack([part.flatten(1).norm(dim=1) for part in each.values()]).norm(dim=0))
        return state, ()

    for make_state in STATES.values():
        measure(make_state(), AfterUpdate(samples=5))
    assert norms[0].shape == (5,)
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])
