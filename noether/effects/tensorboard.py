"""Metrics for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.effect import LogScalars, LogText, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState


@final
class TensorBoard:
    """Writes scalars and texts for TensorBoard, by update; a run that goes on replaces what it writes again.

    Args:
        directory: Where the files go, one of each process.

    Raises:
        ImportError: If TensorBoard is not installed.
    """

    name: Final = "tensorboard"

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._directory = directory
        self._purge_step: int | None = None
        self._writer: Any = None

    def resume(self, state: TrainState | None) -> None:
        """Let TensorBoard forget what was logged beyond `state`, or everything where a run begins anew."""
        self._purge_step = 0 if state is None else state.iteration.update + 1

    def scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Write scalars: a handler of `LogScalars`."""
        for key, value in effect.values.items():
            self._opened().add_scalar(key, value, state.iteration.update, walltime=event.time_s or None)

    def text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Write a text: a handler of `LogText`."""
        self._opened().add_text("log", effect.text, state.iteration.update, walltime=event.time_s or None)

    def summary(self, effect: SetSummary, state: TrainState, event: Event) -> None:
        """Do nothing: TensorBoard has no summary."""

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is held back, and end."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _opened(self) -> Any:
        if self._writer is None:
            self._writer = self._make(str(self._directory), purge_step=self._purge_step)
        return self._writer
