"""The law of memory: what `remember` accepts comes back from a checkpoint with equal values of equal types."""

import enum
import io
import math
import struct
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

from noether import AfterUpdate, BeforeTraining, SaveCheckpoint, TrainState, callback, compose
from noether.core.tensors.tree import FrozenDict
from noether.effects import CheckpointStore
from noether.effects.checkpoints.state_codec import decode_state, encode_state

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
UPDATE = AfterUpdate(samples=4)
Pair = namedtuple("Pair", "a b")  # noqa: PYI024  # users write it like this


class Name(str):
    __slots__ = ()


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    FAST = "fast"


def same_exactly(a, b):
    """Return whether two trees are equal in types, keys, order, bits of floats, and bits of tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_exactly(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_exactly, a, b))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, torch.Tensor):
        facts = [(each.dtype, each.shape, each.requires_grad) for each in (a, b)]
        return facts[0] == facts[1] and bits(a) == bits(b)
    return a == b


def bits(tensor):
    return bytes(tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy())


def attempt(function):
    """Return what a function returns, or the TypeError that it raises."""
    try:
        return function()
    except TypeError as error:
        return error


def through_disk(state, folder):
    store = CheckpointStore(folder, "run")
    store.save(SaveCheckpoint(tag="x"), state, UPDATE)
    return CheckpointStore(folder, "run").load(store.find("x"))


def through_torch(state):
    content = io.BytesIO()
    torch.save(encode_state(state), content)
    content.seek(0)
    return decode_state(torch.load(content, weights_only=True))


BASE = torch.arange(24.0)
TENSORS = [
    BASE[4:8],
    BASE[4:8],
    BASE[::3],
    BASE.reshape(4, 6).T,
    BASE.reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    torch.ones(1).expand(3, 2),
    torch.zeros(2, 0, 3),
    torch.tensor(True),
    torch.tensor([math.nan, -math.nan, -0.0, math.inf]),
    torch.tensor([0x7FC00001, -1, 1], dtype=torch.int32).view(torch.float32),
    torch.tensor([1 + 2j, -0.0]),
    torch.tensor([1 + 2j, -0.0]).conj(),
    torch.tensor([[1 + 2j], [math.inf]], dtype=torch.complex128),
    torch.zeros(0, dtype=torch.complex128),
    torch.tensor(2**64 - 1, dtype=torch.uint64),
    *(torch.arange(6, dtype=torch.uint8).view(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu)),
    *(torch.arange(6, dtype=torch.uint8).view(dtype) for dtype in (torch.float8_e5m2fnuz, torch.bfloat16)),
]
TEXT = st.one_of(
    st.text(max_size=4),
    st.text(st.characters(categories=["Cs"]), max_size=2),  # half a character
    st.sampled_from(["$tensor", "$tuple", "$dict", "$number", "$integer", "$items", "$text", "__metadata__"]),
    st.sampled_from(["a.b", "a", "b", "", ".", "0", "\0", "$"]),
)
FLOATS = st.one_of(st.floats(), st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8))[0]))
INTEGERS = st.one_of(st.integers(), st.sampled_from([2**63, -(2**64), 10**600, -(10**700), 10**4000, 2**2000, 2**2040]))
ACCEPTED = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXT, st.sampled_from(TENSORS))
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # both are on their way out of torch
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    NESTED = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
REFUSED = [
    np.float64(0.5), np.float32(0.5), np.int64(1), np.bool_(1), np.ones(2), np.str_("a"),
    {1, 2}, frozenset({1}), b"x", 1j, range(3), Color.RED, Level.LOW, Mode.FAST, Name("a"), Pair(1, 2),
    torch.float32, torch.device("cpu"), torch.Size([1]), torch.ones(2).to_sparse(), torch.ones(2, requires_grad=True),
    nn.Parameter(torch.ones(2)), OrderedDict(a=1), defaultdict(int, a=1), Counter("a"), MappingProxyType({"a": 1}),
    QUANTIZED, NESTED, int, print, object(),
    {1: "a", "1": "b"}, {None: 1}, {True: 1}, {0.5: 1}, {(1, 2): 1}, {Mode.FAST: 1}, {Name("a"): 1}, {b"a": 1},
]  # fmt: skip
ANYTHING = st.recursive(
    st.one_of(ACCEPTED, ACCEPTED, ACCEPTED, ACCEPTED, st.sampled_from(REFUSED)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(TEXT, inner, max_size=3),
        st.dictionaries(st.one_of(TEXT, st.integers(0, 1)), inner, max_size=2),
    ),
    max_leaves=10,
)


@UNTIMED
@given(first=ANYTHING, second=ANYTHING)
def test_what_is_remembered_comes_back_as_it_was(tmp_path_factory, first, second):
    found = attempt(lambda: TrainState().remember("first", first).remember("second", second))
    event(f"memory is {'refused' if isinstance(found, TypeError) else 'accepted'}")
    if isinstance(found, TypeError):
        assert str(found).startswith(("memory 'first': ", "memory 'second': "))
        return
    state = found
    for other in (through_disk(state, tmp_path_factory.mktemp("store")), through_torch(state)):
        assert same_exactly(other.callback_states, state.callback_states)


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("place", ["itself", "inside"])
def test_what_a_checkpoint_would_change_is_refused_with_its_path_and_a_remedy(value, place):
    memory = value if place == "itself" else {"outer": [1, {"inner": value}]}
    inside = "outer.1.inner"
    with pytest.raises(TypeError, match=r"^memory 'seen': ") as at_once:
        TrainState().remember("seen", memory)
    starting = compose(callback("seen", init=lambda state: memory)(lambda state, event: (state, ())))
    with pytest.raises(TypeError, match=r"^memory 'seen': ") as at_init:
        starting(TrainState(), BeforeTraining())
    with pytest.raises(TypeError, match=r"^memory 'seen': ") as at_construction:
        TrainState(callback_states={"seen": memory})
    message = str(at_once.value)
    assert message == str(at_init.value) == str(at_construction.value)
    assert place == "itself" or inside in message
    assert "write " in message or type(value) in (range, type, object, type(print))


@pytest.mark.parametrize("value", [value for value in REFUSED if not isinstance(value, torch.Tensor) or value.is_leaf])
def test_later_memory_is_refused_as_well(value):
    state = TrainState().remember("seen", {"a": 1})
    if type(value) is torch.Tensor:  # for speed, later memories are searched for these when they are saved
        with pytest.raises(TypeError, match=r"^memory 'seen': a is a (tensor|quantized|nested)"):
            encode_state(state.remember("seen", {"a": value}))
    else:
        with pytest.raises(TypeError, match=r"^memory 'seen': "):
            state.remember("seen", {"a": value})


def test_whole_numbers_of_any_length_come_back(tmp_path):
    for number in (10**5000, -(10**5000)):  # Python does not show it in decimal digits
        state = TrainState().remember("m", number)
        assert through_disk(state, tmp_path / str(number > 0)).memory("m") == number
        assert through_torch(state).memory("m") == number


def nest(levels, make):
    tree = 1
    for _ in range(levels):
        tree = make(tree)
    return tree


@pytest.mark.parametrize("make", [lambda tree: {"a": tree}, lambda tree: (tree,), lambda tree: {"$": (tree,)}])
def test_the_deepest_memory_that_is_accepted_can_be_saved(tmp_path, make):
    for levels in range(40, 110):
        memory = nest(levels, make)
        found = attempt(lambda memory=memory: TrainState().remember("deep", 0).remember("deep", memory))
        if isinstance(found, TypeError):
            break
        last = found
        assert same_exactly(TrainState().remember("deep", memory).memory("deep"), last.memory("deep"))
    for other in (through_disk(last, tmp_path), through_torch(last)):
        assert same_exactly(other.callback_states, last.callback_states)
    with pytest.raises(TypeError, match="is nested deeper than"):
        TrainState().remember("deep", memory)


def test_memory_that_contains_itself_is_refused():
    memory = {}
    memory["again"] = [memory]
    for state in (TrainState(), TrainState().remember("loop", 1)):
        with pytest.raises(TypeError, match=r"^memory 'loop': again\.0\.again.* is nested deeper than"):
            state.remember("loop", memory)


def test_frozen_memory_is_not_copied():
    memory = FrozenDict(a=FrozenDict(b=(1, 2)), c=torch.ones(1))
    assert TrainState().remember("m", memory).memory("m") is memory
    assert TrainState().remember("m", 1).remember("m", memory).memory("m") is memory


@pytest.mark.parametrize("value", [np.float64(0.5), {1}, torch.ones(1, requires_grad=True)])
def test_hyperparams_are_checked_when_a_callback_sets_them(value):
    def set_scale(state, event):
        return state.replace(hyperparams=state.hyperparams | {"lr_scale": value}), ()

    with pytest.raises(TypeError, match=r"^hyperparams: lr_scale is a "):
        compose(set_scale)(TrainState(), UPDATE)
    with pytest.raises(TypeError, match=r"^hyperparams: lr_scale is a "):
        TrainState(hyperparams={"lr_scale": value})
