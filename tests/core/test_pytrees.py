"""Laws of pytrees for the containers of a state, in torch's registries and in optree's."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _cxx_pytree as cxx_pytree
from torch.utils import _pytree as pytree

from noether import TrainingIteration, TrainState
from noether.core.state import Measured
from noether.core.tensors.donation import NOT_DONATED, DonatedError, DonatedTree, donate, lease, was_donated
from noether.core.tensors.losses import WeightedLosses
from noether.core.tensors.tree import FrozenDict, FrozenView

optree = pytest.importorskip("optree")

NAMES = st.text("abcxyz.0", min_size=1, max_size=4)
TENSORS = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=3).map(torch.tensor)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


def dicts(values, size=4):
    return st.dictionaries(NAMES, values, max_size=size)


PARTS = st.recursive(
    TENSORS | SCALARS,
    lambda parts: st.lists(parts, max_size=3).map(tuple) | dicts(parts, 3).map(FrozenDict),
    max_leaves=5,
)
FLAT = dicts(TENSORS | SCALARS).map(FrozenDict)
NESTED = dicts(PARTS).map(FrozenDict)
POSITIONS = st.builds(TrainingIteration, *[st.integers(0, 99)] * 3)
STATES = st.builds(
    TrainState,
    iteration=POSITIONS,
    previous=POSITIONS,
    params=dicts(TENSORS).map(FrozenDict),
    buffers=dicts(TENSORS).map(FrozenDict),
    opt_state=NESTED,
    metrics=dicts(st.builds(Measured, st.floats() | TENSORS, POSITIONS)).map(FrozenDict),
    callback_states=NESTED,
    stop=st.none() | st.text(max_size=3),
    seed=st.integers(0, 9),
    pending=st.none() | NESTED,
    lengths=dicts(st.integers(1, 9)).map(FrozenDict),
)
DONATED = dicts(TENSORS).map(lambda tree: DonatedTree(dict(tree)))
TREES = st.one_of(FLAT, NESTED, STATES, STATES.map(donate), DONATED, st.tuples(FLAT, STATES))

LIBRARIES = {
    "torch": (pytree.tree_flatten, pytree.tree_unflatten),
    "torch's C++": (cxx_pytree.tree_flatten, cxx_pytree.tree_unflatten),
    "optree": (
        lambda tree: optree.tree_flatten(tree, none_is_leaf=True),
        lambda leaves, spec: optree.tree_unflatten(spec, leaves),
    ),
    "optree, own namespace": (
        lambda tree: optree.tree_flatten(tree, none_is_leaf=True, namespace="mine"),
        lambda leaves, spec: optree.tree_unflatten(spec, leaves),
    ),
}
every_library = pytest.mark.parametrize("library", LIBRARIES)


def plain(value):
    """A value in which equality means what a reader means by it, with the types of all containers."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, TrainState):
        return {name: plain(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return type(value).__name__, [plain(part) for part in value]
    return type(value).__name__, value


def order(value):
    """The keys of every mapping in it, as inserted."""
    if isinstance(value, TrainState):
        return order(vars(value))
    if isinstance(value, dict):
        return [(key, order(part)) for key, part in value.items()]
    return [order(part) for part in value] if isinstance(value, tuple) else None


@every_library
@given(tree=TREES)
def test_a_tree_is_rebuilt_from_its_leaves(library, tree):
    flatten, unflatten = LIBRARIES[library]
    leaves, structure = flatten(tree)
    rebuilt = unflatten(leaves, structure)
    assert type(rebuilt) is type(tree)
    assert plain(rebuilt) == plain(tree)
    assert order(rebuilt) == order(tree)
    again, same_structure = flatten(rebuilt)
    assert [plain(leaf) for leaf in again] == [plain(leaf) for leaf in leaves]
    assert same_structure == structure
    assert hash(same_structure) == hash(structure)


@every_library
@given(tree=TREES)
def test_a_tree_is_rebuilt_from_anything(library, tree):
    flatten, unflatten = LIBRARIES[library]
    leaves, structure = flatten(tree)
    for stand_in in (object(), 0, False, 0.5, "text", torch.dtype, torch.Size([2])):
        rebuilt = unflatten([stand_in] * len(leaves), structure)
        assert type(rebuilt) is type(tree)
        again, same_structure = flatten(rebuilt)
        if not isinstance(stand_in, tuple):  # which is a tree itself
            assert again == [stand_in] * len(leaves)
            assert same_structure == structure
    assert type(unflatten([None] * len(leaves), structure)) is type(tree)


@given(tree=TREES)
def test_mapping_composes(tree):
    def double(leaf):
        return leaf * 2 if isinstance(leaf, torch.Tensor) else leaf

    def negate(leaf):
        return -leaf if isinstance(leaf, torch.Tensor) else leaf

    for tree_map in (pytree.tree_map, optree.tree_map):
        assert plain(tree_map(lambda leaf: leaf, tree)) == plain(tree)
        twice = tree_map(negate, tree_map(double, tree))
        assert plain(twice) == plain(tree_map(lambda leaf: negate(double(leaf)), tree))


@given(entries=dicts(TENSORS | SCALARS))
def test_a_frozen_dict_has_the_leaves_of_a_dict_in_its_order(entries):
    for tree in (FrozenDict(entries), DonatedTree(dict(entries)), DonatedTree(dict(entries), NOT_DONATED)):
        for flatten, _ in LIBRARIES.values():
            assert [plain(leaf) for leaf in flatten(tree)[0]] == [plain(leaf) for leaf in flatten(entries)[0]]
        paths = [(pytree.keystr(path), plain(leaf)) for path, leaf in pytree.tree_leaves_with_path(tree)]
        assert paths == [(pytree.keystr(path), plain(leaf)) for path, leaf in pytree.tree_leaves_with_path(entries)]
        assert optree.tree_paths(tree, none_is_leaf=True) == optree.tree_paths(entries, none_is_leaf=True)


@given(entries=dicts(TENSORS | SCALARS), random=st.randoms())
def test_the_order_of_keys_is_part_of_the_structure_where_it_is_for_dicts(entries, random):
    shuffled = dict(random.sample(list(entries.items()), len(entries)))
    for flatten, _ in LIBRARIES.values():
        of_dicts = flatten(entries)[1] == flatten(shuffled)[1]
        assert (flatten(FrozenDict(entries))[1] == flatten(FrozenDict(shuffled))[1]) == of_dicts
        assert (flatten(FrozenDict(entries))[1] != flatten(FrozenDict(shuffled))[1]) != of_dicts


@given(state=STATES)
def test_the_leaves_of_a_state_are_its_tensors(state):
    def tensors_in(value):
        if isinstance(value, torch.Tensor):
            return 1
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
        return sum(map(tensors_in, parts))

    for flatten, _ in LIBRARIES.values():
        leaves, _ = flatten(state)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert len(leaves) == tensors_in(vars(state))


@given(state=STATES)
def test_each_leaf_of_a_state_is_at_its_path(state):
    for path, leaf in pytree.tree_leaves_with_path(state):
        assert eval(f"state{pytree.keystr(path)}") is leaf  # noqa: S307  # a path is an expression
    for accessor, leaf in zip(optree.tree_accessors(state), optree.tree_leaves(state), strict=True):
        assert accessor(state) is leaf


@given(tree=st.one_of(FLAT, STATES, DONATED))
def test_a_structure_survives_json(tree):
    structure = pytree.tree_structure(tree)
    text = pytree.treespec_dumps(structure)
    assert json.loads(text)
    assert pytree.treespec_loads(text) == structure


def test_the_names_in_a_serialized_structure_are_stable():
    text = pytree.treespec_dumps(pytree.tree_structure((TrainState(), donate(TrainState()).params)))
    for name in (
        "noether.core.state.TrainState",
        "noether.core.state_pytree.StateTree",
        "noether.core.tensors.tree.FrozenDict",
        "noether.core.tensors.donation.DonatedTree",
    ):
        assert f'"{name}"' in text


@given(state=STATES)
def test_a_donated_state_has_the_structure_of_the_state(state):
    assert pytree.tree_structure(donate(state)) == pytree.tree_structure(state)
    assert optree.tree_structure(donate(state)) == optree.tree_structure(state)


def test_the_order_of_memories_is_not_part_of_a_state():
    one, other = (TrainState(callback_states=dict(each)) for each in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))
    assert pytree.tree_structure(one) == pytree.tree_structure(other)
    assert pytree.tree_structure(one) != pytree.tree_structure(TrainState(callback_states={"a": 1, "b": 3}))


def test_states_at_different_iterations_differ_in_structure():
    state = TrainState(params={"w": torch.ones(1)})
    with pytest.raises(ValueError, match="context mismatch"):
        pytree.tree_map(torch.add, state, state.advance(samples=4))


def test_what_replaces_a_donated_tree_is_not_donated():
    tree = {"weight": torch.ones(2)}
    state = donate(TrainState(params=tree))
    mapped = state.replace(params=pytree.tree_map(lambda leaf: leaf * 2, state.params))
    state.params.take()
    assert was_donated(state)
    assert not was_donated(mapped)
    assert mapped.params.owner is NOT_DONATED
    assert lease(mapped).params == {"weight": mapped.params["weight"]}
    assert type(lease(mapped).params) is FrozenDict


def test_a_tree_that_was_taken_cannot_be_flattened():
    params = DonatedTree({"weight": torch.ones(2)})
    params.take()
    for read in (pytree.tree_leaves, optree.tree_leaves, lambda tree: tree.copy(), lambda tree: tree.update({"a": 1})):
        with pytest.raises(DonatedError, match="was donated"):
            read(params)


@given(entries=dicts(TENSORS | SCALARS | NESTED), owner=st.sampled_from([None, NOT_DONATED]))
def test_a_copy_of_a_donated_tree_has_what_each_of_its_keys_gives(entries, owner):
    tree = DonatedTree(dict(entries), owner)
    copied, read = tree.copy(), {key: tree[key] for key in tree}
    assert type(copied) is dict
    assert [(key, plain(value)) for key, value in copied.items()] == [
        (key, plain(value)) for key, value in read.items()
    ]
    for key in (key for key, entry in entries.items() if isinstance(entry, torch.Tensor)):
        assert copied[key].is_set_to(entries[key])
        assert (copied[key] is entries[key]) == (owner is NOT_DONATED)


def test_a_donated_state_becomes_plain_data():
    fields = dataclasses.asdict(donate(TrainState(params={"weight": torch.ones(2)})))
    assert fields["params"]["weight"].tolist() == [1.0, 1.0]


def test_every_kind_of_frozen_dict_is_a_pytree():
    losses = WeightedLosses({"ce": torch.ones(())}, {"ce": 3})
    doubled = pytree.tree_map(lambda loss: loss * 2, losses)
    assert (type(doubled), doubled["ce"]) == (FrozenDict, 2)
    means = torch.func.vmap(lambda each: WeightedLosses({"ce": each.mean()}, {"ce": 3}))(torch.ones(4, 2))
    assert means["ce"].shape == (4,)


def test_the_leaves_of_a_donated_tree_are_views():
    tensor = torch.ones(2)
    (leaf,) = pytree.tree_leaves(DonatedTree({"weight": tensor}))
    assert leaf is not tensor
    assert leaf.data_ptr() == tensor.data_ptr()


class Doubled(FrozenView):
    """Reads its entries elsewhere, and doubles them."""

    def __init__(self, entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key] * 2

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


@given(entries=dicts(st.integers()), others=dicts(st.integers()))
def test_a_view_reads_like_a_dict(entries, others):
    view, expected = Doubled(entries), {key: value * 2 for key, value in entries.items()}
    assert dict(view) == {**view} == view.copy() == copy.copy(view) == expected
    assert dict(**view) == expected
    assert (list(view), list(view.keys()), list(view.values())) == (
        list(expected), list(expected), list(expected.values()),
    )  # fmt: skip
    assert list(view.items()) == list(expected.items())
    assert list(reversed(view)) == list(reversed(expected))
    assert (len(view), bool(view)) == (len(expected), bool(expected))
    assert (view == others) == (others == view) == (expected == others)
    assert (view != others) == (others != view) == (expected != others)
    assert view == expected
    assert hash(view) == hash(FrozenDict(expected))
    assert view | others == {**expected, **others}
    assert others | view == {**others, **expected}
    for key in {*entries, *others}:
        assert view.get(key, "none") == expected.get(key, "none")
        assert (key in view) == (key in expected)
    assert repr(view) == f"Doubled({expected})"
    assert pytree.tree_map(lambda leaf: leaf + 1, view) == {key: value + 1 for key, value in expected.items()}
    assert type(pytree.tree_map(lambda leaf: leaf, view)) is FrozenDict


@pytest.mark.parametrize("make", [FrozenDict, Doubled, lambda entries: DonatedTree(dict(entries))])
def test_nothing_writes_to_a_frozen_mapping(make):
    tree = make({"a": torch.ones(1)})
    for write in (
        lambda: tree.update(a=torch.zeros(1)),
        lambda: tree.update({"b": 1}),
        lambda: tree.update([("a", 1)]),
        lambda: tree.__setitem__("a", 1),
        lambda: tree.pop("a"),
        lambda: tree.setdefault("a", 1),
        lambda: tree.__ior__({"a": 1}),
        tree.clear,
        tree.popitem,
    ):
        with pytest.raises(TypeError, match="never written to"):
            write()
    assert list(tree) == ["a"]


def test_an_update_with_what_is_there_is_no_write():
    tensor, sparse, meta = torch.ones(1), torch.ones(2).to_sparse(), torch.ones(2, device="meta")
    entries = {"dense": tensor, "sparse": sparse, "meta": meta, "number": 1}
    for tree in (FrozenDict(entries), DonatedTree(dict(entries))):
        tree.update(dict(tree))
        tree.update()
