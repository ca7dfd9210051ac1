"""`read_run`: a run directory as Python values, also while the run is being written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import yaml

from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.evaluation_logs import EVALUATIONS
from noether.effects.logs.summary import read_summary
from noether.effects.run_directory import CHECKPOINTS, CONFIG_FILE
from noether.effects.run_logs import EVENTS_FILE, METRICS_FILE, SUMMARY_FILE
from noether.reports.metric_series import Metrics, read_metrics
from noether.training.runs.directories import require_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.effects.checkpoints.manifest import Manifest


def read_run(path: str | Path) -> RunRecord:
    """Return a run directory as Python values; each part is read when it is first used.

    A run that is being written can be read: an incomplete last line of a log is left out. Call `read_run` again for
    what was written since.

    Args:
        path: The run directory.

    Raises:
        ConfigError: If it is not the directory of a run; the message says what to give instead.
    """
    path = Path(path)
    require_run(path)
    return RunRecord(path)


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

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration, as plain values."""
        content: Mapping[str, Any] = yaml.safe_load((self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        return content

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """The entries of `summary.json`."""
        return read_summary(self.path / SUMMARY_FILE)

    @cached_property
    def metrics(self) -> Metrics:
        """The logged metrics by key."""
        return read_metrics(_whole_lines(self.path / METRICS_FILE))

    @cached_property
    def checkpoints(self) -> tuple[Manifest, ...]:
        """The manifests of the checkpoints, oldest first."""
        return tuple(CheckpointReader(self.path / CHECKPOINTS).manifests())

    @cached_property
    def pointers(self) -> Mapping[str, str]:
        """The tag that each pointer names, such as that of `latest`."""
        return CheckpointReader(self.path / CHECKPOINTS).pointers()

    @cached_property
    def evaluations(self) -> Mapping[str, Mapping[str, float]]:
        """The metrics of each standalone evaluation, by the name of its file."""
        files = sorted((self.path / EVALUATIONS).glob("*.json"))
        return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Yield the lines of `events.jsonl`, which a run with `trainer.record: events` writes."""
        return map(json.loads, _whole_lines(self.path / EVENTS_FILE))


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that end with a line break; none if it does not exist."""
    if path.exists():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
