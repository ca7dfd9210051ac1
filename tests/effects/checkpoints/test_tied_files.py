"""Files of weights hold a tied tensor under each of its names, so that plain torch loads them strictly."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from noether import SaveCheckpoint, TrainState
from noether.core.iteration import TrainingIteration
from noether.core.tensors.stored_weights import use_weights, weights_by_name
from noether.core.tensors.tied_names import find_tied_names
from noether.effects.checkpoints.contents import ContentError, checkpoint_files, read_state, select_weights
from noether.effects.checkpoints.file_names import WEIGHTS

START = TrainingIteration()


class Counting(nn.Linear):
    """Has extra state that is a tensor, a buffer that no checkpoint has, and one that is registered as None."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("scale", torch.rand(2))
        self.register_buffer("late", None)
        self.calls = torch.zeros(1)

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


SHARES = ("module", "weight", "bias", "scale")


def make_model(shares):
    """Return a model of four layers, two of them in a block, in which each `(what, i, j)` makes i share with j."""
    layers = [Counting() for _ in range(4)]
    for what, first, second in shares:
        if what == "module":
            layers[second] = layers[first]
        else:
            setattr(layers[second], what, getattr(layers[first], what))
    block = nn.ModuleDict({"in": layers[2], "out": layers[3]})
    return nn.ModuleDict({"emb": layers[0], "head": layers[1], "block": block})


def content(state, **request):
    effect = SaveCheckpoint(optimizer=False, **request)
    return {name: b"".join(map(bytes, pieces)) for name, pieces in checkpoint_files(effect, state).items()}


shared = st.lists(st.tuples(st.sampled_from(SHARES), st.integers(0, 3), st.integers(0, 3)), max_size=4)


@settings(max_examples=60)
@given(shared, st.sampled_from(["", "emb", "head", "block", "block.in", "block.out"]))
def test_a_file_loads_strictly_into_the_model_and_into_any_part_of_it(shares, path):
    model, fresh = make_model(shares), make_model(shares)
    state = TrainState.from_module(model)
    files = content(state, models=(path,) if path else ())
    weights = load(files[WEIGHTS])
    part = {name.removeprefix(f"{path}."): tensor for name, tensor in weights.items() if name.startswith(path)}
    fresh.get_submodule(path).load_state_dict(part)  # strict
    for name, tensor in model.get_submodule(path).state_dict().items():
        assert torch.equal(tensor, part[name])
    read = read_state(files, START)
    own = {name for name in weights_by_name(read) if not name.endswith("_extra_state")}
    assert own == {name for name in weights if not name.endswith("_extra_state")}
    sizes = select_weights(SaveCheckpoint(models=(path,) if path else ()), state).values()
    assert sum(t.nbytes for t in sizes) == sum(t.nbytes for n, t in weights.items() if "extra" not in n)
    if not path:
        assert read.tied_names == find_tied_names(model)
        read.into_module(make_model(shares))


@settings(max_examples=40)
@given(shared)
def test_tied_names_are_those_that_torch_has_beside_the_names_of_a_state(shares):
    model = make_model(shares)
    state = TrainState.from_module(model)
    names = {*state.params, *state.buffers, *(f"{path}._extra_state" for path in state.extra_state)}
    assert names | state.tied_names.keys() == set(model.state_dict())
    assert names.isdisjoint(state.tied_names)
    assert set(state.tied_names.values()) <= names


def tied():
    return make_model([("weight", 0, 1), ("scale", 0, 2)])


def test_buffers_that_no_state_dict_has_get_no_further_name():
    model = tied()
    model["head"].register_buffer("cache", model["emb"].scale, persistent=False)
    assert "head.cache" not in find_tied_names(model)


def test_a_module_that_contains_itself_is_read_once():
    model = nn.ModuleDict({"a": nn.Linear(1, 1)})
    model["a"].parent = [model]
    model["a"].add_module("back", model["a"])
    assert find_tied_names(model) == {}


def test_names_of_wrappers_are_no_further_names():
    model = nn.ModuleDict({"a": torch.compile(nn.Linear(1, 1))})
    assert find_tied_names(model) == {}
    model["b"] = model["a"]
    assert find_tied_names(model) == {"b.weight": "a.weight", "b.bias": "a.bias"}


def test_tensors_of_one_name_that_differ_in_a_file_are_refused():
    files = content(TrainState.from_module(tied()))
    weights = load(files[WEIGHTS])
    length = int.from_bytes(files[WEIGHTS][:8], "little")
    metadata = json.loads(files[WEIGHTS][8 : 8 + length])["__metadata__"]
    weights["head.weight"] = weights["head.weight"] + 1
    with pytest.raises(ContentError, match=r"'head.weight' and 'emb.weight' are one tensor of the model, and "):
        read_state({WEIGHTS: save(weights, metadata)}, START)
    facts = json.loads(metadata["noether"])
    for names in ({"head.weight": "head.weight"}, {"head.weight": "nothing"}, {"emb.bias": "emb.weight"}, [], 3):
        changed = {"noether": json.dumps({**facts, "tied_names": names})}
        with pytest.raises(ContentError):
            read_state({WEIGHTS: save(weights, changed)}, START)


def test_a_checkpoint_of_an_earlier_version_has_the_first_name_only_and_loads():
    model = tied()
    state = TrainState.from_module(model)
    old = content(state.replace(tied_names={}))
    assert "head.weight" not in load(old[WEIGHTS])
    fresh = tied()
    read_state(old, START).into_module(fresh)
    assert torch.equal(fresh["head"].weight, model["emb"].weight)
    assert fresh["head"].weight is fresh["emb"].weight


def test_stored_weights_may_have_any_name_of_a_tensor():
    state = TrainState.from_module(tied()).remember("weights/mine", {"params": {"head.weight": torch.ones(2, 2)}})
    used = use_weights(state, "mine")
    assert torch.equal(used.params["emb.weight"], torch.ones(2, 2))
    assert torch.equal(
        load(content(state, weights_of="mine", models=("head",))[WEIGHTS])["head.weight"], torch.ones(2, 2)
    )
