"""`same` never raises, is an equivalence, and tells apart what differs in one bit."""

import copy
import dataclasses
import decimal
import math
import struct
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether import Run, TrainState
from noether.testing import differences, same

NUMBERS = st.one_of(
    st.sampled_from((0, 0.0, -0.0, 1, 1.0, True, False, None, math.nan, math.inf, "1", b"1", 1 + 0j)),
    st.builds(complex, st.sampled_from((0.0, -0.0, math.nan)), st.sampled_from((0.0, -0.0, math.nan))),
    st.sampled_from((0.0, -0.0, math.nan, 1.0)).flatmap(
        lambda value: st.sampled_from((np.float32(value), np.float64(value), np.array([value]), torch.tensor(value)))
    ),
)
KEYS = st.one_of(st.sampled_from((0, 0.0, -0.0, 1, 1.0, True, "a", math.nan)), st.tuples(st.sampled_from((0, 0.0))))
VALUES = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.lists(inner, max_size=2).map(tuple), st.dictionaries(KEYS, inner, max_size=2)
    ),
    max_leaves=4,
)


@given(VALUES)
def test_a_value_is_the_same_as_itself_and_as_its_copy(value):
    assert same(value, value)
    assert same(value, copy.deepcopy(value))


@given(VALUES, VALUES)
def test_same_is_symmetric(a, b):
    assert same(a, b) == same(b, a)


@given(st.lists(NUMBERS, min_size=3, max_size=3))
def test_same_is_transitive(values):
    a, b, c = values
    assert not (same(a, b) and same(b, c)) or same(a, c)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_floats_are_compared_by_their_bits(one, other):
    a, b = (struct.unpack("<f", struct.pack("<I", bits))[0] for bits in (one, other))
    expected = one == other or (math.isnan(a) and math.isnan(b))
    ours, theirs = (np.array([bits], dtype=np.uint32).view(np.float32) for bits in (one, other))
    assert same(ours, theirs) == same(torch.from_numpy(ours), torch.from_numpy(theirs)) == expected
    assert same(ours[0], theirs[0]) == same(a, b) == expected


FLOATS = [each for each in vars(torch).values() if isinstance(each, torch.dtype) and each.is_floating_point]
FLOATS = [each for each in FLOATS if each.itemsize <= 8 and "float4" not in str(each)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tensors_of_every_dtype_are_compared(dtype):
    values = torch.tensor([0.5, 1.0]).to(dtype)
    assert same(values, values.clone())
    assert not same(values, torch.tensor([0.5, 2.0]).to(dtype))
    assert not same(values, torch.tensor([0.5, 1.0], dtype=torch.complex64))


def quantize(values):
    return torch.quantize_per_tensor(torch.tensor(values), 0.1, 0, torch.qint8)


@dataclasses.dataclass
class Pair:
    left: object
    right: object


class Plain:
    def __init__(self, value):
        self.value = value


class Refuses:
    def __eq__(self, other):
        raise RuntimeError("no comparison")

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no text")


def linear(value):
    layer = torch.nn.Linear(1, 1)
    layer.load_state_dict({"weight": torch.full((1, 1), float(value)), "bias": torch.zeros(1)})
    return layer


def contains_itself(value):
    found = [value]
    found.append(found)
    return found


def closure(value):
    return lambda: value


KINDS = {
    "sparse": lambda v: (torch.eye(2) * v).to_sparse(),
    "csr": lambda v: (torch.eye(2) * v).to_sparse_csr(),
    "csc": lambda v: (torch.eye(2) * v).to_sparse_csc(),
    "quantized": lambda v: quantize([float(v), 0.0]),
    "nested": lambda v: torch.nested.nested_tensor([torch.ones(v), torch.ones(3)], layout=torch.jagged),
    "complex": lambda v: torch.tensor(complex("nan"), dtype=torch.complex64) if v == 1 else torch.tensor(1j),
    "conjugate": lambda v: torch.tensor([1 + v * 1j]).conj(),
    "meta": lambda v: torch.ones(v, device="meta"),
    "empty": lambda v: torch.ones(0, v),
    "large": lambda v: torch.arange(100) + v,
    "parameter": lambda v: torch.nn.Parameter(torch.ones(v)),
    "bool": lambda v: torch.tensor([v == 1]),
    "object array": lambda v: np.array([v, "a", None], dtype=object),
    "record array": lambda v: np.array([(v, math.nan)], dtype=[("a", "i4"), ("b", "f8")]),
    "text array": lambda v: np.array([str(v)]),
    "date": lambda v: np.datetime64("NaT") if v == 1 else np.datetime64("2020-01-01"),
    "decimal": lambda v: decimal.Decimal("nan") if v == 1 else decimal.Decimal(1),
    "generator": lambda v: torch.Generator().manual_seed(v),
    "module": linear,
    "exception": ValueError,
    "set": lambda v: {float(v), (math.nan, 1.0)},
    "deque": lambda v: deque([torch.tensor(v)]),
    "dataclass": lambda v: Pair(torch.tensor(v), np.ones(2)),
    "plain object": lambda v: Plain(torch.tensor(v)),
    "function": closure,
    "contains itself": contains_itself,
    "run": lambda v: Run(run_id=str(v)),
    "state": lambda v: TrainState(seed=v),
}


@pytest.mark.filterwarnings("ignore")  # sparse and quantized tensors warn of themselves
@pytest.mark.parametrize("name", KINDS)
def test_values_of_every_kind_are_compared(name):
    make = KINDS[name]
    assert same(make(1), make(1))
    assert not same(make(1), make(2))
    assert not same(make(1), None)
    assert list(differences({"x": make(1)}, {"x": make(2)}))


def test_same_does_not_raise_where_a_comparison_does():
    assert not same(Refuses(), Refuses())
    assert list(differences([Refuses()], [Refuses()])) == [("[0]", "a Refuses", "a Refuses")]
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert not same(deep, [*deep, 1])


def test_figures_are_compared_by_their_pixels():
    figure = pytest.importorskip("matplotlib.figure")

    def draw(height):
        drawn = figure.Figure(figsize=(1, 1), dpi=30)
        drawn.subplots().plot([0, height])
        return drawn

    assert same(draw(1), draw(1))
    assert not same(draw(1), draw(-3))
