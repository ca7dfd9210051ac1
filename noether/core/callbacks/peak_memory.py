"""How much memory training takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import MeasurePeakMemory

if TYPE_CHECKING:
    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import TrainState


@final
class PeakMemoryCallback(PeriodicCallback):
    """Logs `memory/peak_bytes/{interval}`: the peak memory of the device since the last firing, in bytes.

    On the CPU it is the peak resident memory of the process. The value goes to the logs only: it is a reading of the
    world, so no callback can consume it.

    Args:
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

    ```yaml
    - kind: noether.core.callbacks.PeakMemoryCallback
      every_n_epochs: 1
    ```

    Example:
        >>> from noether import AfterEpoch, TrainState
        >>> PeakMemoryCallback(every_n_epochs=1)(TrainState().next_epoch(), AfterEpoch())[1]
        (MeasurePeakMemory(key='memory/peak_bytes/E1'),)
    """

    @property
    def produces(self) -> tuple[str, ...]:
        """Nothing that a callback could consume."""
        return ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Ask for the measurement."""
        return state, (MeasurePeakMemory(key=f"memory/peak_bytes/{self.interval_name}"),)


PeakMemory = PeakMemoryCallback
"""The name that the class-based framework gives it."""
