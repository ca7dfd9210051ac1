"""Logs the peak memory of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import MeasurePeakMemory

if TYPE_CHECKING:
    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import TrainState


@final
class PeakMemoryCallback(PeriodicCallback):
    """Logs `memory/peak_bytes/{interval}`: the peak memory of the device since the last firing, in bytes.

    On the CPU it is the peak resident memory of the process since its start. Of several ranks it is that of rank 0,
    which also logs and saves. The interpreter measures it after all callbacks have run, so the value is only logged,
    and no callback can consume it.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

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
        """Empty: callbacks cannot consume the value."""
        return ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Request the measurement."""
        return state, (MeasurePeakMemory(key=f"memory/peak_bytes/{self.interval_name}"),)


PeakMemory = PeakMemoryCallback
"""Alias for YAML that was written for a class-based framework."""
