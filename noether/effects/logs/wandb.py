"""Logging to Weights & Biases, with or without a network."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from noether.effects.disk.json_numbers import to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.effect import LogScalars, LogText, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.artifacts.encoding import EncodedArtifact


@final
class WeightsAndBiases:
    """Sends scalars, artifacts and the summary to Weights & Biases.

    The x-axis of every chart is `update`, also after a resume. Values that a resumed run measures again appear twice at
    the same update, because the service cannot delete values.

    Args:
        directory: Where the files of wandb go.
        run_id: Identifies the run to the service, across all its processes.
        project: Name of the project; None for the default of the service.
        entity: Team or user; None for the default of the service.
        mode: `online`, `offline` (`wandb sync` uploads later) or `disabled`; None for the value of `WANDB_MODE`.
        group: Group of runs that the service shows together; None for none.
        job_type: What the run does, such as `eval`; None for the default of the service.

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
        group: str | None = None,
        job_type: str | None = None,
    ) -> None:
        import wandb

        self._wandb: Any = wandb
        self._directory = directory
        self._settings = {"id": run_id, "name": run_id, "project": project, "entity": entity, "mode": mode}
        self._settings |= {key: value for key, value in (("group", group), ("job_type", job_type)) if value is not None}
        self._run: Any = None
        self._start_error: str | None = None  # not the error itself, whose traceback would keep states alive

    def resume(self, state: TrainState | None) -> None:
        """Do nothing: wandb finds the run by its id, and every value comes with its update."""

    def log_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Send scalars: a handler of `LogScalars`."""
        counts = {"epoch": state.iteration.epoch, "update": state.iteration.update, "sample": state.iteration.sample}
        self._started_run(event).log({**effect.values, **counts})

    def log_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Do nothing: texts are for the console."""

    def log_artifact(self, artifact: EncodedArtifact, state: TrainState, event: Event) -> None:
        """Send an artifact: figures and images as images, SVG and texts as HTML, files as artifacts of wandb."""
        run = self._started_run(event)
        if artifact.kind == "file":
            name = re.sub(r"[^\w.-]", "_", f"{run.id}-{artifact.key}")
            sent = self._wandb.Artifact(name, type="file")
            with sent.new_file(artifact.name, mode="wb") as file:
                file.write(artifact.content)
            run.log_artifact(sent)
        else:
            counts = {"epoch": state.iteration.epoch, "update": state.iteration.update}
            run.log({artifact.key: self._to_media(artifact), **counts, "sample": state.iteration.sample})

    def _to_media(self, artifact: EncodedArtifact) -> Any:
        """Return what wandb shows of an artifact that is not a file."""
        wandb, value = self._wandb, artifact.value
        if artifact.kind == "histogram":
            return wandb.Histogram(np_histogram=(np.asarray(value["counts"]), np.asarray(value["edges"])))
        if artifact.kind == "table":
            return wandb.Table(columns=value["columns"], data=value["rows"], allow_mixed_types=True)
        if artifact.kind == "text":
            return wandb.Html(f"<pre>{html.escape(value)}</pre>")
        if artifact.suffix == ".svg":
            return wandb.Html(artifact.content.decode(errors="replace"))
        if artifact.kind == "images":
            captions = artifact.captions or (None,) * len(value)
            return [
                wandb.Image(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, caption=caption)
                for pixels, caption in zip(value, captions, strict=True)
            ]
        from PIL import Image  # wandb reads images by it

        return wandb.Image(Image.open(io.BytesIO(artifact.content)), caption=artifact.caption or None)

    def set_summary(self, effect: SetSummary, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        """Set entries of the summary: a handler of `SetSummary`."""
        self._started_run(event).summary.update({key: to_plain(value) for key, value in effect.values.items()})

    def flush(self) -> None:
        """Do nothing: wandb writes in a separate process."""

    def close(self) -> None:
        """Send buffered values, and end the wandb run."""
        if self._run is not None:
            self._run.finish()
        self._run = None

    def _started_run(self, event: Event) -> Any:
        """Return the wandb run, started if necessary; after a failure it is not tried again, which would be slow."""
        if self._start_error is not None:
            raise RuntimeError(self._start_error)
        if self._run is None:
            try:
                self._run = self._start_run(event)
            except Exception as error:
                self._start_error = f"{type(error).__name__}: {error}"
                raise
        return self._run

    def _start_run(self, event: Event) -> Any:
        self._directory.mkdir(exist_ok=True)
        # The console capture of wandb would interfere with the live display.
        settings = self._wandb.Settings(console="off")
        run = self._wandb.init(
            **self._settings,
            dir=str(self._directory),
            config=getattr(event.run, "config", None),
            resume="allow",
            # By default wandb returns a run that is open already, and its charts would mix the values of both.
            reinit="default" if self._wandb.run is None else "create_new",
            settings=settings,
        )
        run.define_metric("*", step_metric="update")
        return run
