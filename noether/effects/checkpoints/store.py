"""The checkpoints of a run on disk: one immutable directory each, committed by a rename, verified when read."""

from __future__ import annotations

import hashlib
import logging
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Final

from noether.core.errors import NoetherError, suggest
from noether.effects.checkpoints.contents import (
    ContentError,
    ModelNamesError,
    checkpoint_files,
    read_state,
    requested_files,
)
from noether.effects.checkpoints.listing import (
    CheckpointError,
    Listing,
    MissingTargetError,
    UnreadableError,
    UnsavableError,
    list_checkpoints,
    read_error,
)
from noether.effects.checkpoints.manifest import NAME, Manifest, Part
from noether.effects.checkpoints.retention import select_prunable
from noether.effects.checkpoints.state_codec import error_text
from noether.effects.checkpoints.writer import Writer
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import read_file
from noether.effects.logs.jsonl import LogCount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from noether.core.effect import SaveCheckpoint
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

_LOGGER: Final = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    A save writes a new directory under a name that readers ignore, calls fsync on each file, and renames the
    directory to its tag; once that name is on the disk, too, the checkpoint is saved. Then it moves pointers, small
    files that name a tag, each replaced in one step. Last, it removes the checkpoints that no rule of retention keeps.
    Every read is verified: a file is damaged if its size or hash is not the one in the manifest, and so is a manifest
    that is not exactly what was written.

    Args:
        directory: Where the checkpoints are; the first save creates it.
        run_id: Name of the run.
        disk: The disk.
    """

    def __init__(self, directory: Path, run_id: str, disk: Disk = DISK) -> None:
        self._directory = directory
        self._run_id = run_id
        self._disk = disk
        self._writer = Writer(directory, disk)
        listing = self._list()
        # The number of a segment is never used twice, and a damaged checkpoint may belong to a later segment.
        self._segment = 1 + max((each.segment for each in listing.manifests), default=0) + len(listing.damaged)
        self._parent: str | None = None
        self._committed: set[str] = set()  # tags that this process saved

    def save(
        self, effect: SaveCheckpoint, state: TrainState, event: Event, fsync_logs: Callable[[], LogCount] = LogCount
    ) -> None:
        """Save `state` as `effect` requests; the handler of `SaveCheckpoint`. The checkpoint is saved on return.

        Args:
            effect: The request.
            state: The state.
            event: The event at which the save is requested.
            fsync_logs: Called before the checkpoint is committed: writes the log up to here to the disk, and returns
                how many lines it has.

        Raises:
            CheckpointError: If the checkpoint could not be saved or a pointer not moved; no other checkpoint is harmed.
        """
        tag = effect.tag or str(state.iteration)
        _check_name("tag", tag)
        for pointer in effect.pointers:
            _check_name("pointer", pointer)
        listing = self._list()
        saved = self._find_saved(listing, tag, effect, state, event)
        if saved is None:
            saved = self._write(self._draft(tag, effect, state, event), effect, state, fsync_logs)
            self._commit(saved)
        self._move_pointers(saved, effect.pointers)
        self._prune(saved, effect.pointers, listing)

    def manifests(self) -> list[Manifest]:
        """Return the manifests of all checkpoints, oldest first; damaged ones are left out."""
        return self._list().manifests

    def pointers(self) -> dict[str, str]:
        """Return the tag that each pointer names; damaged pointers are left out."""
        return self._list().targets

    def find(self, name: str) -> Manifest:
        """Return the manifest of the checkpoint with this tag, or that this pointer names.

        Raises:
            CheckpointError: If it is damaged or does not exist; the message names those that exist.
        """
        listing = self._list()
        tag = listing.targets.get(name, name)
        for error in (listing.broken.get(name), listing.damaged.get(tag)):
            if error is not None:
                raise error
        manifests = {manifest.tag: manifest for manifest in listing.manifests}
        if tag not in manifests:
            known = [*listing.targets, *manifests]
            names = ", ".join(known) or "none"
            raise CheckpointError(
                f"no checkpoint {name!r} in {self._directory}; there are: {names}{suggest(name, known)}"
            )
        return manifests[tag]

    def newest(self) -> Manifest | None:
        """Return the manifest of the newest resumable checkpoint, or None; its files are not verified."""
        return next((manifest for manifest in reversed(self.manifests()) if manifest.resumable), None)

    def holds(self, state: TrainState) -> bool:
        """Return whether a run can resume at `state` or later: this process has a resumable checkpoint from there.

        Those are the checkpoints that this process wrote, and the one that it resumed from. No file of the checkpoint
        is read but its manifest. Wait for background saves before you ask: call `RunDirectory.wait`.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from noether import AfterUpdate, SaveCheckpoint, TrainState
            >>> state = TrainState().advance(samples=4)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     store = CheckpointStore(Path(folder), "run")
            ...     store.save(SaveCheckpoint(), state, AfterUpdate(samples=4))
            ...     store.holds(state), store.holds(state.advance(samples=4))
            (True, False)
        """
        own, epoch, update = {*self._committed, self._parent}, state.iteration.epoch, state.iteration.update
        return any(
            manifest.resumable
            and manifest.tag in own
            and manifest.iteration.update >= update
            and manifest.iteration.epoch >= epoch
            for manifest in self.manifests()
        )

    def load(self, manifest: Manifest) -> TrainState:
        """Return the state in a checkpoint, on the CPU; fields that were not saved have their defaults.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        files = {name: self._read_verified(manifest.tag, name, part) for name, part in manifest.parts.items()}
        try:
            return read_state(files, manifest.iteration)
        except ContentError as error:
            raise CheckpointError(f"{self._directory / manifest.tag} does not hold a state: {error}") from error

    def resume(self, manifest: Manifest) -> TrainState:
        """Return the state in a checkpoint; later saves name it as their parent and never remove it.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        state = self.load(manifest)
        self._parent = manifest.tag
        return state

    def recover(self) -> tuple[TrainState, Manifest] | None:
        """Return the newest intact state from which the run can resume, or None if nothing was ever saved.

        Damaged checkpoints are skipped with a warning. The checkpoint that is returned counts as resumed.

        Raises:
            CheckpointError: If the run can resume from none of its checkpoints, with a reason for each; or if a
                checkpoint that may be intact cannot be read, for lack of a permission or of memory.
        """
        listing = self._list()
        unreadable = [str(error) for error in listing.damaged.values() if isinstance(error, UnreadableError)]
        if unreadable:
            raise UnreadableError("\n".join(unreadable))
        damaged = list(listing.damaged.values())
        for manifest in reversed(listing.manifests):
            if not manifest.resumable:
                continue
            try:
                state = self.resume(manifest)
            except UnreadableError:
                raise
            except CheckpointError as error:
                damaged.append(error)
            else:
                for skipped in (*damaged, *listing.broken.values()):
                    _LOGGER.warning("%s; resuming from %s without it", skipped, manifest.tag)
                return state, manifest
        self._refuse_to_start_over(listing, damaged)
        return None

    def _list(self) -> Listing:
        return list_checkpoints(self._directory, self._disk)

    def _refuse_to_start_over(self, listing: Listing, damaged: list[CheckpointError]) -> None:
        """Raise the reasons why the run can resume from none of its checkpoints; do nothing if it has none."""
        partial = [
            f"{self._directory / each.tag} does not hold weights, optimizer and state of the whole model"
            for each in listing.manifests
            if not each.resumable
        ]
        removed = [error for error in listing.broken.values() if isinstance(error, MissingTargetError)]
        reasons = [*map(str, damaged), *partial, *map(str, removed)]
        if reasons:
            total = len(damaged) + len(partial)
            headline = f"the run cannot resume from any of the {total} checkpoints in {self._directory}:"
            raise CheckpointError("\n  ".join([headline, *reasons]))

    def _find_saved(
        self, listing: Listing, tag: str, effect: SaveCheckpoint, state: TrainState, event: Event
    ) -> Manifest | None:
        """Return the checkpoint in which this very event already saved all that `effect` requests, if there is one."""
        saved = next((manifest for manifest in listing.manifests if manifest.tag == tag), None)
        # A checkpoint whose commit failed may be readable now and gone after a loss of power.
        if saved is None or tag not in self._committed:
            return None
        now = (self._segment, state.iteration, type(event).__name__, effect.weights_of)
        same = (saved.segment, saved.iteration, saved.event, saved.weights_of) == now
        complete = requested_files(effect) <= set(saved.parts) and not saved.models and not effect.models
        return saved if same and complete else None

    def _draft(self, tag: str, effect: SaveCheckpoint, state: TrainState, event: Event) -> Manifest:
        """Return the manifest of a new checkpoint: its tag is `tag`, or the first of `tag.2`, ... that is free."""
        candidates = ((tag if number == 1 else f"{tag}.{number}", number) for number in count(1))
        try:
            free, number = next(each for each in candidates if self._disk.kind(self._directory / each[0]) is None)
        except OSError as error:
            raise CheckpointError(f"{self._directory} cannot be written to: {error}") from error
        return Manifest(
            tag=free,
            run_id=self._run_id,
            segment=self._segment,
            parent=self._parent,
            iteration=state.iteration,
            event=type(event).__name__,
            parts=dict.fromkeys(requested_files(effect), Part(size_bytes=0, sha256="")),
            number=number,
            weights_of=effect.weights_of,
            models=effect.models if effect.weights else (),
            retention=dict(effect.retention),
        )

    def _write(
        self, draft: Manifest, effect: SaveCheckpoint, state: TrainState, fsync_logs: Callable[[], LogCount]
    ) -> Manifest:
        """Write the files of a checkpoint, fsync the logs, and return the complete manifest."""
        with self._report_errors(f"checkpoint {self._directory / draft.tag} could not be written"):
            try:
                files = checkpoint_files(effect, state)
            except ModelNamesError as error:
                raise CheckpointError(str(error)) from error
            written = self._writer.write(draft, files)
            log = fsync_logs()
        return replace(written, log_lines=log.lines, log_lines_lost=log.lost)

    def _commit(self, saved: Manifest) -> None:
        with self._report_errors(f"checkpoint {self._directory / saved.tag} could not be written"):
            self._writer.commit(saved)
        self._committed.add(saved.tag)

    def _move_pointers(self, saved: Manifest, pointers: Iterable[str]) -> None:
        """Set every pointer to a checkpoint; if some fail, the others move before the first error is raised."""
        errors: list[CheckpointError] = []
        for pointer in pointers:
            try:
                with self._report_errors(f"the pointer {self._directory / pointer} could not be set to {saved.tag}"):
                    self._writer.move_pointer(pointer, saved)
            except CheckpointError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _prune(self, saved: Manifest, pointers: Iterable[str], listing: Listing) -> None:
        """Remove the checkpoints that no rule of retention keeps; a failure is only a warning.

        Args:
            saved: The checkpoint that was just saved.
            pointers: Names of the pointers that were just set to it.
            listing: The directory before that.
        """
        manifests = {manifest.tag: manifest for manifest in (*listing.manifests, saved)}.values()
        targets = {**listing.targets, **dict.fromkeys(pointers, saved.tag)}
        tags = select_prunable(manifests, targets, {*self._committed, saved.tag, self._parent}, self._parent)
        if not tags:
            return
        # The checkpoint that a broken pointer named is unknown, and must not be removed.
        reasons = "; ".join(str(error) for name, error in listing.broken.items() if name not in pointers)
        if not reasons:
            try:
                self._writer.prune(tags)
            except OSError as error:
                reasons = str(error)
        if reasons:
            _LOGGER.warning("checkpoints that retention would remove stay in %s: %s", self._directory, reasons)

    @contextmanager
    def _report_errors(self, failure: str) -> Iterator[None]:
        """Raise any error of a write as a `CheckpointError`, and remove temporary files, which may fill the disk."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            with suppress(OSError):  # the next save removes them
                self._writer.remove_leftovers()
            kind = UnsavableError if isinstance(error, TypeError) else CheckpointError
            reason = str(error) if isinstance(error, (OSError, NoetherError, TypeError)) else error_text(error)
            raise kind(f"{failure}: {reason}; earlier checkpoints are intact") from error

    def _read_verified(self, tag: str, name: str, part: Part) -> bytes:
        """Return the content of a file of a checkpoint after comparing it with its size and hash in the manifest."""
        path = self._directory / tag / name
        try:
            content = read_file(path, self._disk, limit=part.size_bytes)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (OSError, MemoryError) as error:
            raise read_error(path, error) from error
        if len(content) != part.size_bytes or hashlib.sha256(content).hexdigest() != part.sha256:
            raise CheckpointError(f"{path} is damaged: its content is not what was written")
        return content


def _check_name(role: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise CheckpointError(
            f"{role} {name!r} is not a valid name: use up to 200 letters, digits and '_.=-', and start with a letter, "
            "a digit or '_'"
        )
