"""A run on disk: its checkpoints, logs and summary below one directory, and the interpreter that writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from safetensors.torch import save_file

from noether.core.effect import (
    LogScalars,
    LogText,
    MeasurePeakMemory,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    ShowProgress,
)
from noether.effects.checkpoints import CheckpointStore
from noether.effects.console import Console
from noether.effects.interpreter import Interpreter
from noether.effects.logs import MetricsFile, Summary
from noether.effects.memory import PeakMemory

if TYPE_CHECKING:
    from noether.core.event import Event
    from noether.core.state import TrainState

CONFIG: Final = "config.yaml"


def open_run(directory: str | Path, console: Console | None = None) -> RunDirectory:
    """Return the run in `directory`, made if it does not exist.

    Args:
        directory: Where the run is written.
        console: Where lines for a person go; by default the standard output.

    Example:
        >>> import tempfile
        >>> from noether import AfterTraining, SaveCheckpoint, TrainState
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     run = open_run(directory)
        ...     run.interpreter([SaveCheckpoint()], TrainState().advance(samples=4), AfterTraining())
        ...     str(open_run(directory).resume().iteration)
        'E0_U1_S4'
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    return RunDirectory(Path(directory), console or Console())


@final
class RunDirectory:
    """One run on disk; made by `open_run`.

    Args:
        path: The directory.
        console: Where lines for a person go.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self.run_id = path.resolve().name
        self.checkpoints = CheckpointStore(path / "checkpoints", self.run_id)
        self._console = console
        self._metrics = MetricsFile(path / "metrics.jsonl")
        summary = Summary(path / "summary.json")
        self.interpreter = Interpreter(
            {
                LogText: [console.text],
                LogScalars: [self._metrics.write, console.scalars],
                SetSummary: [summary.set],
                SaveCheckpoint: [self.checkpoints.save],
                SaveTensors: [self._save_tensors],
                ShowProgress: [console.progress],
            },
            measures={MeasurePeakMemory: PeakMemory().measure},
        )

    def resume(self) -> TrainState | None:
        """Return the state in the newest checkpoint, or None; log lines beyond it are dropped, to be written again.

        Without a checkpoint all are dropped: the run begins anew.

        Raises:
            CheckpointError: If the checkpoint is damaged.
            LogError: If the log is.
        """
        state = self.load()
        self.cut_logs(state)
        return state

    def load(self) -> TrainState | None:
        """Return the state in the newest checkpoint, or None, and change nothing.

        Raises:
            CheckpointError: If the checkpoint is damaged.
        """
        newest = self.checkpoints.newest()
        return None if newest is None else self.checkpoints.resume(newest)

    def cut_logs(self, state: TrainState | None) -> None:
        """Drop the log lines beyond `state`, or all where the run begins anew.

        Raises:
            LogError: If the log is damaged.
        """
        self._metrics.cut(state)

    def close(self) -> None:
        """Let go of what the run holds."""
        self._console.close()

    def _save_tensors(self, effect: SaveTensors, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        path = self.path / "tensors" / f"{effect.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().clone() for name, tensor in effect.tensors.items()}, path)
