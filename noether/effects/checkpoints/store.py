"""The checkpoints of a run on disk: one immutable directory each, committed by a rename; saves, resumes and prunes."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import chain, count
from typing import TYPE_CHECKING

from noether.core.errors import WeightsError
from noether.core.event import AfterTraining, AfterUpdate, kind_of
from noether.effects.checkpoints.contents import ModelNamesError, checkpoint_files
from noether.effects.checkpoints.file_names import requested_files
from noether.effects.checkpoints.joint_saves import ALONE, JointSaves, has_shards
from noether.effects.checkpoints.listing import CheckpointError, Listing
from noether.effects.checkpoints.manifest import END, NAME, Manifest, Part, recorded_saves
from noether.effects.checkpoints.pointers import Pointers
from noether.effects.checkpoints.pruning import Pruner
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.checkpoints.retention import is_resumable
from noether.effects.checkpoints.reuse import covers, covers_end, differs_only_in_end, same_content, same_weights
from noether.effects.checkpoints.writer import Writer
from noether.effects.disk.calls import DISK
from noether.effects.logs.jsonl import LogCount

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from noether.core.effect import SaveCheckpoint
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.effects.checkpoints.joint_saves import SavingRanks
    from noether.effects.disk.calls import Disk


class CheckpointStore(CheckpointReader):
    """The checkpoints of one run.

    A save writes a new directory under a name that readers ignore, calls fsync on each file, and renames the
    directory to its tag; once that name is on the disk, too, the checkpoint is saved. Then it moves pointers, small
    files that name a tag, each replaced in one step. Last, it removes the checkpoints that no rule of retention keeps.
    One moment is saved once: a later event of the same iteration whose request an existing checkpoint meets only moves
    pointers. A checkpoint to resume from records all saves of its event, and `complete` carries out what a crash or an
    error left open.

    Args:
        directory: Where the checkpoints are; the first save creates it, in an existing directory.
        run_id: Name of the run.
        disk: The disk.
        ranks: The ranks of the run. Rank 0 saves; all write their parts of a state with shards.
    """

    def __init__(self, directory: Path, run_id: str, disk: Disk = DISK, ranks: SavingRanks = ALONE) -> None:
        super().__init__(directory, disk)
        self._run_id = run_id
        self._writer = Writer(directory, disk)
        self._joint = JointSaves(ranks, self._writer)
        listing = self._list()
        # The number of a segment is never used twice, and a damaged checkpoint may belong to a later segment.
        self._segment = 1 + max((each.segment for each in listing.manifests), default=0) + len(listing.damaged)
        self._parent: str | None = None
        self._committed: set[str] = set()  # tags that this process saved
        self._pointers = Pointers(directory, self._writer)
        self._incomplete: dict[str, Manifest] = {}  # by tag: checkpoints of whose event a save failed
        self._pruner = Pruner(directory, self._writer)

    def save(
        self, effect: SaveCheckpoint, state: TrainState, event: Event, fsync_logs: Callable[[], LogCount] = LogCount
    ) -> None:
        """Save `state` as `effect` requests; the handler of `SaveCheckpoint`. The checkpoint is saved on return.

        Of several ranks, each calls it for a state with shards, and only rank 0 for any other state.

        Args:
            effect: The request.
            state: The state.
            event: The event at which the save is requested.
            fsync_logs: Called before the checkpoint is committed: writes the log up to here to the disk, and returns
                how many lines it has.

        Raises:
            CheckpointError: If the checkpoint could not be saved or a pointer not moved; no other checkpoint is harmed.
        """
        for role, names in (("tag", [effect.tag or str(state.iteration)]), ("pointer", effect.pointers)):
            for name in names:
                _check_name(role, name)
        if self._joint.rank == 0 or not self.needs_all_ranks(state):
            with self.lead(state):
                self._save(effect, state, event, fsync_logs)
        else:
            self._joint.follow(state)

    def lead(self, state: TrainState) -> AbstractContextManager[None]:
        """Return a block of rank 0 in which the other ranks, which call `save`, carry out its commands."""
        return self._joint.lead() if self.needs_all_ranks(state) else nullcontext()

    def needs_all_ranks(self, state: TrainState) -> bool:
        """Return whether all ranks have to save a state together, because it has shards."""
        return self._joint.are_several and has_shards(state)

    @property
    def has_lost_ranks(self) -> bool:
        """Whether an exchange with other ranks failed, so that no state with shards can be saved any more."""
        return self._joint.failure is not None

    def _save(
        self, effect: SaveCheckpoint, state: TrainState, event: Event, fsync_logs: Callable[[], LogCount]
    ) -> None:
        self._retry_failed()
        listing = self._list()
        kind = kind_of(type(event))
        existing = self._find_saved(listing.manifests, effect, state, kind)
        saved = existing or self._write(self._draft(effect, state.iteration, kind, listing), effect, state, fsync_logs)
        if existing is None:
            self._commit(saved)
        else:
            with suppress(OSError):  # of a checkpoint that was being removed; the next save tries again
                self._writer.remove_leftovers()
            self._pruner.add_owners(saved.tag, effect.retention)
        requests = recorded_saves(effect)
        self._pointers.claim(saved, [pointer for request in requests for pointer in request.pointers])
        self._finish(saved, requests, listing, lambda: state, at_end=kind is AfterTraining)
        if existing is not None and isinstance(event, AfterTraining):
            self._mark_ended(saved, effect, state, fsync_logs)

    def complete(self, manifest: Manifest) -> None:
        """Carry out what the event of a checkpoint requested and a crash or an error prevented.

        Saves of the event that do not exist are made from the state in the checkpoint, pointers are moved, and
        checkpoints that no rule of retention keeps are removed. Call it when a run resumes from the checkpoint.

        Raises:
            CheckpointError: If a save failed or a pointer could not be moved.
        """
        # The files of a name that another process created may be on the disk, and the name not.
        with self._writer.report_errors(f"{self._directory} could not be written"):
            self._writer.remove_leftovers()
            self._disk.fsync_directory(self._directory)
        self._pointers.recall(self.pointers())
        self._complete(manifest)

    def _complete(self, manifest: Manifest) -> None:
        listing = self._list()
        existing = {each.tag: each for each in listing.manifests}
        pointers = {pointer: existing[tag] for pointer, tag in manifest.pointers.items() if tag in existing}
        at_end = manifest.event == AfterTraining.__name__
        self._finish(manifest, manifest.requests, listing, lambda: self.load(manifest), pointers, at_end=at_end)

    def holds(self, state: TrainState) -> bool:
        """Return whether a run can resume at `state` or later: this process has a resumable checkpoint from there.

        Those are the checkpoints that this process wrote, and the one that it resumed from. No file of the checkpoint
        is read but its manifest. Wait for background saves before you ask: call `RunDirectory.wait`. For a state with
        shards every rank has to ask, and rank 0 answers.

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
        answer = self._holds(state)
        return self._joint.answer_of_rank_0("checkpoint of a state", answer) if self.needs_all_ranks(state) else answer

    def _holds(self, state: TrainState) -> bool:
        own, epoch, update = {*self._committed, self._parent}, state.iteration.epoch, state.iteration.update
        return any(
            manifest.resumable
            and manifest.tag in own
            and manifest.iteration.update >= update
            and manifest.iteration.epoch >= epoch
            for manifest in self.manifests()
        )

    def resume(self, manifest: Manifest) -> TrainState:
        """Return the state in a checkpoint; later saves name it as their parent, and keep it until one is resumable.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        state = self.load(manifest)
        self._parent = manifest.tag
        return state

    def recover(self) -> tuple[TrainState, Manifest] | None:
        """Return what `CheckpointReader.recover` returns; the checkpoint counts as resumed.

        Raises:
            CheckpointError: As `CheckpointReader.recover`.
        """
        found = super().recover()
        if found is not None:
            self._parent = found[1].tag
        return found

    def _find_saved(
        self, manifests: Sequence[Manifest], effect: SaveCheckpoint, state: TrainState, event: type[Event]
    ) -> Manifest | None:
        """Return the checkpoint in which this moment is already saved as `effect` requests, if there is one."""
        found = [saved for saved in reversed(manifests) if covers(saved, effect, state.iteration)]
        if event is AfterTraining:
            found += [each for each in reversed(manifests) if covers_end(each, effect, state.iteration)]
        return next((saved for saved in found if self._is_saved(saved, effect, state, event)), None)

    def _is_saved(self, saved: Manifest, effect: SaveCheckpoint, state: TrainState, event: type[Event]) -> bool:
        """Return whether a checkpoint of this iteration makes a save of `state` unnecessary."""
        # A checkpoint whose commit failed may be readable now and gone after a loss of power.
        if saved.tag in self._committed and saved.segment == self._segment and saved.event == event.__name__:
            return True
        if saved.tag in {*self._committed, self._parent}:
            if event is AfterTraining:  # a run that resumes before the end dispatches it again, so weights are enough
                return same_weights(saved, effect, state, self._joint.hash_files)
            # Saved again when interrupted.
            return event is AfterUpdate and same_content(saved, effect, state, self._joint.hash_files)
        # A process that was killed before it saved the checkpoint to resume from left it.
        left = saved.segment < self._segment and not saved.resumable
        return left and same_content(saved, effect, state, self._joint.hash_files) and self._is_intact(saved)

    def _is_intact(self, manifest: Manifest) -> bool:
        """Return whether all files of a checkpoint of another process are intact; its name is then on the disk."""
        try:
            for name, part in manifest.parts.items():
                self._read_verified(manifest.tag, name, part)
            self._disk.fsync_directory(self._directory)
        except (CheckpointError, OSError):
            return False
        self._committed.add(manifest.tag)
        return True

    def _draft(
        self, effect: SaveCheckpoint, iteration: TrainingIteration, event: type[Event], listing: Listing
    ) -> Manifest:
        """Return the manifest of a new checkpoint: its tag is the requested one, or `TAG.end`, `TAG.2`, ..."""
        tag = effect.tag or str(iteration)
        copies = ((tag if number == 1 else f"{tag}.{number}", number) for number in count(1))
        whole = is_resumable(requested_files(effect), effect.models, effect.weights_of)
        parts = [each.tag for each in listing.manifests if each.iteration == iteration and not each.resumable]
        of_end = event is AfterTraining and whole and tag == str(iteration) and tag in parts
        candidates = chain([(f"{tag}{END}", 1)] if of_end else [], copies)
        try:
            free, number = next(each for each in candidates if self._disk.kind(self._directory / each[0]) is None)
        except OSError as error:
            raise CheckpointError(f"{self._directory} cannot be written to: {error}") from error
        draft = Manifest(
            tag=free,
            run_id=self._run_id,
            segment=self._segment,
            parent=self._parent,
            iteration=iteration,
            event=event.__name__,
            parts=dict.fromkeys(requested_files(effect), Part(size_bytes=0, sha256="")),
            number=number,
            weights_of=effect.weights_of,
            models=effect.models if effect.weights else (),
            retention=dict(effect.retention),
        )
        if not draft.resumable:
            return draft
        failed = {pointer: each.tag for pointer, each in self._pointers.failed.items()}
        return replace(draft, requests=recorded_saves(effect), pointers=failed)

    def _write(
        self, draft: Manifest, effect: SaveCheckpoint, state: TrainState, fsync_logs: Callable[[], LogCount]
    ) -> Manifest:
        """Write the files of a checkpoint, fsync the logs, and return the complete manifest."""
        with self._writer.report_errors(f"checkpoint {self._directory / draft.tag} could not be written"):
            try:
                files = checkpoint_files(effect, state, 0, self._joint.world_size)
            except ModelNamesError as error:
                raise CheckpointError(str(error)) from error
            self._writer.begin(draft.tag)
            written = self._joint.write(draft.tag, effect, files)
            log = fsync_logs()
        parts = {name: Part(size_bytes=size_bytes, sha256=sha256) for name, (size_bytes, sha256) in written.items()}
        return replace(draft.with_parts(parts), log_lines=log.lines, log_lines_lost=log.lost)

    def _commit(self, saved: Manifest) -> None:
        with self._writer.report_errors(f"checkpoint {self._directory / saved.tag} could not be written"):
            self._writer.commit(saved)
        self._committed.add(saved.tag)

    def _finish(
        self,
        saved: Manifest,
        requests: Sequence[SaveCheckpoint],
        listing: Listing,
        load_state: Callable[[], TrainState],
        pointers: Mapping[str, Manifest] | None = None,
        *,
        at_end: bool,
    ) -> None:
        """Do what remains of an event once one of its checkpoints is on the disk: other saves, pointers, retention.

        Args:
            saved: The checkpoint.
            requests: The saves of the event that have to exist.
            listing: The directory before the save.
            load_state: Returns the state, for saves that do not exist yet.
            pointers: Checkpoints by name of further pointers to set to them.
            at_end: Whether the event is the end of training.
        """
        existing = {each.tag: each for each in (*listing.manifests, saved)}
        targets, errors = dict(pointers or {}), []
        if pointers:
            self._pointers.move(saved, pointers)
        for index, request in enumerate(requests, 1):
            try:
                found = self._find_of_event([*existing.values()], saved, request, at_end=at_end)
                found = found or self._save_beside(saved, request, load_state())
                existing[found.tag] = found
                moved = dict.fromkeys(request.pointers, found)
                self._pointers.move(saved, moved)
                targets.update(moved)
            except CheckpointError as error:
                errors.append(error)
            if not errors:
                self._pruner.prune(
                    existing,
                    listing,
                    targets=targets,
                    failed=self._pointers.failed,
                    intact={*self._committed, saved.tag, self._parent},
                    later=requests[index:],
                    at=saved.iteration,
                )
        self._incomplete.pop(saved.tag, None)
        if errors:
            self._incomplete[saved.tag] = saved
            raise errors[0]

    def _find_of_event(
        self, manifests: Sequence[Manifest], saved: Manifest, request: SaveCheckpoint, *, at_end: bool
    ) -> Manifest | None:
        """Return the checkpoint that a request made at the event of `saved`, if it exists."""
        own = [each for each in reversed(manifests) if each.segment == saved.segment or each.tag in self._committed]
        found = [each for each in own if covers(each, request, saved.iteration)]
        if at_end:
            found += [each for each in own if covers_end(each, request, saved.iteration)]
        return next(iter(found), None)

    def _save_beside(self, saved: Manifest, request: SaveCheckpoint, state: TrainState) -> Manifest:
        """Save the state of a checkpoint once more, as another request of its event asks for, unless that exists."""
        listing = self._list()
        if (found := self._find_saved(listing.manifests, request, state, AfterUpdate)) is not None:
            return found
        kind = AfterTraining if saved.event == AfterTraining.__name__ else AfterUpdate
        draft = self._draft(request, saved.iteration, kind, listing)
        draft = replace(draft, run_id=saved.run_id, segment=saved.segment, parent=saved.parent, event=saved.event)
        if draft.resumable:
            draft = replace(draft, requests=saved.requests, pointers=saved.pointers)
        try:
            written = self._write(draft, request, state, lambda: LogCount(saved.log_lines, saved.log_lines_lost))
        except WeightsError as error:
            raise CheckpointError(str(error)) from error
        self._commit(written)
        return written

    def _retry_failed(self) -> None:
        """Try again what failed in earlier saves; what fails again is tried at the next save."""
        if not self._incomplete and not self._pointers.failed:
            return
        existing = {each.tag for each in self.manifests()}
        self._incomplete = {tag: each for tag, each in self._incomplete.items() if tag in existing}
        with suppress(CheckpointError):
            for saved in [*self._incomplete.values()]:
                self._complete(saved)
        with suppress(CheckpointError):
            self._pointers.retry(existing)

    def _mark_ended(
        self, saved: Manifest, effect: SaveCheckpoint, state: TrainState, fsync_logs: Callable[[], LogCount]
    ) -> None:
        """Record that the run ended at a checkpoint, if all else in it is as in `state` and the event is complete.

        Otherwise a resumed run dispatches `AfterTraining` again.
        """
        if saved.resumable and differs_only_in_end(saved, effect, state, self._joint.hash_files):
            with self._writer.report_errors(f"the end of the run could not be recorded in {self._directory}"):
                fsync_logs()
                self._writer.mark_ended(saved)


def _check_name(role: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise CheckpointError(
            f"{role} {name!r} is not a valid name: use up to 200 letters, digits and '_.=%-', and start with a letter, "
            "a digit or '_'"
        )
