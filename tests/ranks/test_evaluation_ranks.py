"""Evaluations on several ranks have the bits of one process; ranks that disagree or are interrupted act together."""

import random
from itertools import chain

import torch
from processes import run_on_ranks

from noether import Run, TrainState, log
from noether.core.callbacks import Mean, PeriodicDataIteratorCallback, Sum, TrackOutputsCallback
from noether.core.event import AfterEpoch, AfterUpdate
from noether.distributed.ranks import join
from noether.testing import assert_same
from noether.training.data.indexed import EvaluationData
from noether.training.data.interruptible import DataInterrupt, interruptible

SEEDS = 16


class Collated(list):
    """Its `collate` leaves out samples that are divisible by 7."""

    def collate(self, samples):
        return torch.tensor([each for each in samples if each % 7], dtype=torch.float64)


class RandomResults(PeriodicDataIteratorCallback):
    """Results of all kinds and of several dtypes, drawn for each batch; some are missing in a batch."""

    seed: int

    def process_data(self, state, batch, forward):
        first, samples = int(batch[0]), len(batch)
        draw = random.Random(f"{self.seed} {first}")  # noqa: S311  # no secret is drawn
        kinds = random.Random(self.seed)  # noqa: S311  # what all batches share
        noise = torch.rand(samples)  # as of dropout: the trainer's data seeds it for each batch
        dtype = kinds.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        rows = (samples, *kinds.choice([(), (2,), (2, 3), (0,)]))
        scale = 10.0 ** draw.randint(-8, 8)
        everything = {
            "noise": noise,
            "mean": Mean((noise.mean() * scale).to(dtype)),
            "per_sample": Mean((batch * noise * scale).to(dtype)),
            "weighted": Mean(torch.tensor(scale), weight=draw.choice([0, 3, 0.1, torch.tensor(7)])),
            "weightless": Mean(torch.tensor(float("nan")), weight=0),
            "number": Mean(draw.random()),
            "sum": Sum((noise.sum() * scale).to(dtype)),
            "count": draw.choice([True, 3, torch.tensor(4), torch.tensor(2, dtype=torch.int32)]),
            "rows": torch.randn(rows).to(dtype),
            "mixed": torch.randn(samples).to(draw.choice([torch.float32, torch.float64])),
            "classes": torch.randint(9, (samples, 2)),
            "flags": noise > 0.5,
            "complex": torch.randn(samples, dtype=torch.complex64),
        }
        return {name: value for name, value in everything.items() if draw.random() < 0.7 or name == "mean"}

    def process_results(self, state, event, results):
        return state.remember("results", dict(results)), ()


def evaluate(callback, run):
    torch.manual_seed(0)
    state, effects = callback(TrainState(params={"w": torch.zeros(1)}).next_epoch(), AfterEpoch(run=run))
    return state.callback_states, effects


def results_have_the_bits_of_one_process():
    ranks = join(timeout_s=60)
    measured = 0
    for seed in range(SEEDS):
        draw = random.Random(seed)  # noqa: S311  # no secret is drawn
        length, batch_size = draw.randint(1, 23) if seed else 1, draw.choice([None, 1, 2, 3, 5])
        data = {"val": EvaluationData(Collated(range(length)), seed=seed, batch_size=4, num_workers=seed == 1)}
        callback = RandomResults(every_n_epochs=1, dataset_key="val", batch_size=batch_size, seed=seed)
        one = evaluate(callback, Run(data=data, forward=None))
        run = Run(data=data, forward=None, rank=ranks.rank, world_size=3, gather=ranks.control.gather)
        assert_same(evaluate(callback, run), one)
        measured += "results" in one[0]
        if seed % 5 == 0:  # a loader of the user's, which noether does not split
            run = run.replace(data={"val": [batch for batch in data["val"] if len(batch)]})
            callback = RandomResults(every_n_epochs=1, dataset_key="val", seed=seed)
            assert_same(evaluate(callback, run), evaluate(callback, Run(data=run.data, forward=None)))
    for seed in range(SEEDS):
        draw = random.Random(seed)  # noqa: S311  # no secret is drawn
        track_random_outputs(draw, ranks)
    return measured


