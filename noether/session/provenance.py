"""The entry `processes` of `summary.json`: each process that trained the run, by the iteration at which it began."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from noether.core.callbacks.summaries import dataset_lengths
from noether.core.effect import SetSummary
from noether.core.event import AfterTraining
from noether.core.tensors.tree import FrozenDict
from noether.effects.disk.calls import DISK
from noether.effects.disk.content_files import store_content
from noether.effects.logs.summary_entries import read_summary, set_process_entry
from noether.effects.provenance.process import describe_process
from noether.effects.run_files import SUMMARY_FILE

if TYPE_CHECKING:
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk
    from noether.effects.run_directory import RunDirectory

PROCESSES: Final = "processes"


def record_process(directory: RunDirectory, state: TrainState, run: Run, disk: Disk = DISK) -> None:
    """Write to the summary which process trains the run from now on: its machine, packages, code, seed and data.

    The trainer and `Session` call it; another loop can call it before its first event. An error is logged, and the run
    continues without the entry. A no-op on ranks other than 0.

    Args:
        directory: The open directory of the run.
        state: The state in which the process begins.
        run: The run.
        disk: The disk.

    Example:
        >>> import tempfile, torch
        >>> from noether import Run, TrainState, open_run
        >>> with tempfile.TemporaryDirectory() as path, open_run(path) as directory:
        ...     record_process(directory, TrainState(), Run(data={"val": [torch.zeros(2, 3)]}))
        ...     entries = read_summary(directory.path / "summary.json")
        >>> entries["processes"]["E0_U0_S0"]["samples"]
        {'val': 2}
    """
    if directory.writes:
        directory.guard_log(SUMMARY_FILE, _record)(directory, state, run, disk)


def _record(directory: RunDirectory, state: TrainState, run: Run, disk: Disk) -> None:
    facts = describe_process(
        (param.device for param in state.params.values()), partial(store_content, directory.path, disk=disk)
    )
    lengths: dict[str, int] = {}
    with suppress(Exception):  # raised by a user's dataset, or by batches whose size is not known
        lengths = {key.partition("/")[2]: length for key, length in dataset_lengths(run).items()}
    facts |= {"seed": state.seed, "samples": lengths}
    entry = set_process_entry(read_summary(directory.path / SUMMARY_FILE, disk), PROCESSES, state.iteration, facts)
    directory.interpreter([SetSummary(FrozenDict({PROCESSES: entry}))], state, AfterTraining(run=run))
