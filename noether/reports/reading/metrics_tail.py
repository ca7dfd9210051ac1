"""Follows the metrics of a run that is being written."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from noether.effects.run_files import METRICS_FILE
from noether.reports.reading.log_lines import LogLines
from noether.reports.reading.metrics_log import Columns, parse_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from noether.reports.reading.metric_series import Metrics
    from noether.reports.reading.metrics_log import MetricsLog


class NewMetrics(NamedTuple):
    """The metrics that a run logged since the last call.

    Args:
        metrics: The metrics on the new lines; on all lines if `rewound`.
        rewound: Whether lines that were read before are not in the log any more, because the run resumed from a
            checkpoint before them.
    """

    metrics: Metrics
    rewound: bool


@final
class MetricsTail:
    """Reads the metrics that a run appends to its log; each call parses only the new lines.

    Args:
        run: The run directory.

    Example:
        >>> import noether, tempfile
        >>> with noether.open_run(tempfile.mkdtemp()) as directory:
        ...     tail, state = MetricsTail(directory.path), noether.TrainState()
        ...     for loss in (0.5, 0.25):
        ...         state = state.next_epoch()
        ...         directory.interpreter([noether.LogScalars({"loss": loss})], state, noether.AfterEpoch(time_s=0.0))
        ...         new = tail.read()
        E1_U0_S0  ...
        E2_U0_S0  ...
        >>> new.metrics["loss"].values, new.rewound
        (array([0.25]), False)
    """

    def __init__(self, run: Path) -> None:
        self._lines = LogLines(path=run / METRICS_FILE)
        self._all = Columns()

    @property
    def damaged_lines(self) -> Mapping[int, str]:
        """Number, from 1, of each line that was left out, and why."""
        return self._lines.damaged

    def read(self) -> NewMetrics:
        """Return the metrics on the lines that were appended since the last call; at the first call, on all lines.

        A warning is logged for new lines that are damaged.
        """
        log, rewound = self._read(Columns())
        return NewMetrics(log.metrics, rewound)

    def read_all(self) -> MetricsLog:
        """Return all lines of the log; call either this or `read`, always the same."""
        return self._read(self._all)[0]

    def _read(self, columns: Columns) -> tuple[MetricsLog, bool]:
        """Add the new lines to columns; if the run was resumed, the columns begin again with all lines."""
        path, last = self._lines.path, self._lines.last
        if not path.exists():
            self._lines, self._all = LogLines(path=path), Columns()
            return Columns().finish(), bool(last)
        with path.open("rb") as file:  # a resume replaces the file: this one stays as it is while it is read
            file.seek(self._lines.size - len(last))
            if rewound := file.read(len(last)) != last:  # each line has its time, so no other line is the same
                self._lines = LogLines(path=path)
                columns = self._all = Columns()
                file.seek(0)
            self._lines.damaged.clear()
            log = parse_metrics(self._lines, self._lines.blocks_of(file), columns)
        self._lines.report_damage()
        return log, rewound
