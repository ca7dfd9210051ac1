"""Metrics for Weights & Biases, with or without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from noether.effects.disk.encoding import to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.effect import LogScalars, LogText, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState


@final
class WeightsAndBiases:
    """Sends scalars and the summary to Weights & Biases; every chart is over `update`, also after a resume.

    What a run that goes on measures again is there twice, at the same updates: the service takes nothing back.

    Args:
        directory: Where its files go.
        run_id: Identifies the run there, over all its processes.
        project: Name of the project; None for the default of the service.
        entity: Team or user; None for the default of the service.
        mode: `online`, `offline` (`wandb sync` sends it later) or `disabled`; None for what `WANDB_MODE` says.

    Raises:
        ImportError: If wandb is not installed.
    """

    name: Final = "wandb"

    def __init__(
        self,
        directory: Path,
        run_id: str,
        *,
        project: str | None = None,
        entity: str | None = None,
        mode: str | None = None,
    ) -> None:
        import wandb

        self._wandb: Any = wandb
        self._directory = directory
        self._settings = {"id": run_id, "name": run_id, "project": project, "entity": entity, "mode": mode}
        self._run: Any = None
        self._refused: str | None = None  # the error itself would hold what its frames hold: states, event by event

    def resume(self, state: TrainState | None) -> None:
        """Do nothing: the run is found by its id, and its place by the update that comes with every value."""

    def log_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Send scalars: a handler of `LogScalars`."""
        at = {"epoch": state.iteration.epoch, "update": state.iteration.update, "sample": state.iteration.sample}
        self._opened(event).log({**effect.values, **at})

    def log_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Do nothing: texts are for the console."""

    def set_summary(self, effect: SetSummary, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        """Set entries of the summary: a handler of `SetSummary`."""
        self._opened(event).summary.update({key: to_plain(value) for key, value in effect.values.items()})

    def flush(self) -> None:
        """Do nothing: a process of its own writes what it is sent."""

    def close(self) -> None:
        """Send what is held back, and end."""
        if self._run is not None:
            self._run.finish()
        self._run = None

    def _opened(self, event: Event) -> Any:
        if self._refused is not None:  # to ask again at every event would hold up training each time
            raise RuntimeError(self._refused)
        if self._run is None:
            try:
                self._run = self._begun(event)
            except Exception as error:
                self._refused = f"{type(error).__name__}: {error}"
                raise
        return self._run

    def _begun(self, event: Event) -> Any:
        self._directory.mkdir(exist_ok=True)
        # Its console capture would get between the live display and the terminal.
        settings = self._wandb.Settings(console="off")
        run = self._wandb.init(
            **self._settings,
            dir=str(self._directory),
            config=getattr(event.run, "config", None),
            resume="allow",
            # Where a run is open already, wandb would return that one, and its charts would hold the values of both.
            reinit="default" if self._wandb.run is None else "create_new",
            settings=settings,
        )
        run.define_metric("*", step_metric="update")
        return run
