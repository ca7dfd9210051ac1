"""The panels of a `Session`, whose loop knows no configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from noether.core.tensors.module import named_modules
from noether.effects.console.next_commands import suggest_commands
from noether.session.panels import end, start

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import nn

    from noether.core.callback import Callback
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects.console.run_panels import RunPanel
    from noether.session.live_state import LiveState
    from noether.session.optimizers import LiveOptimizer

_OWN_MEMORIES: Final = ("noether.session.", "noether.integrations.")


def describe_start(path: Path, live: LiveState, state: TrainState, run: Run, members: Iterable[Callback]) -> RunPanel:
    """Return the panel at the start of a process whose loop trains a run.

    Args:
        path: The run directory.
        live: The model and the optimizer.
        state: The state in which the process begins.
        run: What is fixed for the run.
        members: The callbacks, and the members that a session adds to them, which the panel leaves out.
    """
    updates = [start.describe_updates(run)] if "effective_batch_size" in vars(run) else []
    callbacks = [each for each in members if not type(each).__module__.startswith(_OWN_MEMORIES)]
    facts = {
        "directory": [str(path)],
        "model": [start.describe_model(_name_of(live.model), state, run)],
        "data": start.describe_data(run),
        "device": [", ".join([start.describe_device(state, run.world_size), *updates])],
        "optimizer": describe_optimizers(live.optimizer),
        "end": [start.describe_end(run)],
        "begins at": [start.describe_position(state.iteration, run)] if state.iteration.update else [],
        "callbacks": start.describe_callbacks(callbacks),
    }
    return start.describe_start(f"run {path.name}", facts)


def describe_end(
    ended: end.RunEnd, summary: Mapping[str, Any], pointers: Mapping[str, str], *, has_title: bool
) -> RunPanel:
    """Return the panel at the end of a process whose loop trained a run.

    Args:
        ended: How it ended.
        summary: The entries of the summary.
        pointers: The tag that each pointer to a checkpoint names.
        has_title: Whether the console shows titles of panels; otherwise a fact says how the run ended.
    """
    commands = suggest_commands(ended.directory, ended.status)
    panel = end.describe_end(ended, summary, pointers, list(commands.items()))
    facts = [*([] if has_title else [("ending", [ended.ending])]), *panel.facts]
    if not ended.is_complete and "latest" in pointers:
        facts.append(("resume", ["start the program again with the same directory"]))
    return replace(panel, facts=facts)


def describe_optimizers(optimizer: LiveOptimizer | None) -> list[str]:
    """Return the optimizers of a loop, each with the learning rates of its groups.

    Example:
        >>> import torch
        >>> from noether.session.optimizers import TorchOptimizer
        >>> model = torch.nn.Linear(2, 1)
        >>> describe_optimizers(TorchOptimizer(model, torch.optim.AdamW(model.parameters(), lr=0.05)))
        ['AdamW, lr 0.05']
    """
    lines = []
    for each in getattr(optimizer, "optimizers", ()):
        rates = dict.fromkeys(f"{float(group['lr']):g}" for group in each.param_groups)
        lines.append(f"{type(each).__name__}, lr {' and '.join(rates)}")
    return lines


def _name_of(model: nn.Module) -> str:
    """Return the name of a module, without those of wrappers such as `torch.compile` and DDP."""
    *_, inner = (module for path, module in named_modules(model) if not path)
    name: str = inner._get_name()  # type: ignore[no-untyped-call]  # noqa: SLF001  # the name that torch prints
    return name
