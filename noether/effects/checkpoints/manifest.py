"""The manifest of a checkpoint: a JSON file with the hash of every other file and of itself."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from noether.core.effect import SaveCheckpoint
from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration  # noqa: TC001  # cattrs reads the annotation
from noether.effects.checkpoints.converter import CONVERTER, error_text
from noether.effects.checkpoints.file_names import FILES, file_of, shard_names
from noether.effects.checkpoints.retention import is_resumable

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT: Final = 4
"""The latest format, that of sharded checkpoints; others have the format before, which earlier versions read."""
_FORMAT_WITHOUT_SHARDS: Final = 3
_ADDED_IN_FORMAT_3: Final = ("requests", "pointers")
MAX_BYTES: Final = 1 << 24
"""Largest size of a manifest, which lists three files for each rank and the saves of one event."""
NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=%\-]{0,199}", re.ASCII)
"""The names of checkpoints and pointers; none is a path to another directory."""
END: Final = ".end"
RUN_STATE_SUFFIXES: Final = ("", ".latest", END)
"""Ends of the tags under which a run saves its state: `TAG`, `TAG.latest` and `TAG.end` differ in retention only."""
NEWEST_TAG: Final = re.compile(r"E\d+_U\d+_S\d+\.latest", re.ASCII)
"""The tags of newest checkpoints."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)

# A request is recorded without the list of all requests, of which it is a part.
_OMIT: Final = override(omit=True)
CONVERTER.register_unstructure_hook(
    SaveCheckpoint, make_dict_unstructure_fn(SaveCheckpoint, CONVERTER, event_saves=_OMIT)
)
CONVERTER.register_structure_hook(
    SaveCheckpoint,
    make_dict_structure_fn(SaveCheckpoint, CONVERTER, _cattrs_forbid_extra_keys=True, event_saves=_OMIT),
)


