"""Time that a checkpoint takes from the training thread, including a slower next update.

Run as `python -m benchmarks.saving`. 25 million parameters with the two moments of Adam are 300 MB. The cost of a
checkpoint is the time to request it and make the next update, minus the time of a normal update. It includes work
deferred to the update, such as copying tensors that the checkpoint in progress still needs, and the CPU time that the
writing thread takes from the training thread. The unit is one copy of the 300 MB into already mapped memory. All rows
take turns; the table shows medians over rounds with quartiles.

Goals: at most 5 ms for the step that writes to no tensor, and 1.5 copies for the donated step. Both are met (2 ms, and
0.95 copies) if the second core is free for the writing thread.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.measurement import Table, markdown_option, quartiles, ratios, seconds, show, take_turns
from noether import AfterUpdate, SaveCheckpoint, TrainState
from noether.effects import open_run
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Callable

_COPY, _LR, _UPDATES = "one copy into mapped memory", 1e-3, 4


def make_model(params: int) -> nn.Module:
    """Return a network of about `params` parameters in square matrices."""
    side = min(1000, params)
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(max(1, params // side**2))))


def squares(outputs: torch.Tensor, _batch: Any) -> dict[str, torch.Tensor]:
    """Return the mean square of the outputs as a loss."""
    return {"square": outputs.square().mean()}


def cost_s(update: Callable[[], Any], save: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Return the seconds that a save and the next update take, minus those of a normal update."""
    plain_s = median([seconds(update) for _ in range(_UPDATES)])
    saved_s = seconds(lambda: (save(), update()))
    wait()
    return saved_s - plain_s


def noether(model: nn.Module, batch: Any, folder: Path, *, donate: bool) -> Callable[[], float]:
    """Return a row: noether's step, saved in a background thread."""
    optimizer = FunctionalOptimizer(torch.optim.AdamW, {"lr": _LR, "fused": True})
    lr = {"default": Constant(value=_LR)}
    step = Step(model=model.train(), loss=squares, optimizer=optimizer, lr=lr, donate=donate)
    state = TrainState.from_module(model)
    current = [state.replace(opt_state=optimizer.init(state.params))]
    directory = open_run(folder, asynchronous=True, borrowed=False)
    effects = [SaveCheckpoint(pointers=("latest",), retention={"benchmark": 0})]

    def update() -> None:
        state, outputs = step(current.pop(), [batch])  # no other reference to the state, so its tensors can be freed
        current.append(state.advance(samples=outputs.samples))

    return lambda: cost_s(
        update, lambda: directory.interpreter(effects, current[0], AfterUpdate(samples=1)), directory.wait
    )


def async_save(model: nn.Module, batch: Any, folder: Path) -> Callable[[], float]:
    """Return a row: the usual PyTorch loop, saved by `torch.distributed.checkpoint` in a background thread."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)
    futures: list[Any] = []

    def update() -> None:
        optimizer.zero_grad()
        squares(model(batch[0]), batch)["square"].backward()
        optimizer.step()

    def save() -> None:
        tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        futures.append(dcp.async_save(tree, checkpoint_id=folder, no_dist=True))

    return lambda: cost_s(update, save, lambda: futures.pop().result())


def copy(params: int) -> Callable[[], float]:
    """Return a row: a copy of as many bytes as a checkpoint has, into already mapped memory."""
    source, target = torch.ones(3 * params), torch.zeros(3 * params)
    return lambda: seconds(lambda: target.copy_(source))


@click.command(help=__doc__)
@click.option("--params", default=25_000_000, show_default=True, type=click.IntRange(min=1), help="Parameters.")
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(params: int, rounds: int, markdown: bool) -> None:  # noqa: FBT001  # click passes it by name
    """Measure and print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch, about a missing process group
    batch = (torch.randn(1, min(1000, params)), None)
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            _COPY: copy(params),
            "distributed.checkpoint.async_save": async_save(make_model(params), batch, Path(folder) / "dcp"),
            "noether": noether(make_model(params), batch, Path(folder) / "pure", donate=False),
            "noether, donated": noether(make_model(params), batch, Path(folder) / "donated", donate=True),
        }
        measured = take_turns(rows, rounds)
    cells = [
        (row, quartiles([1000 * each[row] for each in measured], 1), quartiles(ratios(measured, row, _COPY)))
        for row in rows
    ]
    title = f"Cost of a checkpoint of {12 * params / 1e6:.0f} MB to the training thread"
    show(Table(title, ("", "ms", "/ one copy"), cells), markdown=markdown)


if __name__ == "__main__":
    main()
