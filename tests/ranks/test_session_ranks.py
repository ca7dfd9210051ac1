"""A plain loop with DDP and a `Session` on several ranks: the run of one process, and one set of files."""

import io
import json

import pytest
import torch
from processes import run_on_ranks
from rich.console import Console as RichConsole
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from noether import Session, open_run
from noether.core.callbacks import (
    BestCheckpointCallback,
    CheckpointCallback,
    EMACallback,
    EvaluateCallback,
    FixedUpdateEarlyStopping,
    GradNormCallback,
    MetricEarlyStopping,
    OnlineLossCallback,
)
from noether.core.errors import NoetherError
from noether.distributed.channel import Channel
from noether.distributed.ranks import join
from noether.effects import Console
from noether.session.evaluation import evaluation_data
from noether.session.timing import Clock

SAMPLES, EPOCHS = 24, 3


def dataset(count, seed):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def loss(outputs, batch):
    return {"ce": nn.functional.cross_entropy(outputs, batch[1]), "size": 1e-3 * outputs.square().mean()}


def callbacks(*more):
    return [
        OnlineLossCallback(every_n_updates=1),
        OnlineLossCallback(every_n_epochs=1),
        GradNormCallback(every_n_updates=2),
        EMACallback(every_n_updates=1, target_factors=(0.9,)),
        EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", "accuracy")),
        BestCheckpointCallback(every_n_epochs=1, metric_key="loss/val/total"),
        CheckpointCallback(every_n_updates=2, save_weights=True, save_optim=True),
        MetricEarlyStopping(every_n_epochs=1, metric_key="loss/val/total", tolerance=5),
        *more,
    ]


