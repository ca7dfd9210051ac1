"""Batches and outputs keep their containers: no constructor of a user runs, and nothing in them is lost."""

import collections
import dataclasses
import enum
import types
from typing import Any, NamedTuple, Self

import attrs
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import _pytree as pytree
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from noether import TrainState, forward
from noether.core.tensors.containers import map_tensors, move_batch
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

META = torch.device("meta")
RUNS: list[type] = []
"""Classes whose constructor ran."""


class Counted:
    """Counts its constructions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        RUNS.append(type(self))
        super().__init__(*args, **kwargs)


class Named(Counted, dict):
    """Takes no mapping, and has attributes and a default."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __missing__(self, key: str) -> str:
        return self.name

    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError("entries of a copy are not set by the class")


class Entries(dict):
    """Its entries are its attributes."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.__dict__ = self


class Grouped(Counted, collections.defaultdict):
    """Has a default factory."""


class Ordered(collections.OrderedDict):
    """Has an order of its own."""

    def __init__(self, first: str, **entries: Any) -> None:
        super().__init__(**entries)
        self.move_to_end(first, last=False)


class Stack(Counted, list):
    """Takes two arguments."""

    def __init__(self, name: str, items: Any) -> None:
        super().__init__(items)
        self.name = name


class Pair(tuple):  # noqa: SLOT001  # has attributes
    """Takes two arguments."""

    def __new__(cls, a: Any, b: Any) -> Self:
        self = super().__new__(cls, (a, b))
        self.sum = a + b
        return self


class Recent(collections.deque):
    """Keeps two."""

    def __init__(self, items: Any) -> None:
        super().__init__(items, maxlen=2)


class Result(NamedTuple):
    pred: torch.Tensor
    name: str


class Checked(Result):
    """Refuses what its base accepts."""

    def __new__(cls, pred: torch.Tensor) -> Self:
        return super().__new__(cls, pred + 1, "checked")


@dataclasses.dataclass
class Derived:
    pred: torch.Tensor
    doubled: torch.Tensor = dataclasses.field(init=False)
    absent: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        RUNS.append(Derived)
        self.pred = self.pred + 1
        self.doubled = 2 * self.pred


@dataclasses.dataclass
class Scaled:
    pred: torch.Tensor
    scale: dataclasses.InitVar[float]

    def __post_init__(self, scale: float) -> None:
        self.pred = self.pred * scale


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frozen:
    pred: torch.Tensor
    name: str = "frozen"


@dataclasses.dataclass(frozen=True, eq=False)
class Extended(Frozen):
    more: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "note", self.pred + 1)


@attrs.frozen(eq=False)
class Attrs:
    pred: torch.Tensor = attrs.field(converter=lambda pred: pred + 1)
    name: str = attrs.field(init=False, default="x")


class Registered:
    """A pytree of torch; `label` is part of its structure."""

    def __init__(self, pred: torch.Tensor, label: str) -> None:
        self.pred, self.label = pred, label


class OfOptree(Registered):
    """A pytree of optree."""


class Lookup(collections.UserDict):
    """Keeps its entries in an attribute."""

    def __init__(self, name: str, **entries: Any) -> None:
        super().__init__(**entries)
        self.name = name


pytree.register_pytree_node(
    Registered, lambda each: ([each.pred], each.label), lambda children, label: Registered(*children, label)
)
optree.register_pytree_node(
    OfOptree,
    lambda each: ([each.pred], each.label),
    lambda label, children: OfOptree(*children, label),
    namespace=vars(optree.registry)["__GLOBAL_NAMESPACE"],
)


def named(value):
    result = Named("n")
    dict.__setitem__(result, "pred", value)
    return result


def grouped(value):
    result = Grouped(list)
    result["pred"] = value
    return result


MAKERS = {
    "dict": lambda t: {"pred": t, 3: "x"},
    "list": lambda t: [t, 1],
    "tuple": lambda t: (t, None),
    "defaultdict": lambda t: collections.defaultdict(list, pred=t),
    "OrderedDict": lambda t: collections.OrderedDict(b=t, a=1),
    "dict-with-constructor": named,
    "dict-of-attributes": lambda t: Entries(pred=t),
    "defaultdict-subclass": grouped,
    "OrderedDict-subclass": lambda t: Ordered("b", a=t, b=1),
    "UserDict": lambda t: Lookup("n", pred=t),
    "BatchEncoding": lambda t: BatchEncoding({"pred": t}),
    "ModelOutput": lambda t: CausalLMOutput(logits=t, hidden_states=(t,)),
    "mappingproxy": lambda t: types.MappingProxyType({"pred": t}),
    "ChainMap": lambda t: collections.ChainMap({"pred": t}, {"x": 1}),
    "list-with-constructor": lambda t: Stack("n", [t]),
    "tuple-with-constructor": lambda t: Pair(t, t),
    "deque": lambda t: collections.deque([t], maxlen=3),
    "deque-subclass": lambda t: Recent([t, t, 1]),
    "namedtuple": lambda t: Result(t, "x"),
    "namedtuple-subclass": Checked,
    "return-type": lambda t: torch.max(t, dim=0),
    "Size": lambda t: t.shape,
    "PackedSequence": lambda t: pack_sequence([t, t]),
    "post_init": Derived,
    "InitVar": lambda t: Scaled(t, 2.0),
    "frozen-slots": lambda t: Frozen(pred=t),
    "frozen-subclass": lambda t: Extended(pred=t, more=[t]),
    "attrs": Attrs,
    "namespace": lambda t: types.SimpleNamespace(pred=t),
    "torch-pytree": lambda t: Registered(t, "label"),
    "optree-pytree": lambda t: OfOptree(t, "label"),
    "constant": lambda t: frozenset({1}),
}


def parts_of(value):
    """Return all that a value consists of, as plain values that can be compared."""
    if isinstance(value, torch.Tensor):
        return type(value).__name__, value.tolist()
    found = [type(value).__name__]
    if isinstance(value, (list, tuple, collections.deque)):
        found += map(parts_of, value)
    elif isinstance(value, collections.abc.Mapping):
        found += [(key, parts_of(item)) for key, item in value.items()]
    elif type(value).__module__ == "builtins":
        return value
    found += [getattr(value, name, None) for name in ("maxlen", "default_factory")]
    attributes = [(name, getattr(value, name)) for name in attribute_names(value) if hasattr(value, name)]
    return [*found, *((name, parts_of(item)) for name, item in attributes)]


def attribute_names(value):
    entries = getattr(value, "__dict__", {})
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    return sorted({*({} if entries is value else entries), *slots} - {"__weakref__"})


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_the_identity_returns_an_equal_object_and_runs_no_constructor(maker):
    """As Lightning#10308, accelerate#4162 (a defaultdict), Lightning#9208, #9930 (`InitVar`, `__post_init__`)."""
    value = maker(torch.arange(3.0))
    before = parts_of(value)
    RUNS.clear()
    copied = map_tensors(lambda tensor: tensor, value)
    assert type(copied) is type(value)
    assert parts_of(copied) == parts_of(value) == before
    assert not RUNS


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_every_tensor_is_reached(maker):
    outputs = map_tensors(lambda tensor: torch.full((3,), 7), maker(torch.arange(3)))
    assert "[0, 1, 2]" not in str(parts_of(outputs))
    if isinstance(outputs, CausalLMOutput):
        assert outputs.logits is outputs["logits"]


