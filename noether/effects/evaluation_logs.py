"""Logs of a standalone evaluation, in `eval/` of the run directory, beside the logs of training."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, final

from noether.core.effect import LogScalars, MeasurePeakMemory, SaveTensors, SetSummary, ShowProgress
from noether.core.file_names import escape_path
from noether.effects.artifacts.files import artifact_handlers, write_artifact
from noether.effects.console.console import Console
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import make_directories, replace_file, replace_text
from noether.effects.disk.json_numbers import to_plain
from noether.effects.disk.tensor_files import tensor_pieces
from noether.effects.interpreter import Interpreter
from noether.effects.logs.peak_memory import PeakMemory
from noether.effects.run_files import EVALUATIONS
from noether.effects.run_logs import LogGuard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.artifacts.encoding import EncodedArtifact
    from noether.effects.disk.calls import Disk
    from noether.effects.run_logs import LogService


@final
class EvaluationLogs:
    """The logs of one evaluation of a run; no file of the run or of an earlier evaluation is changed.

    The metrics go to `eval/NAME.json`; entries of the summary to `eval/NAME/summary.json`; tensors to
    `eval/NAME/tensors/`; artifacts to `eval/NAME/artifacts/`, and their entries by key to `eval/NAME/artifacts.json`;
    texts and progress to the console. If an evaluation of this name exists, NAME is `NAME.2`,
    `NAME.3`, .... The run is not locked, so a process may train it meanwhile.

    Attributes:
        metrics: The metrics logged so far.
        summary: The entries of the summary.
        artifacts: The entries of the artifacts: kind, path below `eval/NAME`, bytes and caption.

    Args:
        run: The run directory.
        name: Name of the evaluation, such as the tag of the checkpoint.
        services: Other destinations of logs.
        console: Where texts go.
        disk: The disk.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from noether import AtEval, TrainState
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for _ in range(2):
        ...         logs = EvaluationLogs(Path(folder), "E1_U4_S16")
        ...         logs.interpreter([LogScalars({"val/accuracy": 0.5})], TrainState(), AtEval())
        ...         print(logs.write().name)
        E1_U4_S16.json
        E1_U4_S16.2.json
    """

    def __init__(
        self,
        run: Path,
        name: str,
        *,
        services: Sequence[LogService] = (),
        console: Console | None = None,
        disk: Disk = DISK,
    ) -> None:
        self.metrics: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self._folder = run / EVALUATIONS
        self._name = name
        self._claimed: Path | None = None
        self._services = services
        self._console = console or Console()
        self._disk = disk
        self._guard = LogGuard("the evaluation continues")
        guard = self._guard.guard
        self.interpreter = Interpreter(
            {
                **artifact_handlers(
                    [self._console.write_text, *(guard(each.name, each.log_text) for each in services)],
                    guard,
                    [("artifacts", self._add_artifact), *((each.name, each.log_artifact) for each in services)],
                ),
                LogScalars: [self._add_metrics, *(guard(each.name, each.log_scalars) for each in services)],
                SetSummary: [self._add_summary, *(guard(each.name, each.set_summary) for each in services)],
                SaveTensors: [guard("tensors", self._save_tensors)],
                ShowProgress: [self._console.show_progress],
            },
            measures={MeasurePeakMemory: PeakMemory().measure},
        )

    @property
    def services(self) -> Mapping[str, LogService]:
        """The log services in use, by name."""
        return {service.name: service for service in self._services}

    def planned_path(self) -> Path:
        """Return the path of the metrics: the one that `write` wrote, or the next free one."""
        return self._json_path(next(self._free_folders()) if self._claimed is None else self._claimed)

    def write(self) -> Path:
        """Write metrics, summary and entries of artifacts, and return the path of the metrics.

        Raises:
            OSError: If they cannot be written.
        """
        folder = self.claim_folder()
        path = self._json_path(folder)
        replace_text(path, _to_json(self.metrics), self._disk)
        if self.summary:
            replace_text(folder / "summary.json", _to_json(self.summary), self._disk)
        if self.artifacts:
            replace_text(folder / "artifacts.json", _to_json(self.artifacts), self._disk)
        return path

    def close(self) -> None:
        """Close console and services; remove the folder of the evaluation if nothing is in it."""
        self._console.close()
        for service in self._services:
            self._guard.guard(service.name, service.close)()
        self._guard.report_failures()
        if self._claimed is not None:
            with suppress(OSError):  # it holds files
                self._disk.remove_directory(self._claimed)

    def claim_folder(self) -> Path:
        """Return the folder of this evaluation, which `mkdir` gives to one process only; it is made at the first call.

        Raises:
            OSError: If it cannot be made.
        """
        if self._claimed is None:
            make_directories(self._folder, self._disk)
            for folder in self._free_folders():
                with suppress(FileExistsError):
                    self._disk.make_directory(folder)
                    self._claimed = folder
                    return folder
        assert self._claimed is not None  # noqa: S101  # for mypy: there are infinitely many names
        return self._claimed

    def _free_folders(self) -> Iterator[Path]:
        names = (self._name if number == 1 else f"{self._name}.{number}" for number in count(1))
        folders = (self._folder / name for name in names)
        return (each for each in folders if not (each.exists() or self._json_path(each).exists()))

    def _json_path(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.json")

    def _add_metrics(self, effect: LogScalars, _state: TrainState, _event: Event) -> None:
        for key, value in effect.values.items():
            self.metrics.setdefault(key, to_plain(value))

    def _add_summary(self, effect: SetSummary, _state: TrainState, _event: Event) -> None:
        self.summary |= {key: to_plain(value) for key, value in effect.values.items()}

    def _add_artifact(self, artifact: EncodedArtifact, _state: TrainState, _event: Event) -> None:
        self.artifacts[artifact.key] = write_artifact(artifact, self.claim_folder(), self._disk)

    def _save_tensors(self, effect: SaveTensors, _state: TrainState, _event: Event) -> None:
        path = self.claim_folder() / "tensors" / f"{escape_path(effect.name)}.safetensors"
        make_directories(path.parent, self._disk)
        replace_file(path, tensor_pieces(effect.tensors), self._disk)


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