def train(  # noqa: PLR0913  # every way in which the runs differ
    path,
    effective=12,
    *,
    cut=None,
    is_noisy=False,
    more=(),
    only=None,
    splits_val=False,
    is_val_subset=False,
    wraps=True,
    seed=0,
    samples=SAMPLES,
    stream=None,
):
    """Train until the end, or until `cut` updates are counted; return what all ranks have to share."""
    is_several = torch.distributed.is_initialized()
    world_size = torch.distributed.get_world_size() if is_several else 1
    torch.manual_seed(0 if wraps else torch.distributed.get_rank())
    layers = (nn.BatchNorm1d(8), nn.Dropout(0.5)) if is_noisy else ()
    model = nn.Sequential(nn.Linear(3, 8), *layers, nn.Tanh(), nn.Linear(8, 2))
    wrapped = DistributedDataParallel(model) if is_several and wraps else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    data, val = dataset(samples, 1), dataset(11, 2)
    rank = torch.distributed.get_rank() if is_several else 0
    sampler = DistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=True)
    loader = DataLoader(data, batch_size=effective // world_size, sampler=sampler)
    if stream is not None:
        loader = stream
    val_sampler = DistributedSampler(val) if splits_val else None
    if is_val_subset:
        val = Subset(val, range(rank, 10, world_size))  # equally many on each rank
    clock = Clock(wall_s=lambda: 100.0 * rank, elapsed_s=lambda: 0.0)
    with open_run(path, Console(RichConsole(file=io.StringIO()))) as directory:
        session = Session(
            callbacks(*more) if only is None else only, directory=directory, model=wrapped, optimizer=optimizer,
            data={"val": DataLoader(val, batch_size=2, sampler=val_sampler)}, loss=loss, max_epochs=EPOCHS, seed=seed,
            clock=clock,
        )  # fmt: skip
        for batch in session.batches(loader):
            losses = loss(wrapped(batch[0]), batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            session.update(losses)
            if session.state.iteration.update == cut:
                break
    state = session.state
    return {
        "iteration": str(state.iteration),
        "metrics": {key: (float(each.value), str(each.iteration)) for key, each in state.metrics.items()},
        "params": {name: tensor.tolist() for name, tensor in state.params.items()},
        "buffers": {name: tensor.tolist() for name, tensor in state.buffers.items()},
        "stop": session.stop,
    }


def logged(path):
    """Return the lines of a log: place, time and metrics."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    places = ("event", "epoch", "update", "sample", "time_s")
    return [({key: line[key] for key in places}, line["metrics"]) for line in lines]


def checkpoints(path):
    return sorted(each.name for each in (path / "checkpoints").iterdir())


CALLS = {
    "two": {},
    "cut": {"cut": 3},
    "resumed": {},
    "noisy": {"is_noisy": True},
    "stopped": {"more": (FixedUpdateEarlyStopping(stop_at_update=3),)},
    "split": {"splits_val": True},
    "three": {"cut": 3},
    "odd": {"cut": 3},
    "idle": {"only": []},
}


def on_two_ranks(folder):
    """Return the messages of mistakes, what each run ended with, and its exchanges."""
    messages, results, exchanges = make_mistakes(folder), {}, {}
    exchange = Channel.exchange
    for name, call in CALLS.items():
        names = exchanges[name] = []
        Channel.exchange = lambda *args, names=names, **kinds: names.append(args[1]) or exchange(*args, **kinds)
        results[name] = train(folder / ("cut" if name == "resumed" else name), **call)
    return messages, results, exchanges


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def of_ranks(folder):
    return list(zip(*run_on_ranks(on_two_ranks, 2, folder, detail=False), strict=True))


@pytest.fixture(scope="module")
def ended(of_ranks):
    """Return what each run ended with on each rank."""
    return {name: [of_rank[name] for of_rank in of_ranks[1]] for name in CALLS}


def test_two_ranks_log_and_save_what_one_process_does(folder, ended, tmp_path):
    one = train(tmp_path / "two")
    for name, values in one["params"].items():
        torch.testing.assert_close(torch.tensor(ended["two"][0]["params"][name]), torch.tensor(values))
    lines, of_one = logged(folder / "two"), logged(tmp_path / "two")
    assert [place for place, _ in lines] == [place for place, _ in of_one]
    for (_, metrics), (_, metrics_of_one) in zip(lines, of_one, strict=True):
        assert metrics == pytest.approx(metrics_of_one, rel=1e-4, abs=1e-5)
    assert checkpoints(folder / "two") == checkpoints(tmp_path / "two")


@pytest.mark.parametrize("name", CALLS)
def test_all_ranks_end_with_the_same(name, ended):
    first, second = ended[name]
    assert first == second
    assert first["stop"] == ("stop_at_update: 3 is reached" if name == "stopped" else None)


def test_a_resumed_run_on_two_ranks_equals_the_uncut_one(folder, ended):
    assert ended["cut"][0]["iteration"] == "E1_U3_S36"
    assert ended["resumed"] == ended["two"]
    assert logged(folder / "cut") == logged(folder / "two")


def test_an_evaluation_has_no_sample_twice_where_a_library_splits_its_loader(ended):
    assert ended["split"] == ended["two"]


def test_an_update_that_no_callback_reads_has_no_exchange(of_ranks):
    for exchanges in of_ranks[2]:
        updates = {name: [each for each in exchanges[name] if each.startswith("update")] for name in ("two", "idle")}
        assert updates["idle"] == ["update 1"]  # which compares the parameters
        assert updates["two"] == [f"update {update}" for update in range(1, 7)]


def resume_on_three(folder):
    torch.distributed.init_process_group("gloo")
    return train(folder / "three"), error_of(train, folder / "odd", effective=15)


def test_a_run_resumes_within_an_epoch_on_another_number_of_ranks(folder, ended):
    result, message = run_on_ranks(resume_on_three, 3, folder, detail=False)[0]
    assert result["iteration"] == ended["two"][0]["iteration"]
    for name, values in ended["two"][0]["params"].items():
        torch.testing.assert_close(torch.tensor(result["params"][name]), torch.tensor(values))
    assert [place for place, _ in logged(folder / "three")] == [place for place, _ in logged(folder / "two")]
    assert "the 12 samples that it counts are no whole number of updates: start it on 2 ranks" in message


def make_mistakes(path):
    """Return the message of each mistake."""
    before = Session([], interpreter=lambda *_: None, model=nn.Linear(1, 1))
    messages = [error_of(before.batches, [torch.ones(1)])]
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    messages.append(error_of(before.batches, [torch.ones(1)]))
    messages.append(error_of(train, path / "unwrapped", wraps=False))
    messages.append(error_of(train, path / "seeds", seed=rank))
    messages.append(error_of(train, path / "lengths", samples=SAMPLES - 12 * rank))
    batches = [dataset(4, 1).tensors] * (2 + rank)
    messages.append(error_of(train, path / "uneven", stream=Stream(batches), only=[]))
    messages.append(error_of(train, path / "subsets", is_val_subset=True))
    stream = DataLoader(HalfOfStream(rank), batch_size=2)
    messages.append(error_of(evaluation_data, stream, nn.Linear(1, 1), 0, "val", ranks=join()))
    return messages


class Stream:
    """Batches of an epoch, without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class HalfOfStream(IterableDataset):
    """A stream of which this process reads a half, as that of an IterableDatasetShard."""

    def __init__(self, rank):
        self.num_processes, self.rank = 2, rank

    def __iter__(self):
        return iter([float(self.rank)])


def error_of(function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except NoetherError as error:
        return str(error)
    return None


def test_mistakes_are_named_on_every_rank_with_what_to_write(of_ranks):
    first, second = of_ranks[0]
    assert first == second
    ungrouped, late, unwrapped, seeds, lengths, uneven, subsets, stream = first
    assert "WORLD_SIZE=2, as torchrun sets it" in ungrouped
    assert "write torch.distributed.init_process_group() before the Session" in ungrouped
    assert late == "the Session was made before the group of 2 processes: make it after"
    assert "parameters of rank 1 differ from those of rank 0 after update 1, first '0.weight'" in unwrapped
    assert "torch.nn.parallel.DistributedDataParallel(model)" in unwrapped
    assert seeds.startswith("seed differs between ranks as the run begins: pass the same seed= on all ranks")
    assert seeds.endswith("rank 0: 0\n  rank 1: 1")
    assert "updates_per_epoch differs between ranks" in lengths
    assert uneven.startswith("epoch 0 has 2 batches on rank 0 of 2, and more on the others")
    assert "give each rank equally many batches" in uneven
    assert "data['val'] differs between ranks as the run begins" in subsets
    assert "pass a loader of the whole dataset" in subsets
    assert "rank 1: 5 samples in 3 batches of 2, the first and the last sample" in subsets
    assert "data['val'] yields one of 2 shares: its HalfOfStream has num_processes=2" in stream
