"""Checkpoints on disk: one new directory each, committed by a rename, verified before it is believed."""

from __future__ import annotations

import hashlib
import logging
from itertools import count
from typing import TYPE_CHECKING, Final

from attrs import evolve

from noether.core.errors import suggest
from noether.effects.checkpoints.contents import ContentError, ModelNamesError, files_asked, files_of, state_in
from noether.effects.checkpoints.listing import CheckpointError, Listing, UnreadableError, list_checkpoints, refusal
from noether.effects.checkpoints.manifest import NAME, Manifest, Part
from noether.effects.checkpoints.retention import ORDER, Commit, Point, Prune, Step, Write, planned
from noether.effects.checkpoints.writer import Writer
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import read_file
from noether.effects.logs.jsonl import LogCount

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from noether.core.effect import SaveCheckpoint
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

_LOGGER: Final = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    A save writes a new directory under a name that no reader looks at, each file flushed to the disk, and renames it to
    its tag; once that name is on the disk, too, the checkpoint is saved. Pointers are small files that name a tag,
    replaced in one step after that. Last, what nobody keeps is removed. What is read is verified: a file whose size or
    hash is not the one in the manifest is damaged, and so is a manifest that is not exactly what was written.

    Args:
        directory: Where they lie; made at the first save.
        run_id: Name of the run.
        disk: The disk.
    """

    def __init__(self, directory: Path, run_id: str, disk: Disk = DISK) -> None:
        self._directory = directory
        self._run_id = run_id
        self._disk = disk
        self._writer = Writer(directory, disk)
        listing = self._listing()
        # What is damaged may be of a segment later than all others: its number is not to be used again.
        self._segment = 1 + max((each.segment for each in listing.manifests), default=0) + len(listing.damaged)
        self._parent: str | None = None
        self._committed: set[str] = set()  # tags that are known to be on the disk, whole

    def save(
        self, effect: SaveCheckpoint, state: TrainState, event: Event, logged: Callable[[], LogCount] = LogCount
    ) -> None:
        """Save `state` as `effect` asks: the handler of `SaveCheckpoint`. It is saved when this returns.

        Args:
            effect: What is asked.
            state: The state.
            event: The event at which it is asked.
            logged: Brings the log up to here to the disk before the checkpoint is committed, and counts its lines.

        Raises:
            CheckpointError: If it could not be saved, or a pointer not set; no other checkpoint is harmed by that.
        """
        wanted = effect.tag or str(state.iteration)
        for what, name in (("tag", wanted), *(("pointer", pointer) for pointer in effect.pointers)):
            if not NAME.fullmatch(name):
                raise CheckpointError(f"{what} {name!r}: a name is made of up to 200 letters, digits and '_.=-'")
        try:
            listing = self._listing()
            held = self._held(listing, wanted, effect, state, event)
            saved = held or self._draft(wanted, effect, state, event)
        except OSError as error:
            raise CheckpointError(f"{self._directory} cannot be written to: {error}") from error
        unsure = [why for pointer, why in listing.broken.items() if pointer not in effect.pointers]
        failed: list[tuple[Step, OSError]] = []
        for step in self._planned(saved, effect, listing, new=held is None):
            # What fails cancels the steps of every later kind.
            if any(ORDER.index(type(before)) < ORDER.index(type(step)) for before, _ in failed):
                continue
            try:
                if isinstance(step, Write):
                    saved = self._write(saved, effect, state, logged)
                else:
                    self._take(step, saved, unsure)
            except OSError as error:
                failed.append((step, error))
        self._report(failed)

    def manifests(self) -> list[Manifest]:
        """Return the manifests of all checkpoints, oldest first; those that cannot be read are left out."""
        return list(self._listing().manifests)

    def pointers(self) -> dict[str, str]:
        """Return the tag that each pointer names; those that are damaged are left out."""
        return self._listing().pointers

    def find(self, name: str) -> Manifest:
        """Return the manifest of the checkpoint with this tag, or that this pointer names.

        Raises:
            CheckpointError: If there is none, naming those that exist, or it is damaged.
        """
        listing = self._listing()
        tag = listing.pointers.get(name, name)
        for why in (listing.broken.get(name), listing.damaged.get(tag)):
            if why is not None:
                raise CheckpointError(why)
        found = {manifest.tag: manifest for manifest in listing.manifests}
        if tag not in found:
            known = [*listing.pointers, *found]
            there = f"there are: {', '.join(known) or 'none'}"
            raise CheckpointError(f"no checkpoint {name!r} in {self._directory}; {there}{suggest(name, known)}")
        return found[tag]

    def newest(self) -> Manifest | None:
        """Return the manifest of the newest checkpoint that says that it can be resumed, or None."""
        return next((manifest for manifest in reversed(self.manifests()) if manifest.resumable), None)

    def load(self, manifest: Manifest) -> TrainState:
        """Return the state in a checkpoint, on the CPU; what was not saved is as in a new state.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        files = {name: self._verified(manifest.tag, name, part) for name, part in manifest.parts.items()}
        try:
            return state_in(files, manifest.iteration)
        except ContentError as error:
            raise CheckpointError(f"{self._directory / manifest.tag} does not hold a state: {error}") from error

    def resume(self, manifest: Manifest) -> TrainState:
        """Return the state in a checkpoint; later saves name it as their parent, and it is never removed."""
        state = self.load(manifest)
        self._parent = manifest.tag
        return state

    def recover(self) -> tuple[TrainState, Manifest] | None:
        """Return the newest state from which the run can go on, or None if nothing was ever saved.

        Checkpoints that are damaged are told of and passed over; the one that is returned counts as resumed.

        Raises:
            CheckpointError: If there are checkpoints, and none that the run can go on from: each with its reason. And
                if one cannot be read that may be whole, for lack of a permission or of memory.
        """
        listing = self._listing()
        if listing.unreadable:
            raise UnreadableError("\n".join(listing.unreadable.values()))
        damaged = dict(listing.damaged)
        partial = {
            each.tag: f"{self._directory / each.tag} does not hold weights, optimizer and state of the whole model"
            for each in listing.manifests
            if not each.resumable
        }
        for manifest in reversed([each for each in listing.manifests if each.resumable]):
            try:
                state = self.resume(manifest)
            except UnreadableError:
                raise
            except CheckpointError as error:
                damaged[manifest.tag] = str(error)
            else:
                for why in (*damaged.values(), *listing.broken.values()):
                    _LOGGER.warning("%s; going on without it, at %s", why, manifest.tag)
                return state, manifest
        reasons = [*damaged.values(), *partial.values(), *listing.lost.values()]
        if reasons:
            none = (
                f"the run cannot go on from any of the {len(damaged) + len(partial)} checkpoints in {self._directory}"
            )
            raise CheckpointError("\n  ".join([f"{none}:", *reasons]))
        return None

    def _listing(self) -> Listing:
        return list_checkpoints(self._directory, self._disk)

    def _held(
        self, listing: Listing, tag: str, effect: SaveCheckpoint, state: TrainState, event: Event
    ) -> Manifest | None:
        """Return the checkpoint in which this very event already saved all that is asked, if it did."""
        held = next((manifest for manifest in listing.manifests if manifest.tag == tag), None)
        # One whose commit failed may be there to read, and gone after a loss of power.
        if held is None or tag not in self._committed:
            return None
        now = (self._segment, state.iteration, type(event).__name__, effect.weights_of)
        same = (held.segment, held.iteration, held.event, held.weights_of) == now
        whole = files_asked(effect) <= set(held.parts) and not held.models and not effect.models
        return held if same and whole else None

    def _draft(self, wanted: str, effect: SaveCheckpoint, state: TrainState, event: Event) -> Manifest:
        """Return the manifest of what is to be written under `wanted`, or the first of `wanted.2`, ... that is free."""
        candidates = ((wanted if number == 1 else f"{wanted}.{number}", number) for number in count(1))
        tag, number = next(each for each in candidates if self._disk.kind(self._directory / each[0]) is None)
        return Manifest(
            tag=tag,
            run_id=self._run_id,
            segment=self._segment,
            parent=self._parent,
            iteration=state.iteration,
            event=type(event).__name__,
            parts=dict.fromkeys(files_asked(effect), Part(size_bytes=0, sha256="")),
            number=number,
            weights_of=effect.weights_of,
            models=effect.models if effect.weights else (),
            retention=dict(effect.retention),
        )

    def _planned(self, saved: Manifest, effect: SaveCheckpoint, listing: Listing, *, new: bool) -> tuple[Step, ...]:
        pointed = {**listing.pointers, **dict.fromkeys(effect.pointers, saved.tag)}
        whole = {*self._committed, saved.tag, self._parent}
        return planned(saved, new, effect.pointers, listing.manifests, pointed, whole, self._parent)

    def _write(
        self, draft: Manifest, effect: SaveCheckpoint, state: TrainState, logged: Callable[[], LogCount]
    ) -> Manifest:
        try:
            written = self._writer.write(draft, files_of(effect, state))
        except ModelNamesError as error:
            raise CheckpointError(str(error)) from error
        log = logged()
        return evolve(written, log_lines=log.lines, log_lines_lost=log.lost)

    def _take(self, step: Step, saved: Manifest, unsure: list[str]) -> None:
        if isinstance(step, Commit):
            self._writer.commit(saved)
            self._committed.add(saved.tag)
        elif isinstance(step, Point):
            self._writer.point(step.pointer, saved)
        elif isinstance(step, Prune):
            if unsure:  # what these pointers name cannot be told, and must not be removed
                raise OSError("; ".join(unsure))
            self._writer.prune(step.tags)

    def _report(self, failed: list[tuple[Step, OSError]]) -> None:
        for step, error in failed:
            if isinstance(step, Prune):
                _LOGGER.warning("checkpoints that nobody keeps stay in %s: %s", self._directory, error)
                continue
            self._writer.give_up()
            what = f"checkpoint {self._directory / step.tag} could not be written"
            if isinstance(step, Point):
                what = f"the pointer {self._directory / step.pointer} could not be set to {step.tag}"
            raise CheckpointError(f"{what}: {error}; the checkpoints before it stay") from error

    def _verified(self, tag: str, name: str, part: Part) -> bytes:
        """Return what is in a file of a checkpoint, once it is seen to be what was written."""
        path = self._directory / tag / name
        try:
            content = read_file(path, self._disk, limit=part.size_bytes)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (OSError, MemoryError) as error:
            raise refusal(path, error) from error
        if len(content) != part.size_bytes or hashlib.sha256(content).hexdigest() != part.sha256:
            raise CheckpointError(f"{path} is damaged: its content is not what was written")
        return content
