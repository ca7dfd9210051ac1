"""Callbacks that lose memory, disagree between ranks or depend on their order: the law of each catches them."""

import enum
import os
import signal

import pytest
import torch
from law_examples import slow_except

from noether import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterUpdate,
    BeforeTraining,
    LogScalars,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    every_n_epochs,
    every_n_updates,
    log,
    on,
)
from noether.testing import LawError, check_independent, check_rank_agreement, check_resumable
from noether.testing.functions import copy_callback
from noether.testing.transport import decode, encode


def remembers_the_first_loss():
    memory = {}

    def mutant(state, event):
        memory.setdefault("first", float(event.losses["total"]))
        return log(state, event, {"since": float(event.losses["total"]) - memory["first"]})

    return every_n_updates(1)(mutant)


def counts_with_nonlocal():
    count = 0

    def mutant(state, event):
        nonlocal count
        count += 1
        return log(state, event, {"count": count})

    return on(AfterUpdate)(mutant)


def counts_in_a_method():
    class Counter:
        def __init__(self):
            self.n = 0

        def count(self, state, event):
            self.n += 1
            return log(state, event, {"n": self.n})

    return on(AfterEpoch)(Counter().count)


def counts_in_a_default():
    def mutant(state, event, seen=[]):  # noqa: B006  # the fault under test
        seen.append(0)
        return log(state, event, {"seen": len(seen)})

    return on(AfterEpoch)(mutant)


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.parametrize(
    "make",
    slow_except(
        (counts_with_nonlocal, counts_in_a_default),
        [remembers_the_first_loss, counts_with_nonlocal, counts_in_a_method, counts_in_a_default],
    ),
)
def test_check_resumable_catches_memory_that_a_cut_loses(make):
    with pytest.raises(LawError, match="does not resume exactly"):
        check_resumable(make(), examples=500)


def stops(gate, decide):
    """Return a callback that stops the run if `decide(state, event)`."""
    return gate(lambda state, event: (state.request_stop("now") if decide(state, event) else state, ()))


def sums_durations(state, event):
    """It remembers its sum under a metric, whose value ranks need not share, and decides by it."""
    total = state.metrics["total"].value if "total" in state.metrics else 0.0
    state, effects = log(state, event, {"total": total + event.duration_s})
    return (state.request_stop("late") if total > 100 else state), effects


class StopsAtASignal:
    """It installs a handler of its own, as scripts for clusters do, and stops where the signal arrives."""

    def __call__(self, state, event):
        if isinstance(event, BeforeTraining):
            self.received = False
            signal.signal(signal.SIGUSR1, self.receive)
        return (state.request_stop("a signal") if self.received else state), ()

    def receive(self, number, frame):
        self.received = True