def track_random_outputs(draw, ranks):
    """Compare what `TrackOutputsCallback` remembers and requests on three ranks with one process that has all steps."""
    callback = TrackOutputsCallback(
        **{draw.choice(["every_n_updates", "every_n_epochs"]): draw.choice([1, 2])},
        keys=("a",), patterns=("b",), reduce=draw.choice(["mean", "last"]), save_output=True,
        at_end=draw.random() < 0.5,
    )  # fmt: skip
    run = Run(rank=ranks.rank, world_size=3, gather=ranks.control.gather)
    one = own = TrainState(params={"w": torch.zeros(1)})
    for _ in range(3):
        sizes = [[draw.choice([0, 1, 3]) for _ in range(draw.choice([0, 1, 2]))] for _ in range(3)]
        sizes[draw.randrange(3)].append(2)
        steps = [[random_outputs(draw, size) for size in each] for each in sizes]
        fields = {"samples": sum(map(sum, sizes)), "skipped": draw.random() < 0.2}
        whole = AfterUpdate(outputs=[*chain(*steps)], accumulated=(*chain(*sizes),), **fields)
        nothing = draw.choice([None, ()])
        event = AfterUpdate(
            outputs=steps[ranks.rank] or nothing, accumulated=tuple(sizes[ranks.rank]), run=run, **fields
        )
        one, expected = callback(one.advance(samples=fields["samples"]), whole)
        own, effects = callback(own.advance(samples=fields["samples"]), event)
        assert_same((own, effects), (one, expected))
    one, own = one.next_epoch(), own.next_epoch()
    assert_same(callback(own, AfterEpoch(run=run)), callback(one, AfterEpoch()))


def random_outputs(draw, samples):
    a = torch.tensor(
        [draw.uniform(-1e6, 1e6) for _ in range(samples)], dtype=draw.choice([torch.float32, torch.float64])
    )
    outputs = {"a": a, "b": draw.random(), "bb": a.reshape(-1, 1).int(), "c": "text"}
    return {name: value for name, value in outputs.items() if draw.random() < 0.8 or name == "a"}


class Losses(PeriodicDataIteratorCallback):
    """A mean, or something else for one batch."""

    other: int | None = None

    def process_data(self, state, batch, forward):
        return {"x": torch.zeros(1) if self.other in batch.tolist() else Mean(batch.double().mean())}

    def process_results(self, state, event, results):
        return log(state, event, {self.key("x"): results["x"]})


def attempt(callback, run):
    try:
        return evaluate(callback, run)[1][0].values["val/x"].item()
    except (Exception, DataInterrupt) as error:  # noqa: BLE001  # all ranks shall have the same
        return f"{type(error).__name__}: {error}"


def ranks_act_together():
    ranks = join(timeout_s=60)
    rank = ranks.rank
    losses, mixed = (Losses(every_n_epochs=1, dataset_key="val", other=other) for other in (None, 9))
    data = EvaluationData(range(10), seed=0, batch_size=2)
    run = Run(data={"val": data}, forward=None, rank=rank, world_size=2, gather=ranks.control.gather)
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    unequal = {
        "values": [batches[0] + rank, batches[1]],
        "order": batches if rank else batches[::-1],
        "share": batches[rank:],
    }
    outcomes = {name: attempt(losses, run.replace(data={"val": each})) for name, each in unequal.items()}
    outcomes["kinds"] = attempt(mixed, run)
    received = []  # as a signal to rank 1 during its second batch
    seen = []

    class Interrupted(Losses):
        def process_data(self, state, batch, forward):
            seen.append(len(batch))
            if rank == 1 and len(seen) == 2:
                received.append(True)
            return super().process_data(state, batch, forward)

    outcomes["interrupted"] = attempt(Interrupted(every_n_epochs=1, dataset_key="val"),
                                      interruptible(run, lambda: bool(received)))  # fmt: skip
    everything = len(list(interruptible(run, lambda: True).data["val"]))  # a callback of a user, on one rank only
    outcomes["whole"] = attempt(losses, interruptible(run, lambda: False))
    return outcomes, len(seen), everything


def test_results_have_the_bits_of_one_process():
    assert run_on_ranks(results_have_the_bits_of_one_process, 3) == [SEEDS - 1] * 3  # one dataset has no samples left


def test_ranks_act_together():
    results = run_on_ranks(ranks_act_together, 2)
    outcomes = results[0][0]
    assert [result[0] for result in results] == [outcomes] * 2
    for name in ("values", "order", "share"):
        assert "ShardedDataError: the ranks iterate different batches of data['val']: rank 0 " in outcomes[name]
    assert "2 batches with 3 samples, the first " in outcomes["share"]
    assert "rank 1 1 batches with 1 samples" in outcomes["share"]
    assert "returned 'x' as one value per sample for one batch, and as a Mean for another" in outcomes["kinds"]
    assert outcomes["interrupted"] == "DataInterrupt: "
    assert [result[1:] for result in results] == [(2, 5), (2, 5)]  # rank 1 left before its third batch
    assert outcomes["whole"] == 4.5