@pytest.mark.parametrize("name", ["defaultdict", "post_init", "InitVar", "namedtuple-subclass", "ModelOutput", "attrs"])
def test_losses_and_callbacks_get_the_outputs_that_the_model_returned(name):
    returned, given = [], []

    class Net(torch.nn.Linear):
        def forward(self, x):
            returned.append(MAKERS[name](super().forward(x)))
            return returned[-1]

    def loss(outputs, batch):
        given.append(outputs)
        found = []
        map_tensors(lambda tensor: found.append(tensor) or tensor, outputs)
        return found[0].mean()

    model = Net(2, 1)
    state, batch = TrainState.from_module(model), torch.ones(3, 2)
    _, outputs = forward(model, loss)(state, batch)
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1})
    _, event = Step(model=model, loss=loss, optimizer=optimizer, lr={"default": Constant(value=0.1)})(state, [batch])
    assert all(a is b for a, b in zip(given, returned, strict=True))
    for seen, original in zip((outputs, *event.outputs), returned, strict=True):
        assert type(seen) is type(original)
        assert parts_of(seen) == parts_of(original)


def test_the_copy_is_another_object_that_shares_nothing_written_to():
    outputs = grouped(torch.ones(1))
    copied = map_tensors(torch.clone, outputs)
    copied["new"].append(1)
    assert list(outputs) == ["pred"]
    entries = map_tensors(torch.clone, Entries(pred=torch.ones(1)))
    entries.more = 1
    assert entries["more"] == 1


