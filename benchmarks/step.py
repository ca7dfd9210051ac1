"""Time of a functional update, compared with the mutable loop that it equals bit for bit.

Run as `python -m benchmarks.step`. Every row is the time of an update as a ratio to the mutable loop with torch's
default AdamW. All rows take turns in one process on one thread, so that other work on the machine affects all of them;
a ratio is taken within each round, and the table shows the median over rounds with quartiles.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import nn
from torch.func import functional_call, grad_and_value

from benchmarks.measurement import Table, markdown_option, quartiles, show
from noether import TrainingIteration, TrainState
from noether.core.tensors.batch import model_arguments
from noether.core.tensors.losses import read_losses
from noether.core.tensors.tree import FrozenDict
from noether.examples.digits import ConvNet, Digits, cross_entropy
from noether.testing import same
from noether.training.data.indexed import TrainingData
from noether.training.step.accumulation import BackwardResult
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

_BATCH = 64
_LR = 1e-3
_MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "ConvNet": lambda: ConvNet(dropout=0.0),  # without dropout: its random numbers would differ
}


def mutable(model: nn.Module, batches: list[Any], *, fused: bool | None) -> Iterator[Mapping[str, Tensor]]:
    """Yield the parameters after each update of the usual PyTorch loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=fused)
    params = dict(model.named_parameters())
    model.train()
    while True:
        for batch in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(batch[0]), batch)["cross_entropy"]
            loss.backward()
            optimizer.step()
            yield params


def functional(
    model: nn.Module, batches: list[Any], *, fused: bool | None, kind: type[Step] = Step, donate: bool = False
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the parameters after each update of noether's step."""
    optimizer = FunctionalOptimizer(torch.optim.AdamW, {"lr": _LR, "fused": fused})
    lr = {"default": Constant(value=_LR)}
    step = kind(model=model.train(), loss=cross_entropy, optimizer=optimizer, lr=lr, donate=donate)
    state = TrainState.from_module(model)
    state = state.replace(opt_state=optimizer.init(state.params))
    while True:
        for batch in batches:
            state, outputs = step(state, [batch])
            state = state.advance(samples=outputs.samples)
            yield state.params


class StepByFunc(Step):  # type: ignore[misc]  # final; the subclass replaces only the measured part
    """The step with `torch.func.grad_and_value` in place of `torch.autograd.grad`."""

    def _run_backward(
        self,
        state: TrainState,
        buffers: Mapping[str, Tensor],
        batch: Any,
        objectives: Any,
        times: Any,  # noqa: ARG002  # the original counts seconds on it
    ) -> BackwardResult:
        trained = {name: state.params[name] for name in self.optimizer.trainable(state.params)}
        arguments, keywords = model_arguments(self.model, batch)

        def total(inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
            # Batch norm may write only to copies made here.
            weights = {**state.params, **inputs, **{name: buffer.clone() for name, buffer in buffers.items()}}
            outputs = functional_call(self.model, weights, arguments, keywords)
            losses = read_losses(self.loss(outputs, batch), self.loss)
            return objectives(losses)[0], (dict(losses), outputs, {name: weights[name] for name in buffers})

        grads, (_, (losses, outputs, written)) = grad_and_value(total, has_aux=True)(trained)
        return BackwardResult([grads], FrozenDict(losses), outputs, written)


_ROWS: Mapping[str, Callable[[nn.Module, list[Any]], Iterator[Mapping[str, Tensor]]]] = {
    "mutable loop": lambda model, batches: mutable(model, batches, fused=None),
    "mutable loop, fused": lambda model, batches: mutable(model, batches, fused=True),
    "noether step": lambda model, batches: functional(model, batches, fused=None),
    "noether step, fused": lambda model, batches: functional(model, batches, fused=True),
    "noether step, fused, donated": lambda model, batches: functional(model, batches, fused=True, donate=True),
    "noether step, grad_and_value": lambda model, batches: functional(model, batches, fused=None, kind=StepByFunc),
}
_SAME = (
    ("mutable loop", "noether step", "noether step, grad_and_value"),
    ("mutable loop, fused", "noether step, fused", "noether step, fused, donated"),
)


def measure(
    make_model: Callable[[], nn.Module], batches: list[Any], updates: int, rounds: int
) -> dict[str, list[float]]:
    """Return by row the ratio of its time to the first row, in every round.

    Raises:
        RuntimeError: If rows that must do the same work end at different parameters.
    """
    loops = {}
    for name, loop in _ROWS.items():
        torch.manual_seed(0)
        loops[name] = loop(make_model(), batches)
    ratios: dict[str, list[float]] = {name: [] for name in loops}
    params: dict[str, Mapping[str, Tensor]] = {}
    for number in range(rounds + 1):
        times_s = {}
        for name, loop in loops.items():
            start_s = time.perf_counter()
            for _ in range(updates):
                params[name] = next(loop)
            times_s[name] = time.perf_counter() - start_s
        if number:  # the first round warms up
            for name, time_s in times_s.items():
                ratios[name].append(time_s / times_s["mutable loop"])
    for first, *others in _SAME:
        for other in others:
            if not all(same(params[other][name], param.detach()) for name, param in params[first].items()):
                raise RuntimeError(f"{other!r} did not do the same work as {first!r}: their parameters differ")
    return ratios


@click.command(help=__doc__)
@click.option("--updates", default=30, show_default=True, type=click.IntRange(min=1), help="Updates in a round.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(updates: int, rounds: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    data = TrainingData(Digits(split="train"), seed=0, effective_batch_size=_BATCH, drop_last=True)
    batches = [micro for batch in range(8) for micro in data.batch(TrainingIteration(update=batch))]
    measured = [measure(make_model, batches, updates, rounds) for make_model in _MODELS.values()]
    rows = [(row, *(quartiles(ratios[row]) for ratios in measured)) for row in _ROWS]
    title = f"Time of an update / mutable loop; torch {torch.__version__}, batch {_BATCH}, one thread"
    show(Table(title, ("", *_MODELS), rows), markdown=markdown)


if __name__ == "__main__":
    main()
