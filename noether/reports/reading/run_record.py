"""`read_run` and `read_runs`: run directories as Python values, also while the runs are being written."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from noether.config.errors import ConfigError
from noether.core.iteration import TrainingIteration
from noether.core.metric_keys import direction_of
from noether.effects.checkpoints.listing import CheckpointError, Listing, list_checkpoints
from noether.effects.disk.calls import DISK
from noether.effects.logs.summary_entries import read_summary
from noether.effects.run_files import CHECKPOINTS, CONFIG_FILE, EVALUATIONS, EVENTS_FILE, METRICS_FILE, SUMMARY_FILE
from noether.reports.reading.log_lines import LogLines
from noether.reports.reading.metrics_log import read_first_point, read_last_point
from noether.reports.reading.metrics_tail import MetricsTail
from noether.reports.reading.run_folders import find_runs, require_readable
from noether.reports.reading.status import find_status
from noether.reports.reading.whole_files import find_mode, read_config, read_entries, read_evaluations

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from noether.core.metric_keys import Mode
    from noether.effects.checkpoints.manifest import Manifest
    from noether.reports.reading.metric_series import Best, Metrics, Point
    from noether.reports.reading.metrics_log import MetricsLog
    from noether.reports.reading.status import RunStatus

_LOGGER: Final = logging.getLogger(__name__)


def read_run(path: str | Path) -> RunRecord:
    """Return a run directory as Python values; each part is read when it is first used, and then stays as it was.

    A run that is being written can be read, without its lock: an incomplete last line of a log is left out. Call
    `reread` of the run for what was written since, or follow the log with `MetricsTail` of
    `noether.reports.reading.metrics_tail`.

    Args:
        path: The run directory: of `noether train`, or of a `Session` with `open_run`, which has no `config.yaml`.

    Raises:
        ConfigError: If it is not the directory of a run; the message says what to give instead.

    Example:
        >>> import noether, tempfile
        >>> with noether.open_run(tempfile.mkdtemp()) as directory:
        ...     state = noether.TrainState().advance(samples=8)
        ...     directory.interpreter([noether.LogScalars({"loss": 0.5})], state, noether.AfterUpdate(time_s=0.0))
        E0_U1_S8  ...
        >>> run = noether.read_run(directory.path)
        >>> run.metrics["loss"].values, run.metrics["loss"].points.sample
        (array([0.5]), array([8]))
    """
    path = Path(path)
    require_readable(path)
    return RunRecord(path)


def read_runs(folder: str | Path) -> list[RunRecord]:
    """Return the runs in a folder, at most two folders down, as in `RUNS/NAME/RUN_ID`, in the order of their paths.

    A run whose `config.yaml` or `summary.json` is damaged is left out, and so is one whose directory or log this user
    may not read; a warning is logged for each. A run that links lead to as well, such as `latest`, is there once.

    Args:
        folder: The folder, or the directory of one run.

    Raises:
        ConfigError: If there is no run in it.

    Example:
        >>> import noether, tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a", "b"):
        ...     noether.open_run(folder / name).close()
        >>> [run.run_id for run in noether.read_runs(folder)]
        ['a', 'b']
    """
    runs = []
    for path in find_runs(Path(folder)):
        run = RunRecord(path)
        try:
            run.config, run.summary  # noqa: B018  # read now, and kept
            if (path / METRICS_FILE).exists():
                (path / METRICS_FILE).open("rb").close()
        except (ConfigError, OSError) as error:
            _LOGGER.warning("left out a run: %s", error)
        else:
            runs.append(run)
    return runs


class ArtifactRecord(NamedTuple):
    """An artifact that a run logged.

    Args:
        key: The key under which it was logged.
        kind: `figure`, `images`, `histogram`, `table`, `text` or `file`.
        path: Its file.
        caption: Its caption, or an empty text.
        bytes: Size of the file.
        point: Where it was logged.
    """

    key: str
    kind: str
    path: Path
    caption: str
    bytes: int
    point: Point


@final
@dataclass(frozen=True)
class RunRecord:
    """A run that was read from its directory.

    Args:
        path: The run directory.
    """

    path: Path

    @property
    def run_id(self) -> str:
        """Name of the run directory."""
        return self.path.resolve().name

    @property
    def name(self) -> str:
        """The setting `run.name`; without a configuration, the name of the directory."""
        settings = self.config.get("run")
        name = settings.get("name") if isinstance(settings, dict) else None
        return self.run_id if name is None else str(name)

    @property
    def status(self) -> RunStatus:
        """Whether the run is being written now, and else how it ended; see `find_status`."""
        return find_status(self.path, read_summary(self.path / SUMMARY_FILE))

    @property
    def started_s(self) -> float | None:
        """Time of the start of the run, in seconds since 1970; None if unknown."""
        times = [time for each in self.provenance.values() if isinstance(time := each.get("started_s"), (int, float))]
        if not times and (first := read_first_point(self.path / METRICS_FILE)) is not None:
            times = [first.time_s]
        return min(times) if times else None

    @property
    def last_point(self) -> Point | None:
        """Where the last line of the log was written; None without one. Only the end of the log is read."""
        if "_log" in vars(self):
            return self.metrics.points[-1] if len(self.metrics.points) else None
        return read_last_point(self.path / METRICS_FILE)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration, as plain values; empty for the run of a `Session`, which has none.

        Raises:
            ConfigError: If the file cannot be read or is damaged.
        """
        return read_config(self.path / CONFIG_FILE)

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """The entries of `summary.json`; empty if the run has not written it yet.

        Raises:
            ConfigError: If the file cannot be read or is damaged.
        """
        return read_entries(self.path / SUMMARY_FILE)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Facts about each process that trained the run, by the iteration where it began; empty for older runs."""
        return {at: each for at, each in self._entry("processes").items() if isinstance(each, dict)}

    @property
    def phases(self) -> Mapping[str, Mapping[str, float]]:
        """Seconds that each process spent in each phase, by the iteration where it began; empty for older runs."""
        return {
            at: {name: value for name, value in each.items() if isinstance(value, (int, float))}
            for at, each in self._entry("phases").items()
            if isinstance(each, dict)
        }

    @property
    def metrics(self) -> Metrics:
        """The logged metrics by key.

        A warning is logged for lines that are damaged; the others are there.
        """
        return self._log.metrics

    @property
    def damaged_lines(self) -> Mapping[int, str]:
        """Number, from 1, of each line of `metrics.jsonl` that is damaged and left out of the metrics, and why."""
        self._log  # noqa: B018  # reading it finds them
        return self._tail.damaged_lines

    @cached_property
    def artifacts(self) -> tuple[ArtifactRecord, ...]:
        """The logged artifacts in the order of the log; a file may be missing in an incomplete copy of the run."""
        return tuple(
            ArtifactRecord(
                key,
                str(entry.get("kind", "file")),
                self.path / str(entry.get("file", "")),
                str(entry.get("caption", "")),
                int(entry.get("bytes", 0)),
                self.metrics.points[line],
            )
            for line, key, entry in self._log.artifacts
        )

    @property
    def checkpoints(self) -> tuple[Manifest, ...]:
        """The manifests of the checkpoints, oldest first."""
        return tuple(self._listing.manifests)

    @property
    def pointers(self) -> Mapping[str, str]:
        """The tag that each pointer names, such as that of `latest`."""
        return self._listing.targets

    def load_into(self, model: nn.Module, checkpoint: str = "latest", weights: str | None = None) -> Manifest:
        """Load the weights of a checkpoint into a live model: all of them, or none if one does not fit.

        Parameters, buffers and extra state are loaded, on the device of the model; its mode and `requires_grad` stay.
        Names may have the parts that `torch.compile` and DDP add, shards of several ranks are joined, and the run is
        neither changed nor locked.

        Args:
            model: The model, as it was built for the run.
            checkpoint: Its tag or a part of that, such as `E10`; a pointer, such as `latest` or
                `best_model.val/accuracy`; `newest`, or `best`.
            weights: Averaged weights in it, such as `ema=0.999`; None for those that the checkpoint is for.

        Returns:
            The manifest, with the iteration of the checkpoint.

        Raises:
            CheckpointError: If the checkpoint does not exist, is damaged, or does not have these weights of the whole
                model; the message lists what exists.
            MismatchError: If names, shapes or dtypes are not those of the model; the message lists the differences.

        Example:
            >>> import noether, tempfile, torch
            >>> model = torch.nn.Linear(2, 1)
            >>> with noether.open_run(tempfile.mkdtemp()) as directory:
            ...     state = noether.TrainState.from_module(model).advance(samples=8)
            ...     save = noether.SaveCheckpoint(pointers=("latest",))
            ...     directory.interpreter([save], state, noether.AfterUpdate(time_s=0.0))
            >>> other = torch.nn.Linear(2, 1)
            >>> str(noether.read_run(directory.path).load_into(other).iteration)
            'E0_U1_S8'
            >>> torch.equal(other.weight, model.weight)
            True
        """
        # These import torch; reading a run does without.
        from noether.core.tensors.live.loading import write_model
        from noether.effects.checkpoints.reader import CheckpointReader
        from noether.training.runs.directories import load_weights

        try:
            manifest, state = load_weights(CheckpointReader(self.path / CHECKPOINTS), checkpoint, weights)
        except ConfigError as error:  # it names the options of the command line
            raise CheckpointError(str(error.__cause__)) from None
        if manifest.models:
            raise CheckpointError(
                f"{manifest.tag} has the weights below {', '.join(manifest.models)} only; give another checkpoint, or "
                f"write these to a file with noether export and load it with strict=False"
            )
        write_model(model, state)
        return manifest

    @cached_property
    def evaluations(self) -> Mapping[str, Mapping[str, float]]:
        """The metrics of each standalone evaluation, by the name of its file; a warning is logged for damaged files."""
        return read_evaluations(self.path / EVALUATIONS)

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Yield the lines of `events.jsonl`, which a run with `trainer.record: events` writes."""
        lines = LogLines(path=self.path / EVENTS_FILE)
        for block in lines.blocks():
            yield from (line for line in block if line is not None)
        lines.report_damage()

    def direction(self, key: str) -> Mode | None:
        """Return whether higher or lower values of a metric are better; None if that is unknown.

        The `mode` of a callback decides whose `metric_key` is the metric; without one, the words of the key decide.
        """
        return find_mode(self.config, key) or direction_of(key)

    def best(self, key: str) -> Best | None:
        """Return the best value of a metric and where it was logged first.

        Returns:
            None if there is no finite value, or if `direction` is None.

        Raises:
            KeyError: If the run logged no such metric; the message has the nearest key.
        """
        mode = self.direction(key)
        series = self.metrics[key]
        return None if mode is None else series.best(mode)

    def reread(self) -> RunRecord:
        """Return the run as it is now; of the log, only lines that were appended since are read.

        Example:
            >>> import noether, tempfile
            >>> with noether.open_run(tempfile.mkdtemp()) as directory:
            ...     run = noether.read_run(directory.path)
            ...     for epoch in (1, 2):
            ...         state = noether.TrainState().next_epoch()
            ...         directory.interpreter([noether.LogScalars({"a": epoch})], state, noether.AfterEpoch(time_s=0.0))
            ...         run = run.reread()
            ...         run.metrics["a"].values
            E1_U0_S0  ...
            array([1])
            E1_U0_S0  ...
            array([1, 2])
        """
        run = RunRecord(self.path)
        vars(run)["_tail"] = self._tail
        return run

    @cached_property
    def _listing(self) -> Listing:
        return list_checkpoints(self.path / CHECKPOINTS, DISK)

    @cached_property
    def _tail(self) -> MetricsTail:
        return MetricsTail(self.path)

    @cached_property
    def _log(self) -> MetricsLog:
        return self._tail.read_all()

    def _entry(self, name: str) -> Mapping[str, Any]:
        """Return an entry of the summary by iteration, in the order of iterations; a user's own is left out."""
        entry = self.summary.get(name)
        if not isinstance(entry, dict):
            return {}
        try:
            return dict(sorted(entry.items(), key=lambda item: TrainingIteration.parse(item[0]).update))
        except ValueError:
            return {}