NESTED = st.recursive(
    st.sampled_from([1, "x", None]) | st.just(torch.ones(2)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        st.builds(Result, inner, inner),
        st.builds(types.SimpleNamespace, a=inner),
        st.builds(lambda part: collections.defaultdict(list, a=part), inner),
        st.builds(lambda part: Extended(pred=torch.ones(1), more=part), inner),
    ),
    max_leaves=6,
)


@given(NESTED)
def test_a_map_of_a_composition_is_the_composition_of_maps(tree):
    once = map_tensors(lambda tensor: (tensor + 1) * 3, tree)
    twice = map_tensors(lambda tensor: tensor * 3, map_tensors(lambda tensor: tensor + 1, tree))
    assert parts_of(once) == parts_of(twice)
    assert parts_of(map_tensors(lambda tensor: tensor, tree)) == parts_of(tree)


@dataclasses.dataclass
class Level:
    """The values of an enumeration."""

    number: int


class Stage(Level, enum.Enum):
    """Its members are dataclasses."""

    FIRST = 1


def test_members_of_an_enumeration_and_modules_are_no_copies():
    values = [Stage.FIRST, torch.nn.Linear(1, 1)]
    assert all(a is b for a, b in zip(map_tensors(torch.clone, values), values, strict=True))


def test_objects_may_refer_to_each_other():
    parent = types.SimpleNamespace(pred=torch.ones(1))
    parent.children = [types.SimpleNamespace(parent=parent)]
    copied = map_tensors(lambda tensor: tensor + 1, parent)
    assert copied.children[0].parent is copied
    assert copied.pred == 2


def test_other_tensors_are_tensors():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    values = [nested, torch.ones(2).to_sparse(), torch.nn.Parameter(torch.ones(2))]
    seen = []
    map_tensors(lambda tensor: seen.append(tensor) or tensor, values)
    assert all(a is b for a, b in zip(seen, values, strict=True))


class Closed(collections.abc.Mapping):
    """Keeps its entries in no attribute."""

    __slots__ = ("get_entries",)

    def __init__(self, entries):
        self.get_entries = lambda: entries

    def __getitem__(self, key):
        return self.get_entries()[key]

    def __iter__(self):
        return iter(self.get_entries())

    def __len__(self):
        return len(self.get_entries())


def test_a_mapping_whose_tensors_cannot_be_found_is_refused_by_name():
    with pytest.raises(TypeError, match=r"test_containers\.Closed keeps its entry 'pred' where noether does not find"):
        map_tensors(torch.clone, Closed({"pred": torch.ones(1)}))
    assert dict(map_tensors(torch.clone, Closed({"name": "x"}))) == {"name": "x"}


class Graph:
    """Moves itself."""

    def __init__(self, nodes):
        self.nodes = nodes

    def to(self, device):
        return Graph(self.nodes.to(device))


def test_batches_move_with_all_that_they_contain():
    moved = move_batch({"graph": Graph(torch.ones(2)), "x": Frozen(pred=torch.ones(1)), "kind": Graph}, META)
    assert moved["graph"].nodes.device == moved["x"].pred.device == META
    assert moved["kind"] is Graph
    packed = move_batch(pack_sequence([torch.ones(3), torch.ones(2)]), META)
    assert isinstance(packed, PackedSequence)
    assert (packed.data.device, packed.batch_sizes.device.type) == (META, "cpu")  # torch needs the lengths there


def test_an_object_that_would_stay_behind_is_refused_by_name():
    class Points:
        def __init__(self, xyz):
            self.xyz = xyz

    message = r"the batch holds a \S*Points whose xyz is on cpu, not on meta: give \S*Points a method to\(device\)"
    with pytest.raises(TypeError, match=message):
        move_batch([Points(torch.ones(1))], META)
    assert move_batch(points := [Points(3)], META) == points
