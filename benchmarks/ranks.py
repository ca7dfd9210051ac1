"""Cost of training on two ranks, compared with one process, with torch's DistributedDataParallel, and on paper.

Run as `python -m benchmarks.ranks`, which starts two processes by torchrun; both need a core each. The job is that of
`configs/digits.yaml` with its callbacks, the effective batch size is the same for one process and for two ranks. All
rows take turns in the same two processes, on one thread each; while one process trains, the other waits. A ratio is
taken within each round, and the tables show medians over rounds with quartiles.

Collectives and bytes are counted as they are called in one more run of the job. The times on paper follow from these
counts: a sum of B bytes over N ranks takes 2 log2(N) latencies and 2 (N - 1) / N * B / bandwidth, as nccl adds; a
gather in which each rank sends S bytes takes (N - 1) * (latency + S / bandwidth), as gloo's ring does. The bytes of the
results of an evaluation are shared by the ranks; those of other exchanges are of each rank.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import click
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measurement import Table, markdown_option, quartiles, ratios, seconds, show, take_turns
from noether import AfterUpdate, TrainingIteration, dispatch
from noether.config import load
from noether.distributed.channel import FRAME_BYTES, Channel
from noether.distributed.ranks import Ranks, join, launched_world_size
from noether.effects import open_run
from noether.training.experiment import Experiment, build
from noether.training.replicated.step import ReplicatedStep
from noether.training.runs.execution import make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from noether import TrainState
    from noether.core.event import Event

_CONFIG = Path(__file__).parents[1] / "configs/digits.yaml"
_RANKS = 2
_PAPER_RANKS = (8, 256, 4096)
_OF_BENCHMARK = ("folder of the run", "end of the run")  # exchanges that are no part of the job
_ONE, _TWO = "the job, one process", "the job, two ranks"
_BARE, _STEP_ONE, _STEP_TWO, _DDP = "bare loop", "noether's step", "noether's step, two ranks", "DDP, two ranks"


class Network(NamedTuple):
    """A network on paper: seconds until a message arrives, and bytes per second of each rank."""

    latency_s: float
    bandwidth: float


_NCCL = Network(10e-6, 25e9)  # InfiniBand of 200 Gbit/s
_GLOO = Network(50e-6, 1.25e9)  # TCP over Ethernet of 10 Gbit/s


@dataclass
class Traffic:
    """Collectives and the bytes that this rank gives to them, by what is exchanged."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    exchanges: Counter[str] = field(default_factory=Counter)
    what: str = "gradients"

    @contextmanager
    def count_traffic(self) -> Iterator[None]:
        """Count what the code in the context exchanges."""
        names = ("all_reduce", "all_gather", "broadcast", "barrier", "all_gather_into_tensor", "reduce_scatter_tensor")
        plain = {name: getattr(dist, name) for name in names}
        exchange = Channel.exchange

        def count(name: str, *arguments: Any, **keywords: Any) -> Any:
            sent = next((each for each in reversed(arguments) if isinstance(each, torch.Tensor)), None)
            self.calls[self.what] += 1
            self.bytes[self.what] += 0 if sent is None else sent.nbytes
            return plain[name](*arguments, **keywords)

        def label(channel: Channel, what: str, *arguments: Any, **keywords: Any) -> Any:
            self.what = what
            self.exchanges[self.what] += 1
            try:
                return exchange(channel, what, *arguments, **keywords)
            finally:
                self.what = "gradients"

        Channel.exchange = label  # type: ignore[method-assign]  # to name the exchange that is counted
        for name in names:
            setattr(dist, name, partial(count, name))
        try:
            yield
        finally:
            Channel.exchange = exchange  # type: ignore[method-assign]  # as it was
            for name in names:
                setattr(dist, name, plain[name])


@dataclass
class Times:
    """Seconds of one run of the job, and of its callbacks with their effects: at updates, and at all events."""

    clock_s: Callable[[], float]
    total_s: float = 0.0
    updates_s: float = 0.0
    callbacks_s: float = 0.0

    def dispatch(self, state: TrainState, event: Event, *others: Any) -> TrainState:
        """Dispatch an event as the trainer does, and count the seconds."""
        start_s = self.clock_s()
        state = dispatch(state, event, *others)
        spent_s = self.clock_s() - start_s
        self.callbacks_s += spent_s
        self.updates_s += spent_s if isinstance(event, AfterUpdate) else 0
        return state


