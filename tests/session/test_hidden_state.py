"""A session seeds the generators that a loader holds, and warns about state that no checkpoint has."""

import functools
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from plain_loop import Loop
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

import noether
from noether.core import object_graph
from noether.session.errors import ResumeWarning
from noether.session.hidden_state import find_unseedable, generators_of, hidden_state
from noether.session.loader import batch_seeder, seed_pass, set_epoch
from noether.session.randomness import seed_all
from noether.testing import assert_same

SAVE = noether.CheckpointCallback(every_n_updates=1, save_weights=True, save_optim=True)
INPUTS = torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
POINTS = TensorDataset(INPUTS, (INPUTS.sum(1) > 0).long())


class Noise:
    def __init__(self):
        self.rng = np.random.default_rng(5)

    def __call__(self, x):
        return x + 0.1 * float(self.rng.normal())


class Augmented(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 22

    def __getitem__(self, index):
        x, y = POINTS[index]
        return self.transform(x), y


GLOBAL = random.Random(3)  # noqa: S311  # no secret


def add_global_noise(x):
    return x + 0.1 * GLOBAL.random()


class ClassNoise:
    rng = random.Random(4)  # noqa: S311  # no secret

    def __call__(self, x):
        return x + 0.1 * self.rng.random()


def add_noise(rng, x):
    return x + 0.1 * rng.random()


class Order(Sampler):
    def __init__(self):
        pass

    def __len__(self):
        return 22


def make_closure():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randperm(22, generator=generator).tolist()


class FromClosure(Order):
    def __init__(self):
        self.draw = make_closure()

    def __iter__(self):
        return iter(self.draw())


class FromList(Order):
    def __init__(self):
        self.generators = [{"order": torch.Generator().manual_seed(0)}]

    def __iter__(self):
        return iter(torch.randperm(22, generator=self.generators[0]["order"]).tolist())


class FromSlot(Order):
    __slots__ = ("generator", "unset")

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        return iter(torch.randperm(22, generator=self.generator).tolist())


class Resets(IterableDataset):
    """An iterator that starts again when it is iterated."""

    def __init__(self):
        self.index = 0

    def __iter__(self):
        self.index = 0
        return self

    def __next__(self):
        if self.index == 22:
            raise StopIteration
        self.index += 1
        return POINTS[self.index - 1]


class Caching(Dataset):
    """Keeps what it computed: another state, and the same samples."""

    def __init__(self):
        self.cache, self.items, self.file = {}, [None] * 22, None

    def __len__(self):
        return 22

    def __getitem__(self, index):
        self.cache[index] = self.items[index] = POINTS[index]
        self.file = 3
        return self.cache[index]


EXACT = {
    "transform": lambda: DataLoader(Augmented(Noise()), 4, shuffle=True),
    "subset": lambda: DataLoader(Subset(Augmented(Noise()), range(20)), 4, shuffle=True),
    "concat": lambda: DataLoader(ConcatDataset([Augmented(Noise()), Augmented(Noise())]), 8, shuffle=True),
    "partial": lambda: DataLoader(Augmented(functools.partial(add_noise, random.Random(1))), 4),  # noqa: S311  # no secret
    "method": lambda: DataLoader(Augmented(Noise().__call__), 4),
    "global": lambda: DataLoader(Augmented(add_global_noise), 4),
    "class": lambda: DataLoader(Augmented(ClassNoise()), 4),
    "closure": lambda: DataLoader(POINTS, 4, sampler=FromClosure()),
    "list": lambda: DataLoader(POINTS, 4, sampler=FromList()),
    "slot": lambda: DataLoader(POINTS, 4, sampler=FromSlot()),
    "resets": lambda: DataLoader(Resets(), 4),
    "caching": lambda: DataLoader(Caching(), 4, shuffle=True),
    "workers": lambda: DataLoader(Augmented(Noise()), 4, shuffle=True, num_workers=2),
}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.filterwarnings("error::noether.session.errors.ResumeWarning")
def test_a_loader_resumes_exactly_without_a_warning(kind, tmp_path):
    whole, cut = (Loop(tmp_path / name, [SAVE], loader=EXACT[kind]) for name in ("whole", "cut"))
    whole.train()
    for update in (3, 8):
        cut.train(cut=update)
    cut.train()
    assert_same(cut.result(), whole.result())


class ShufflesInPlace(Order):
    def __init__(self):
        self.order = list(range(22))

    def __iter__(self):
        random.shuffle(self.order)
        return iter(list(self.order))


class RollsTensor(Order):
    def __init__(self):
        self.order = torch.arange(22)

    def __iter__(self):
        self.order = self.order.roll(7)
        return iter(self.order.tolist())


class RollsArray(Order):
    def __init__(self):
        self.order = np.arange(22)

    def __iter__(self):
        self.order[:] = np.roll(self.order, 7)
        return iter(self.order.tolist())


class CountsInPart(Order):
    def __init__(self):
        self.part = {"calls": [Calls()]}

    def __iter__(self):
        calls = self.part["calls"][0]
        calls.count += 1
        return iter(torch.randperm(22, generator=torch.Generator().manual_seed(calls.count)).tolist())


class Calls:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Picked(Order):
    def __init__(self):
        self.left = set(range(60))

    def __iter__(self):
        self.left -= set(sorted(self.left)[:10])
        return iter([index % 22 for index in sorted(self.left)])


class Continues(IterableDataset):
    """An iterator that continues where the last epoch ended."""

    def __init__(self):
        self.index = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        if self.index % 23 == 0:
            raise StopIteration
        return POINTS[self.index % 22]


HIDDEN = {
    "list": (lambda: DataLoader(POINTS, 4, sampler=ShufflesInPlace()), r"ShufflesInPlace\.order"),
    "tensor": (lambda: DataLoader(POINTS, 4, sampler=RollsTensor()), r"RollsTensor\.order"),
    "array": (lambda: DataLoader(POINTS, 4, sampler=RollsArray()), r"RollsArray\.order"),
    "part": (lambda: DataLoader(POINTS, 4, sampler=CountsInPart()), r"Calls\.count"),
    "set": (lambda: DataLoader(POINTS, 60, sampler=Picked()), r"Picked\.left"),
    "dataset": (lambda: DataLoader(Continues(), 4), r"Continues\.index"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_state_that_an_epoch_changes_is_named_once(kind, tmp_path):
    make, name = HIDDEN[kind]
    loop = Loop(tmp_path / "run", [], loader=make)
    with pytest.warns(ResumeWarning, match=rf"an epoch changed .*({name}), which no checkpoint has") as caught:
        loop.train()
    assert len(caught) == 1


def test_what_cannot_be_seeded_is_named_at_the_start(tmp_path):
    class Holds(Order):
        def __init__(self):
            self.system = random.SystemRandom()
            self.counter = itertools.count()

        def __iter__(self):
            next(self.counter)
            return iter(self.system.sample(range(22), 22))

    loop = Loop(
        tmp_path / "run", [], loader=lambda: DataLoader(POINTS, 4, sampler=Holds()), settings={"max_updates": 1}
    )
    with pytest.warns(ResumeWarning) as caught:
        loop.train()
    messages = sorted(str(warning.message) for warning in caught)
    assert "the loader holds Holds.counter, a count, which no checkpoint can take back" in messages[0]
    assert "the loader holds Holds.system, a SystemRandom" in messages[1]
    assert len(messages) == 2


@pytest.mark.parametrize("loader", [
    lambda: [(INPUTS[:4], POINTS.tensors[1][:4]), (INPUTS[4:9], POINTS.tensors[1][4:9])],
    lambda: DataLoader(POINTS, 4, shuffle=True),
    lambda: DataLoader(Augmented(Noise()), 4, shuffle=True, num_workers=1),
    lambda: DataLoader(Resets(), 4, num_workers=1),
])  # fmt: skip
def test_generators_that_a_loader_does_not_use_need_no_seed(loader, tmp_path, monkeypatch):
    sparing, full = (Loop(tmp_path / name, [], loader=loader) for name in ("sparing", "full"))
    sparing.train()
    assert batch_seeder(loader()) is not seed_all
    monkeypatch.setattr(noether.session.loop, "batch_seeder", lambda loader: seed_all)
    full.train()
    assert_same(sparing.result(), full.result())


def test_a_loader_that_may_use_any_generator_gets_all_seeded():
    for loader in (
        DataLoader(Augmented(Noise()), 4),
        DataLoader(POINTS, 4, sampler=FromList(), num_workers=1),
        DataLoader(POINTS, 4, collate_fn=list),
        DataLoader(POINTS, batch_sampler=BatchSampler(FromList(), 4, drop_last=False), num_workers=1),
        iter([1]),
    ):
        assert batch_seeder(loader) is seed_all


def test_the_search_of_a_large_loader_is_bounded():
    class Node:
        def __init__(self, depth):
            self.inner = [Node(depth - 1) for _ in range(8)] if depth else []
            self.owner, self.values = self, torch.zeros(1000)

    class Batches(list):
        pass

    loader = Batches([torch.ones(2)])
    loader.dataset = Node(5)
    loader.dataset.paths = ["a"] * 3_000_000
    loader.dataset.data = np.zeros(100_000_000, dtype=np.uint8)
    found = list(object_graph.walk(loader))  # the walk that all three searches share
    assert 500 < len(found) <= object_graph.MAX_OBJECTS  # of 37,449 nodes
    assert not any(isinstance(each.value, str) for each in found)  # the three million paths are one value
    for search in (generators_of, find_unseedable, hidden_state):
        assert not search(loader) or search is hidden_state
    assert "Node.data" not in hidden_state(loader)


def test_datasets_of_a_concatenation_get_the_epoch():
    class Epochs(Augmented):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    epochs = []
    loader = DataLoader(ConcatDataset([Epochs(Noise()), Epochs(Noise())]), 4)
    set_epoch(loader, 3)
    assert epochs == [3, 3]


def test_only_the_first_items_of_a_long_list_are_searched():
    loader = DataLoader([torch.ones(1) for _ in range(10_000)], 4)
    found = [each for each in object_graph.walk(loader) if isinstance(each.value, torch.Tensor)]
    assert len(found) == object_graph.MAX_ITEMS  # the bound that is tested


def test_a_generator_in_two_places_is_found_once():
    noise = Noise()
    loader = DataLoader(ConcatDataset([Augmented(noise), Augmented(noise)]), 4)
    assert generators_of(loader) == [noise.rng]


def test_sources_that_a_session_seeds_draw_the_same_in_every_process():
    def draw(loader, epoch):
        seed_pass(loader, 7, epoch)
        return [batch[0].tolist() for batch in loader]

    first, second = (EXACT["concat"]() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(first, 0)
    assert draw(first, 1) == draw(second, 1) != draw(second, 2)
