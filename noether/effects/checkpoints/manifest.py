"""What a checkpoint is made of, told by a file that can tell when it is damaged itself."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Final

from attrs import field, frozen

from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration  # noqa: TC001  # cattrs reads the annotations
from noether.effects.checkpoints.contents import FILES
from noether.effects.checkpoints.retention import is_resumable
from noether.effects.checkpoints.state_codec import CONVERTER, error_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MANIFEST: Final = "MANIFEST.json"
FORMAT: Final = 2
LIMIT_BYTES: Final = 1 << 24
"""What a manifest can be large at most; it lists five files."""
NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=\-]{0,199}", re.ASCII)
"""What the names of checkpoints and of pointers are made of: never the way to another directory."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


class ManifestError(NoetherError, ValueError):
    """A manifest is not what was written."""


@frozen(kw_only=True)
class Part:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


@frozen(kw_only=True)
class Manifest:
    """What a checkpoint is made of.

    Args:
        tag: Name of its directory.
        run_id: Run that wrote it.
        segment: How many times the run had been started when it was written, >= 1.
        parent: Tag of the checkpoint from which that segment went on, or None.
        iteration: Where it was taken.
        event: Name of the event at which it was taken.
        number: The n in a tag like `TAG.n`, given where `TAG` was taken already; 1 without one.
        parts: Its files.
        weights_of: Whose weights it holds, such as `ema=0.999`; None stands for those in training.
        models: Names of the sub-modules whose weights it holds; empty stands for all.
        retention: By name of who asked for it, how many of the newest stay; None stands for all.
        log_lines: How many lines of the log were on the disk before it was committed; None where that is not known.
        log_lines_lost: How many lines up to it could not be written there.
        format: Version of the layout.
    """

    tag: str
    run_id: str
    segment: int
    parent: str | None
    iteration: TrainingIteration
    event: str
    parts: dict[str, Part]
    number: int = 1
    weights_of: str | None = None
    models: tuple[str, ...] = ()
    retention: dict[str, int | None]
    log_lines: int | None = None
    log_lines_lost: int = 0
    format: int = field(default=FORMAT)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """What checkpoints are ordered by: segment, then counters, then number among equals."""
        return self.segment, self.iteration.update, self.iteration.epoch, self.number

    @property
    def resumable(self) -> bool:
        """Whether a run can resume from it: it holds all training weights, the optimizer and the state."""
        return is_resumable(self.parts, self.models, self.weights_of)

    @property
    def sha256(self) -> str:
        """The hash that it has in its file, over everything else there."""
        return hashlib.sha256(_text(CONVERTER.unstructure(self)).encode()).hexdigest()

    def dumps(self) -> str:
        """Return the manifest as JSON text that holds its own hash."""
        return _text({**CONVERTER.unstructure(self), "sha256": self.sha256})

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Return the manifest in JSON text.

        Raises:
            ManifestError: If it is not exactly what was written, or of a later format, or names what no checkpoint has.

        Example:
            >>> Manifest.loads('{"format": 3}')
            Traceback (most recent call last):
            noether.effects.checkpoints.manifest.ManifestError: is of format 3, which a later version writes; this one
            reads up to 2
        """
        written = _parsed(text)
        version = written.get("format")
        if type(version) is not int or not 1 <= version <= FORMAT:
            later = f"is of format {version}, which a later version writes; this one reads up to {FORMAT}"
            raise ManifestError(later if type(version) is int and version > FORMAT else "has no format")
        own = {"sha256"} if version == FORMAT else set()
        manifest = _structured(_migrated({key: value for key, value in written.items() if key not in own}))
        # What an older version wrote has no hash; the hashes of its files are all that it can be judged by.
        if version == FORMAT and manifest.dumps() != text:
            raise ManifestError("its content is not what was written")
        return manifest


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ManifestError("is not what was written")
    return content


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an older format as the newest has it, but for `format`, which still tells what it was."""
    for migrate in _MIGRATIONS[int(content["format"]) - 1 :]:
        content = migrate(content)
    return content


def _from_1(content: dict[str, Any]) -> dict[str, Any]:
    """Format 2 counts the lines of the log, and has a hash of its own."""
    return {**content, "log_lines": None, "log_lines_lost": 0}


_MIGRATIONS: Final[tuple[Callable[[dict[str, Any]], dict[str, Any]], ...]] = (_from_1,)


def _structured(content: dict[str, Any]) -> Manifest:
    try:
        manifest = CONVERTER.structure(content, Manifest)
        names = {manifest.tag, *([] if manifest.parent is None else [manifest.parent])}
        hashes = all(_SHA256.fullmatch(part.sha256) for part in manifest.parts.values())
        right = all(map(NAME.fullmatch, names)) and hashes and all(0 <= count < 2**63 for count in _counts(manifest))
    except Exception as error:  # noqa: BLE001  # whatever a converter meets in what was not written by us
        raise ManifestError(f"is not what was written: {error_text(error)}") from None
    if not set(manifest.parts) <= FILES:
        foreign = ", ".join(map(repr, sorted(set(manifest.parts) - FILES)))
        raise ManifestError(f"names files that no checkpoint has: {foreign}")
    if not right:
        raise ManifestError("holds a name, a number or a hash that is none")
    return manifest


def _counts(manifest: Manifest) -> Iterator[int]:
    yield from (part.size_bytes for part in manifest.parts.values())
    yield from (manifest.segment, manifest.number, manifest.log_lines or 0, manifest.log_lines_lost)
    yield from (manifest.iteration.epoch, manifest.iteration.update, manifest.iteration.sample)