def train(experiment: Experiment, epochs: int, clock_s: Callable[[], float] = time.perf_counter) -> Times:
    """Run the job in a new run directory."""
    times = Times(clock_s)
    run = experiment.run.replace(end=TrainingIteration(epoch=epochs))
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "console.txt").open("w") as file:
        path = Path(run.gather(_OF_BENCHMARK[0], folder)[0]) / "run"
        with redirect_stdout(file), open_run(path, ranks=experiment.ranks) as directory:
            trainer = make_trainer(experiment, directory.interpreter, lambda: False, run)
            start_s = clock_s()
            with patch("noether.training.trainer.dispatch", times.dispatch):
                trainer(experiment.state)
            times.total_s = clock_s() - start_s
            run.gather(_OF_BENCHMARK[1], 0)  # rank 0 removes the directory
    return times


def functional_updates(experiment: Experiment, batches: Sequence[Any]) -> Iterator[None]:
    """Make an update with noether's step each time."""
    ranks = experiment.ranks
    step: Any = ReplicatedStep(experiment.step, ranks) if ranks.are_several else experiment.step
    state = experiment.state
    while True:
        for batch in batches:
            state, event = step(state, [batch])
            state = state.advance(samples=event.samples)
            yield


def mutable_updates(
    experiment: Experiment, batches: Sequence[Any], wrap: Callable[[nn.Module], nn.Module]
) -> Iterator[None]:
    """Make an update each time as the usual PyTorch loop does."""
    model = wrap(copy.deepcopy(experiment.model).train())
    settings = experiment.config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    while True:
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            yield


@dataclass(frozen=True)
class Bench:
    """What the two processes measure together.

    Args:
        ranks: This process among the two.
        one: The job in one process.
        two: The job on both ranks.
        epochs: Epochs of a run of the job.
        updates: Updates of a round of a step.
        clock_s: Returns the time in seconds.
    """

    ranks: Ranks
    one: Experiment
    two: Experiment
    epochs: int
    updates: int
    clock_s: Callable[[], float]

    def rows(self) -> dict[str, Callable[[], float]]:
        """Return the rows; one process alone is rank 0, while the other waits."""
        whole, share = _batches(self.one), _batches(self.two)
        alone = {
            _ONE: lambda: train(self.one, self.epochs, self.clock_s).total_s,
            _BARE: self._steps(mutable_updates(self.one, whole, lambda model: model)),
            _STEP_ONE: self._steps(functional_updates(self.one, whole)),
        }
        together = {
            _TWO: lambda: train(self.two, self.epochs, self.clock_s).total_s,
            _STEP_TWO: self._steps(functional_updates(self.two, share)),
            _DDP: self._steps(
                mutable_updates(
                    self.two, share, lambda model: DistributedDataParallel(model, process_group=self.ranks.training)
                )
            ),
        }
        rows = (alone if self.ranks.is_first else dict.fromkeys(alone, lambda: 0.0)) | together
        return {name: partial(self._in_turn, row) for name, row in rows.items()}

    def _steps(self, updates: Iterator[None]) -> Callable[[], float]:
        return lambda: seconds(partial(next, updates), self.updates, self.clock_s)

    def _in_turn(self, row: Callable[[], float]) -> float:
        self.ranks.control.gather("turn", 0)
        return row()

    def shares(self) -> list[Mapping[str, float]]:
        """Return for each rank the share of its time that callbacks take: at updates, and at all events."""
        times = train(self.two, self.epochs, self.clock_s)
        own = {"at updates": times.updates_s / times.total_s, "at all events": times.callbacks_s / times.total_s}
        shares: list[Mapping[str, float]] = self.ranks.control.gather("shares", own)
        return shares


def _batches(experiment: Experiment) -> list[Any]:
    """Return batches of this rank, of the effective batch size in all."""
    positions = (TrainingIteration(update=update) for update in range(8))
    return [batch for at in positions for batch in experiment.data.batch(at)]


def time_tables(measured: Sequence[Mapping[str, float]], shares: Sequence[Mapping[str, float]]) -> list[Table]:
    """Return the tables of times."""
    speed = [
        ("the job: callbacks, evaluations, checkpoints", quartiles(ratios(measured, _ONE, _TWO))),
        ("noether's step alone", quartiles(ratios(measured, _STEP_ONE, _STEP_TWO))),
        ("bare loop / DDP", quartiles(ratios(measured, _BARE, _DDP))),
    ]
    steps = [(name, quartiles([each[name] * 1e3 for each in measured]), quartiles(ratios(measured, name, _DDP)))
             for name in (_DDP, _STEP_TWO, _BARE, _STEP_ONE)]  # fmt: skip
    spent = [(f"rank {rank}", *(f"{each[name]:.1%}" for name in each)) for rank, each in enumerate(shares)]
    return [
        Table("Speed-up of two ranks, same effective batch size", ("", "time of one process / of two ranks"), speed),
        Table("An update of the digits network", ("", "ms", "/ DDP, two ranks"), steps),
        Table("Share of a rank's time in callbacks and their effects", ("", *shares[0]), spent),
    ]


