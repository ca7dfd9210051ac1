"""Logs a figure of the outputs of the model for the first samples of a dataset, drawn by a function of the user."""

from __future__ import annotations

from collections.abc import Callable  # noqa: TC003  # the configuration reads the annotations
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, final

from noether.core.artifacts import Artifact, LogFigure
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.effect import LogText
from noether.core.errors import OutputError
from noether.core.tensors.calls import call_with_outputs
from noether.core.tensors.stored_weights import use_weights

if TYPE_CHECKING:
    from noether.core.callback import Effects
    from noether.core.event import BeforeTraining, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import TrainState


@final
class PredictionsCallback(PeriodicDataIteratorCallback):
    """Passes the first batch of a dataset through the model, and logs a figure of the outputs.

    The samples are the same at every firing: the first `batch_size` of the dataset, in its order. The model is in
    evaluation mode, and the random generators of the training do not change. On several ranks, each rank calls the
    model with the same batch, and rank 0 writes the figure.

    Args:
        dataset_key: Name of the dataset.
        figure: A pure function `(outputs, batch)`, in YAML its dotted path. It returns a figure of matplotlib, the
            bytes of a PNG or SVG file, or an artifact such as `LogImages` or `LogTable`, whose key is then its own.
        batch_size: Number of samples, >= 1; None for those of the first batch.
        weights: Name of the weights to use, such as `ema=0.999`; None for those in training.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        OutputError: If `figure` returns something else.

    ```yaml
    - kind: noether.core.callbacks.PredictionsCallback
      every_n_epochs: 5
      dataset_key: val
      batch_size: 16
      figure: noether.examples.digits.show_predictions
    ```

    Example:
        >>> import torch
        >>> from noether import AfterEpoch, LogTable, Run, TrainState
        >>> def draw(outputs, batch):
        ...     return LogTable("largest", ["input", "output"], list(zip(batch.tolist(), outputs.tolist())))
        >>> run = Run(data={"val": [torch.tensor([1.0, 2.0])]}, forward=lambda state, batch: ({}, 2 * batch))
        >>> callback = PredictionsCallback(every_n_epochs=1, dataset_key="val", figure=draw)
        >>> _, effects = callback(TrainState().next_epoch(), AfterEpoch(run=run))
        >>> effects[0].rows
        ((1.0, 2.0), (2.0, 4.0))
    """

    figure: Callable[[Any, Any], Any]

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Refuse a run without the dataset, or without a forward pass."""
        self._check_run(event.run)
        return state, ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Call the model with the first batch, and log the figure of its outputs."""
        used = state if self.weights is None else use_weights(state, self.weights)
        sized = event.run.sized_batches(self._batches(event))
        batch = next((batch for batch, size in sized if size), None)
        if batch is None:
            return state, (LogText(f"{self.name}: {self.dataset_key} has no samples, so nothing is drawn"),)
        forward = event.run.forward
        with getattr(forward, "evaluating", nullcontext)(used):
            _, outputs = forward(used, batch)
        drawn = call_with_outputs(self.figure, outputs, batch, f"figure of {self.name}")
        return state, (self._to_artifact(drawn),)

    def _to_artifact(self, drawn: Any) -> Artifact:
        if isinstance(drawn, Artifact):
            return drawn
        if isinstance(drawn, bytes) or hasattr(drawn, "savefig"):
            return LogFigure(self.key("predictions"), drawn)
        kinds = "a figure of matplotlib, the bytes of a PNG or SVG file, or an artifact such as LogImages"
        raise OutputError(f"{self.name}: figure returned a {type(drawn).__name__}; return {kinds}")