class ManifestError(NoetherError, ValueError):
    """A manifest does not have the content that was written."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Size and SHA-256, in hexadecimal, of one file of a checkpoint."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of one checkpoint.

    Args:
        tag: Name of the checkpoint's directory.
        run_id: Name of the run that wrote it.
        segment: How many times the run had been started when it wrote the checkpoint, >= 1.
        parent: Tag of the checkpoint from which that segment resumed, or None.
        iteration: Iteration of the saved state.
        event: Name of the event at which it was saved.
        parts: Its other files by name.
        number: The n in a tag like `TAG.n`, for which `TAG` was already in use; 1 for `TAG` itself.
        weights_of: Whose weights it holds, such as `ema=0.999`; None stands for the training weights.
        models: Names of the sub-modules whose weights it holds; empty stands for all.
        retention: How many of the newest checkpoints stay, by name of the owner that requested it; None stands for all.
        log_lines: How many lines of the log were on the disk before the commit; None if unknown.
        log_lines_lost: How many earlier lines could not be written.
        requests: Of a checkpoint to resume from: all saves that its event requested, this one included.
        pointers: Tag by name of the pointers that earlier saves of the process failed to set.
        format: Version of the format, 1 to 4.
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
    requests: tuple[SaveCheckpoint, ...] = ()
    pointers: dict[str, str] = field(default_factory=dict)
    format: int = _FORMAT_WITHOUT_SHARDS

    def with_parts(self, parts: Mapping[str, Part]) -> Manifest:
        """Return the manifest with these files, in the format that they need."""
        is_sharded = not FILES.issuperset(parts)
        return replace(self, parts=dict(parts), format=FORMAT if is_sharded else _FORMAT_WITHOUT_SHARDS)

    @property
    def files(self) -> set[str]:
        """The files that it has; shards count as the file of which they are parts."""
        return {file for name in self.parts if (file := file_of(name)) is not None}

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sort key of checkpoints, oldest first: segment, counters, then number."""
        return self.segment, self.iteration.update, self.iteration.epoch, self.number

    @property
    def slot(self) -> tuple[str, TrainingIteration, str | None]:
        """What it has in common with its copies: the name of the slot, the iteration, whose weights it holds."""
        tag = self.tag if self.number == 1 else self.tag.removesuffix(f".{self.number}")
        return name_of_slot(tag, self.iteration), self.iteration, self.weights_of

    @property
    def moment(self) -> tuple[object, ...]:
        """A key that all checkpoints of the run's state at one iteration share, and all copies of another one."""
        tag, iteration, weights_of = self.slot
        is_of_run = weights_of is None and tag in [f"{iteration}{suffix}" for suffix in RUN_STATE_SUFFIXES]
        return (iteration,) if is_of_run else self.slot

    @property
    def resumable(self) -> bool:
        """Whether a run can resume from it: it holds all training weights, the optimizer and the state."""
        return is_resumable(self.files, self.models, self.weights_of)

    @property
    def sha256(self) -> str:
        """The hash in its file, over all other content of the file."""
        return hashlib.sha256(_text(self._content()).encode()).hexdigest()

    def dumps(self) -> str:
        """Return the manifest as JSON text that includes its own hash."""
        return _text({**self._content(), "sha256": self.sha256})

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = CONVERTER.unstructure(self)
        later = () if self.format >= _FORMAT_WITHOUT_SHARDS else _ADDED_IN_FORMAT_3
        return {key: value for key, value in content.items() if key not in later}

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Return the manifest in JSON text.

        Raises:
            ManifestError: If the text is not exactly what `dumps` writes, is of a later format, or lists files that no
                checkpoint has.

        Example:
            >>> Manifest.loads('{"format": 5}')
            Traceback (most recent call last):
            noether.effects.checkpoints.manifest.ManifestError: it has format 5, which a later version writes; this
            version reads up to 4
        """
        written = _parse(text)
        version = written.get("format")
        if type(version) is not int or version < 1:
            raise ManifestError("it has no format")
        if version > FORMAT:
            raise ManifestError(
                f"it has format {version}, which a later version writes; this version reads up to {FORMAT}"
            )
        if version == 1:  # format 2 added the count of log lines, and the manifest's hash
            return _structure({**written, "log_lines": None, "log_lines_lost": 0})
        manifest = _structure({key: value for key, value in written.items() if key != "sha256"})
        if manifest.dumps() != text:
            raise ManifestError("its content is not what was written")
        return manifest


def name_of_slot(tag: str, iteration: TrainingIteration) -> str:
    """Return what the tags of copies have in common: `TAG` for `TAG.end`, the copy of `TAG` with the whole state.

    Example:
        >>> name_of_slot("E1_U2_S8.end", TrainingIteration(1, 2, 8)), name_of_slot("my.end", TrainingIteration(1, 2, 8))
        ('E1_U2_S8', 'my.end')
    """
    return str(iteration) if tag == f"{iteration}{END}" else tag


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ManifestError("its content is not what was written")
    return content


def recorded_saves(effect: SaveCheckpoint) -> tuple[SaveCheckpoint, ...]:
    """Return the saves of the event of a request as a manifest records them, without those whose names are invalid."""
    return tuple(
        replace(
            save,
            weights=bool(save.weights),
            optimizer=bool(save.optimizer),
            retention=dict(save.retention),
            event_saves=(),
        )
        for save in effect.event_saves or (effect,)
        if all(NAME.fullmatch(name) for name in (*save.pointers, *([] if save.tag is None else [save.tag])))
    )


def _structure(content: dict[str, Any]) -> Manifest:
    try:
        manifest = CONVERTER.structure(content, Manifest)
        names = {manifest.tag, *([] if manifest.parent is None else [manifest.parent])}
        names |= {*manifest.pointers, *manifest.pointers.values()}
        for save in manifest.requests:
            names |= {*save.pointers, *([] if save.tag is None else [save.tag])}
        counts = (
            *(part.size_bytes for part in manifest.parts.values()),
            *(manifest.segment, manifest.number, manifest.log_lines or 0, manifest.log_lines_lost),
            *(manifest.iteration.epoch, manifest.iteration.update, manifest.iteration.sample),
        )
        valid = (
            all(map(NAME.fullmatch, names))
            and all(_SHA256.fullmatch(part.sha256) for part in manifest.parts.values())
            and all(0 <= each < 2**63 for each in counts)
        )
    except Exception as error:  # noqa: BLE001  # a converter can fail in any way on a file that we did not write
        raise ManifestError(f"its content is not what was written: {error_text(error)}") from None
    if wrong := [name for name in manifest.parts if file_of(name) is None]:
        raise ManifestError(f"it lists files that no checkpoint has: {', '.join(map(repr, sorted(wrong)))}")
    _check_shards(manifest)
    if not valid:
        raise ManifestError("it contains an invalid name, number or hash")
    return manifest


def _check_shards(manifest: Manifest) -> None:
    try:
        shards = [name for file in FILES for name in shard_names(manifest.parts, file)]
    except ValueError as error:
        raise ManifestError(f"its shards are incomplete: {error}") from None
    if bool(shards) != (manifest.format >= FORMAT) or any(file_of(name) in manifest.parts for name in shards):
        raise ManifestError("its shards do not fit its format, or lie beside a whole file")