RANKS = "different decisions on different ranks"
HASHES = "different decisions in a process with another hash seed"
DISAGREE = {
    "time of an epoch": (stops(every_n_epochs(1), lambda s, e: e.time_s > 5), RANKS),
    "duration": (stops(on(AfterUpdate), lambda s, e: e.duration_s > 0.5), RANKS),
    "short duration": (stops(on(AfterUpdate), lambda s, e: e.duration_s < 0.1), RANKS),
    "hours": (stops(on(AfterUpdate), lambda s, e: e.duration_s > 7200), RANKS),
    "sum of durations": (on(AfterUpdate)(sums_durations), RANKS),
    "RANK": (stops(on(AfterUpdate), lambda s, e: os.environ.get("RANK", "0") == "1"), RANKS),
    "LOCAL_RANK": (stops(on(AfterUpdate), lambda s, e: os.environ.get("LOCAL_RANK") == "0"), RANKS),
    "rank of torch": (
        stops(on(AfterUpdate), lambda s, e: torch.distributed.is_initialized() and torch.distributed.get_rank() == 0),
        RANKS,
    ),
    "rank of a node": (stops(on(AfterUpdate), lambda s, e: os.environ.get("NODE_RANK") == "0"), RANKS),
    "large loss": (stops(on(AfterUpdate), lambda s, e: float(e.losses["total"]) > 1e6), RANKS),
    "low loss": (stops(on(AfterUpdate), lambda s, e: float(e.losses["total"]) < -1e6), RANKS),
    "signal": (StopsAtASignal(), RANKS),
    "loss of a micro-batch": (stops(on(AfterAccumulationStep), lambda s, e: e.losses["total"] > 1e6), RANKS),
    "outputs": (stops(on(AfterUpdate), lambda s, e: bool(e.outputs[0]["drift"].max() > 1e6)), RANKS),
    "checkpoint of one rank": (
        on(AfterEpoch)(lambda s, e: (s, (SaveCheckpoint(),) if e.run.rank == 0 else ())),
        RANKS,
    ),
    "hash": (stops(every_n_updates(1), lambda s, e: hash(str(s.iteration)) % 3 == 0), HASHES),
    "hash of bytes": (stops(every_n_updates(1), lambda s, e: hash(bytes(s.iteration.update)) % 2 == 0), HASHES),
    "order of a set": (
        stops(every_n_updates(1), lambda s, e: next(iter({f"a{s.iteration.update}", "b", "c", "d"})) == "b"),
        HASHES,
    ),
    "tag from a set": (
        on(AfterEpoch)(lambda s, e: (s, (SaveCheckpoint(tag="-".join({"a", "b", "c", "d", "e"})),))),
        HASHES,
    ),
    "identity": (stops(on(AfterUpdate), lambda s, e: hash(object()) // 16 % 2 == 0), "different decisions"),
}


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.parametrize("name", DISAGREE)
def test_check_rank_agreement_catches(name):
    mutant, message = DISAGREE[name]
    with pytest.raises(LawError, match=message):
        check_rank_agreement(mutant)


def requests(effect):
    """Return a callback that requests `effect(state)` at the end of each epoch."""
    return on(AfterEpoch)(lambda state, event: (state, (effect(state),)))


def two(effect):
    """Return two callbacks that request effects with different values."""
    return requests(lambda state: effect(1)), requests(lambda state: effect(2))


ORDERED = {
    "summary": two(lambda value: SetSummary({"best": value})),
    "scalars": two(lambda value: LogScalars({"x": float(value)})),
    "scalars that one hides": two(lambda value: LogScalars({"x": 1.0}, quiet=frozenset({"x"} if value == 1 else ()))),
    "pointer": two(lambda value: SaveCheckpoint(tag=f"tag{value}", pointers=("best",))),
    "weights of one tag": two(lambda value: SaveCheckpoint(tag="a", weights_of=f"ema=0.{value}", optimizer=False)),
    "tensors of one name": two(lambda value: SaveTensors(name="a", tensors={"x": torch.tensor(value)})),
}


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.parametrize("name", ORDERED)
def test_check_independent_catches(name):
    with pytest.raises(LawError, match="depend on their order"):
        check_independent(*ORDERED[name])


def test_callbacks_that_write_one_thing_alike_are_independent():
    for effect in (SetSummary({"best": 1}), SaveCheckpoint(tag="a", pointers=("best",)), SaveCheckpoint(tag="b")):
        same = [requests(lambda state, effect=effect: effect) for _ in range(2)]
        check_independent(*same, examples=25)
    saves = [SaveCheckpoint(tag="a", pointers=(pointer,), retention={pointer: 1}) for pointer in ("one", "other")]
    check_independent(*(requests(lambda state, save=save: save) for save in saves), examples=25)


def test_copies_of_a_callback_share_no_memory():
    shared = []

    def outer(value):
        shared.append(value)
        return inner(value)

    def inner(value):
        return len(shared), outer is not None

    copied = copy_callback(outer)
    assert (outer(0), outer(0), copied(0)) == ((1, True), (2, True), (1, True))


def test_a_copy_shares_what_cannot_be_copied(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        assert copy_callback(lambda: stream)() is stream


def test_functions_and_classes_go_through_bytes_by_value():
    class Shape(enum.Enum):
        FLAT = 0

    class Base:
        def area(self):
            return 2

    class Square(Base):
        sides = 4

        def area(self):
            return super().area() * self.sides

    def recursive(n):
        return 0 if n == 0 else 1 + recursive(n - 1)

    assert decode(encode(Square))().area() == 8
    assert decode(encode(recursive))(3) == 3
    assert decode(encode({"w": torch.ones(2)}))["w"].tolist() == [1.0, 1.0]
    with pytest.raises(Exception, match=r"."):  # an enumeration of a function cannot be made again
        decode(encode(Shape))