def traffic_tables(traffic: Traffic, updates: int, gradient_bytes: int) -> list[Table]:
    """Return what the ranks exchange, as counted and on paper."""
    counted = []
    for what in (each for each in traffic.calls if each not in _OF_BENCHMARK):
        times = updates if what == "gradients" else traffic.exchanges[what]
        cells = (f"{traffic.calls[what] / times:.2f}", f"{traffic.bytes[what] / times:,.0f}")
        counted.append((what, str(times), *cells))
    sent = traffic.bytes["gradients"] / updates
    note = (
        f"The gradients have {gradient_bytes:,} bytes; samples, losses, times, signals and batch norms are the other "
        f"{sent - gradient_bytes:,.0f}. An update at which no callback is due exchanges nothing else."
    )
    names = ("", "times", "collectives each", "bytes of this rank each")
    paper = [
        ("gradients of an update, nccl", *(f"{1e3 * reduce_s(sent, ranks, _NCCL):.2f}" for ranks in _PAPER_RANKS)),
        *(
            (
                f"{what}, gloo",
                *(f"{1e3 * gather_s(_bytes_on(ranks, what, traffic), ranks, _GLOO):.2f}" for ranks in _PAPER_RANKS),
            )
            for what in traffic.calls
            if what != "gradients" and ("results of" in what or what.startswith("time of AfterEpoch"))
        ),
    ]
    networks = {"nccl": _NCCL, "gloo": _GLOO}
    assumed = "; ".join(
        f"{name} {each.latency_s * 1e6:g} us and {each.bandwidth / 1e9:g} GB/s" for name, each in networks.items()
    )
    formulas = (
        "A sum: 2 log2(N) * latency + 2 (N - 1) / N * bytes / bandwidth. "
        "A gather: (N - 1) * (latency + bytes of a rank / bandwidth)."
    )
    return [
        Table(f"Counted in a run of the job on {_RANKS} ranks, {updates} updates", names, counted, (note,)),
        Table(
            "On paper, ms",
            ("", *(f"{ranks:,} ranks" for ranks in _PAPER_RANKS)),
            paper,
            (f"Assumed: {assumed}. {formulas}",),
        ),
    ]


def _bytes_on(ranks: int, what: str, traffic: Traffic) -> float:
    """Return what each rank sends: its share of the results of an evaluation, at least one frame."""
    each = traffic.bytes[what] / traffic.exchanges[what]
    return max(each * _RANKS / ranks, FRAME_BYTES) if "results of" in what else each


def reduce_s(size: float, ranks: int, network: Network) -> float:
    """Return the seconds of a sum over ranks.

    Example:
        >>> reduce_s(1e9, 2, Network(latency_s=0.5, bandwidth=1e9))
        2.0
    """
    return 2 * math.log2(ranks) * network.latency_s + 2 * (ranks - 1) / ranks * size / network.bandwidth


def gather_s(size: float, ranks: int, network: Network) -> float:
    """Return the seconds in which each rank gets `size` bytes of every other.

    Example:
        >>> gather_s(1e9, 3, Network(latency_s=0.5, bandwidth=1e9))
        3.0
    """
    return (ranks - 1) * (network.latency_s + size / network.bandwidth)


@click.command(help=__doc__)
@click.option("--epochs", default=4, show_default=True, type=click.IntRange(min=1), help="Epochs of a run of the job.")
@click.option("--updates", default=30, show_default=True, type=click.IntRange(min=1), help="Updates in a round.")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--cpu", is_flag=True, help="Measure the CPU time of rank 0, without its waits: on a shared machine.")
@markdown_option
def main(epochs: int, updates: int, rounds: int, *, cpu: bool, markdown: bool) -> None:
    """Measure and print the tables; the first process starts the two that measure."""
    if launched_world_size() == 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_RANKS}", "-m", "benchmarks.ranks"]
        raise SystemExit(subprocess.run([sys.executable, *launch, *sys.argv[1:]], check=False).returncode)  # noqa: S603  # our own module
    torch.set_num_threads(1)
    ranks, config = join(timeout_s=120), load(_CONFIG, ["optimizer.fused=true"])
    one, two = build(config, "one"), build(config, "two", ranks=ranks)
    bench = Bench(ranks, one, two, epochs, updates, time.process_time if cpu else time.perf_counter)
    measured = take_turns(bench.rows(), rounds)
    shares = bench.shares()
    traffic = Traffic()
    with traffic.count_traffic():
        train(two, epochs)
    if ranks.is_first:
        gradient_bytes = sum(param.nbytes for param in two.model.parameters())
        made = epochs * two.run.updates_per_epoch
        show(*time_tables(measured, shares), *traffic_tables(traffic, made, gradient_bytes), markdown=markdown)
    ranks.control.gather("end", 0)


if __name__ == "__main__":
    main()
