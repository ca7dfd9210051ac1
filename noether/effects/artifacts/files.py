"""Files of artifacts, named by their content, and the handlers that write an artifact to all its destinations."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from noether.core.artifacts import ARTIFACTS
from noether.core.effect import LogText
from noether.effects.artifacts.encoding import close_figure, encode_artifact
from noether.effects.disk.files import make_directories, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.artifacts.encoding import EncodedArtifact
    from noether.effects.disk.calls import Disk
    from noether.effects.interpreter import Handler

    WriteArtifact = Callable[[EncodedArtifact, TrainState, Event], None]

FOLDER: Final = "artifacts"


class Guard(Protocol):
    """Wraps a function so that its errors are reported under a name and not raised, as `LogGuard.guard` does."""

    def __call__(self, name: str, write: Callable[..., None], /) -> Callable[..., None]:
        """Return the wrapped function."""


def write_artifact(artifact: EncodedArtifact, folder: Path, disk: Disk) -> dict[str, Any]:
    """Write the file of an artifact below `artifacts/` unless it exists; return the entry of the log that names it.

    The file is on the disk once this returns, whole and under its name, so a line of a log may name it.

    Args:
        artifact: The artifact.
        folder: The directory of the run, or of an evaluation.
        disk: The disk.

    Raises:
        OSError: If it cannot be written.
    """
    digest = hashlib.sha256(artifact.content).hexdigest()
    name = f"{FOLDER}/{digest[:2]}/{digest}{artifact.suffix}"
    path = folder / name
    if disk.kind(path) is None:
        make_directories(path.parent, disk, within=folder)
        replace_file(path, [artifact.content], disk)
    entry = {"kind": artifact.kind, "file": name, "bytes": len(artifact.content), "caption": artifact.caption}
    return {**entry, "name": artifact.name} if artifact.name else entry


def artifact_handlers(
    texts: Sequence[Handler], guard: Guard, writes: Sequence[tuple[str, WriteArtifact]]
) -> dict[type[Effect], list[Handler]]:
    """Return the handlers of all artifacts, and of `LogText`.

    An artifact is encoded once for all destinations. If one destination fails, the others still get it.

    Args:
        texts: Handlers of a text without a key.
        guard: Reports errors instead of raising them.
        writes: Functions that write an artifact, each with the name of its destination.
    """
    destinations = [guard(name, write) for name, write in writes]

    def write(effect: Any, state: TrainState, event: Event) -> None:
        artifact = encode_artifact(effect)
        for each in destinations:
            each(artifact, state, event)

    def write_all(effect: Any, state: TrainState, event: Event) -> None:
        guard(f"the artifact {effect.key!r}", write)(effect, state, event)
        close_figure(effect)

    def write_text(effect: LogText, state: TrainState, event: Event) -> None:
        for handle in [write_all] if effect.key else texts:
            handle(effect, state, event)

    return {LogText: [write_text], **{kind: [write_all] for kind in ARTIFACTS}}


@final
class ArtifactFiles:
    """Writes artifacts below the directory of a run, and an entry for each to a log.

    A crash between the two leaves a file that no log names. It stays on the disk, and the resumed run uses it when it
    logs the same content again.

    Args:
        folder: The directory of the run.
        check_location: Raises `RunMovedError` if the directory was moved, so that no new one is made at the old path.
        log: `(entries, state, event)`: writes a line with the entries by key.
        disk: The disk.
    """

    def __init__(
        self,
        folder: Path,
        check_location: Callable[[], None],
        log: Callable[[dict[str, Any], TrainState, Event], None],
        disk: Disk,
    ) -> None:
        self._folder, self._check_location, self._log, self._disk = folder, check_location, log, disk

    def write(self, artifact: EncodedArtifact, state: TrainState, event: Event) -> None:
        """Write the file, and then the line that names it.

        Raises:
            OSError: If one cannot be written.
        """
        self._check_location()
        self._log({artifact.key: write_artifact(artifact, self._folder, self._disk)}, state, event)
