"""The number of samples of a batch: known, said by the batch or a function, or the first dimension of all tensors."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from noether import Run
from noether.core.tensors.batch import batch_size, collated_size, count_samples


@dataclass
class Batch:
    inputs: object
    targets: object = None


@dataclass(slots=True)
class Slotted:
    inputs: object


class Pair(NamedTuple):
    inputs: object
    targets: object


class Graphs:
    def __init__(self, nodes, num_graphs):
        self.x, self.num_graphs = torch.zeros(nodes, 3), num_graphs


class Sized(UserDict):
    batch_size = torch.Size([4])


class Cyclic:
    def __init__(self, x):
        self.x, self.me = x, self


def rows(n, *shape):
    return torch.zeros(n, *shape)


@pytest.mark.parametrize(
    "batch",
    [
        rows(4, 2),
        (rows(4, 2), rows(4)),
        [rows(4, 2), rows(4)],
        ((rows(4, 2), rows(4, 3)), {"y": rows(4)}),
        (rows(4, 9, 2), torch.tensor([9, 3, 2, 1])),
        {"input_ids": rows(4, 9), "labels": rows(4, 9), "num_items_in_batch": torch.tensor(30), "name": "train"},
        UserDict({"x": rows(4)}),
        OrderedDict(x=rows(4), text=["a", "b"]),
        Pair(rows(4, 2), rows(4)),
        Batch(rows(4), rows(4, 1)),
        Batch(Batch(rows(4)), {"y": rows(4)}),
        Slotted(rows(4)),
        SimpleNamespace(x=rows(4), y=rows(4), path=None),
        Cyclic(rows(4)),
        Graphs(55, 4),
        (Graphs(55, 4), rows(4)),
        Sized({"x": rows(4, 2), "weights": rows(9)}),
        pack_sequence([rows(5, 2), rows(3, 2), rows(3, 2), rows(1, 2)]),
        (pack_sequence([rows(5, 2), rows(3, 2), rows(3, 2), rows(1, 2)]), rows(4)),
        torch.nested.nested_tensor([rows(5, 2), rows(3, 2), rows(1, 2), rows(1, 2)], layout=torch.jagged),
        rows(4, 2).to_sparse(),
    ],
    ids=["tensor", "tuple", "list", "nested", "sequences-and-lengths", "tokens", "user-dict", "ordered", "namedtuple",
         "dataclass", "nested-dataclass", "slots", "object", "cyclic", "graphs", "graphs-and-targets", "tensordict",
         "packed-sequence", "packed-and-targets", "nested-tensor", "sparse"],
)  # fmt: skip
def test_the_size_of_usual_batches(batch):
    assert batch_size(batch) == Run().count_samples(batch) == 4


@pytest.mark.parametrize("batch", [None, (), [], {}, UserDict(), (rows(0, 3), rows(0))], ids=repr)
def test_an_empty_batch_has_no_samples(batch):
    assert batch_size(batch) == collated_size(batch, 4) == 0


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        (
            {"class_weights": rows(5), "x": rows(8, 3)},
            r"a dict, .* \(batch\['class_weights'\] \(5,\), batch\['x'\] \(8, 3\)\): ",
        ),
        ((rows(55, 3), rows(10)), r"a tuple, .* \(batch\[0\] \(55, 3\), batch\[1\] \(10,\)\): "),
        (Batch(rows(55, 3), rows(10)), r"a Batch, .* \(batch\.inputs \(55, 3\), batch\.targets \(10,\)\): "),
        (Pair(rows(55), rows(10)), r"a Pair, .* \(batch\['inputs'\] \(55,\), batch\['targets'\] \(10,\)\): "),
        ({"g": Graphs(9, 4), "y": {"z": rows(3)}}, r"batch\['g'\] \(4,\), batch\['y'\]\['z'\] \(3,\)\): "),
    ],
    ids=["class-weights", "points", "dataclass", "namedtuple", "graphs"],
)
def test_tensors_that_disagree_are_refused_with_their_shapes(batch, shapes):
    with pytest.raises(ValueError, match=shapes) as refused:
        Run().count_samples(batch)
    fix = "pass run=noether.Run(batch_size=...), a function of the batch that returns its number of samples; in a conf"
    assert fix in str(refused.value)
    assert Run(batch_size=lambda each: 8).count_samples(batch) == 8


@pytest.mark.parametrize(
    "batch", ["text", ["a", "b"], {"loss": torch.tensor(1.0)}, object(), 3], ids=lambda batch: type(batch).__name__
)
def test_a_batch_without_tensors_is_refused(batch):
    with pytest.raises(
        ValueError, match=f"no tensor with a dimension is found in the batch, a {type(batch).__name__}: "
    ):
        batch_size(batch)


@pytest.mark.parametrize("size", [3, np.int64(3), torch.tensor(3)], ids=repr)
def test_a_function_may_return_any_whole_number(size):
    number = count_samples("batch", lambda batch: size)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("size", [-1, 2.0, None, True, torch.tensor(2.5), torch.ones(2), "4"], ids=repr)
def test_a_function_that_returns_no_whole_number_is_refused(size):
    def count(batch):
        return size

    with pytest.raises(
        ValueError, match=r"a\.yaml:3: .*<locals>\.count returned .* of a str: return a whole number >= 0"
    ):
        count_samples("batch", count, "a.yaml:3: ")


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@given(SIZES)
def test_the_guess_is_the_size_on_which_all_tensors_agree(sizes):
    batch = tuple(map(rows, sizes))
    if len(set(sizes)) == 1:
        assert batch_size(batch) == sizes[0]
    else:
        with pytest.raises(ValueError, match="differ in their first dimension"):
            batch_size(batch)


@given(SIZES, st.integers(1, 9))
def test_a_collate_has_left_samples_out_only_if_all_tensors_have_fewer(sizes, given):
    agreed = sizes[0] if len(set(sizes)) == 1 else given
    assert collated_size(tuple(map(rows, sizes)), given) == min(agreed, given)
