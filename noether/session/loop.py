"""The batches of a whole run: epoch after epoch, from the saved position on, in an order that a resume finds again."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.reducer import LOOP_MEMORY
from noether.core.tensors.modes import describe_evaluation_mode
from noether.core.tensors.tree import FrozenDict
from noether.session.errors import SessionError
from noether.session.hidden_state import generators_of_model, hidden_state
from noether.session.loader import (
    batch_seeder,
    batches_per_epoch,
    compare_workers,
    count_batches_of_rank,
    has_exact_length,
    is_split_by_torch,
    seed_pass,
    set_epoch,
    warn_about_changes,
    warn_if_unrepeatable,
)
from noether.session.randomness import derive, derive_in_order, seed_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import Memory, TrainState
    from noether.session.session import Session

MEMORY: Final = LOOP_MEMORY
_NO_BATCH: Final[Any] = object()
_SLOW_S: Final = 10.0
_LOGGER: Final = logging.getLogger(__name__)


@final
class BatchLoop:
    """Yields the batches of a run, and knows the place of each in its epoch and update. Epochs may differ in length.

    It is also a member of the reducer: it remembers the accumulation, with which a resumed run has to continue.

    Args:
        session: Dispatches the events.
        loader: Yields the batches of an epoch, each time it is iterated.
        model: The model of the loop.
        accumulation: Micro-batches of an update.
        seed: The run's seed.
    """

    produces: tuple[str, ...] = ()

    def __init__(self, session: Session, loader: Any, model: nn.Module, accumulation: int, seed: int) -> None:
        warn_if_unrepeatable(loader)
        self.length: int | None = None
        """Batches of the current epoch, as the loader announces them."""
        self.accumulation = accumulation
        self._session, self._loader, self._seed = session, loader, seed
        self._drawn = 0  # batches of this epoch, the current one included
        self._seed_batch = batch_seeder(loader)
        self._epoch_of_loader: int | None = None
        self._batch: Any = _NO_BATCH
        self._is_last: bool | None = None  # None if unknown
        self._is_reported = True
        self._hidden: dict[str, Any] | None = None  # at the first batch of the epoch before
        self._watches_hidden = True  # until the user was warned
        self._generators = generators_of_model(model)
        self._model = model
        self._knows_mode = self._has_iterated = False
        ranks = session.ranks
        self._rank = (ranks.rank,) if ranks.rank else ()  # ranks draw different dropout, and rank 0 that of one process
        self._is_split = is_split_by_torch(loader)
        self._has_exact_length = has_exact_length(loader)

    @property
    def is_last(self) -> bool | None:
        """Whether the current batch is the last of its epoch; None if only reading on would tell."""
        return self._is_last

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the current update: fewer in the last update of an epoch that is not a multiple."""
        first = (self._drawn - 1) // self.accumulation * self.accumulation
        if self.length is None or self.length <= first:
            return self.accumulation
        return min(self.accumulation, self.length - first)

    @property
    def completes_update(self) -> bool:
        """Whether the current batch is the last micro-batch of its update."""
        return self._drawn % self.accumulation == 0 or bool(self._is_last)

    def prepare_epoch(self, epoch: int) -> None:
        """Move the loader to an epoch, and read the length that it announces."""
        if self._epoch_of_loader == epoch:
            return
        self._epoch_of_loader = epoch
        set_epoch(self._loader, epoch)
        self.length = batches_per_epoch(self._loader)

    def report(self) -> Any:
        """Return the current batch, once.

        Raises:
            SessionError: If there is no batch, or it was reported before.
        """
        if self._batch is _NO_BATCH:
            raise SessionError(
                "there is no batch to report: call update(losses) inside of `for batch in session.batches(loader):`"
            )
        if self._is_reported:
            raise SessionError(
                "the losses of this batch were reported before: call session.update(losses) once per batch; with "
                "accumulation=, call session.micro_batch(losses) once per batch and session.update() without losses"
            )
        self._is_reported = True
        return self._batch

    def check_update(self, micro_batches: int) -> None:
        """Refuse an update that does not end with the current batch.

        Raises:
            SessionError: If there was no micro-batch, or one is missing.
        """
        if micro_batches == 0 and self._is_reported:
            raise SessionError("session.update(...) was called twice: call it once per update")
        if micro_batches == 0:
            raise SessionError("update() does not know the losses of the batch: call session.update(losses)")
        if not self.completes_update:
            raise SessionError(
                f"the update has {micro_batches} of accumulation={self.accumulation} micro-batches: call "
                "session.micro_batch(losses) for each, and optimizer.step() and session.update() only "
                "`if session.completes_update:`"
            )

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:  # noqa: ARG002  # a callback takes both
        """Return the state as it is."""
        return state, ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:  # noqa: ARG002  # as for every callback
        """Return the accumulation, and the number of ranks if there are several."""
        ranks = self._session.ranks
        several = {"ranks": ranks.world_size} if ranks.are_several else {}
        return {MEMORY: FrozenDict(accumulation=self.accumulation, **several)}

    def _listens(self, event_type: type[Event]) -> bool:  # noqa: ARG002  # see `listens_to`
        return False

    def resume(self, state: TrainState) -> TrainState:
        """Return a saved state for this loop; refuse one that was made with another accumulation or another seed.

        Raises:
            SessionError: If it was.
        """
        at, memory = state.iteration, state.callback_states.get(MEMORY)
        if memory is None:
            raise SessionError(
                f"the saved run is at {at}, and no session.batches(...) made it: resume it where it was made"
            )
        if state.seed != self._seed:
            raise SessionError(
                f"the saved run has seed {state.seed}, and this session {self._seed}: pass the saved seed="
            )
        # Earlier versions remembered the batches here.
        counted = state.epoch_batches or memory.get("batches", 0)
        if memory["accumulation"] != self.accumulation:
            raise SessionError(
                f"the saved run is at {at}, {counted} batches into an epoch, with accumulation="
                f"{memory['accumulation']}, and this session has accumulation={self.accumulation}: pass what the run "
                "was begun with, or begin one in a new directory"
            )
        world_size = self._session.ranks.world_size
        if counted and memory.get("ranks", 1) != world_size:
            counted = count_batches_of_rank(state, self._loader, self.accumulation, world_size, memory.get("ranks", 1))
        return state.replace(epoch_batches=counted).remember(MEMORY, self.init(state)[MEMORY])

    def run(self) -> Iterator[Any]:
        """Yield the batches that are left of the run, and dispatch the ends of epochs and of training."""
        session = self._session
        with session.save_where_it_ends():
            try:
                # A run that was cut after its last update: only the loader knows whether that ended an epoch, too.
                is_undecided = session.is_over and not session.state.ended and session.state.epoch_batches > 0
                while is_undecided or not session.is_over:
                    yield from self._epoch(session.state)
                    session.end_epoch(cut_short=not self._is_last and session.is_over)
                    is_undecided = False
            finally:
                self._batch = _NO_BATCH
            session.end()

    def _epoch(self, state: TrainState) -> Iterator[Any]:
        """Yield the batches that are left of an epoch, while the run is not over."""
        session, epoch, counted = self._session, state.iteration.epoch, state.epoch_batches
        start_s = time.perf_counter()
        self._drawn, self._is_last = 0, None
        self.prepare_epoch(epoch)
        session.expect_updates(None if self.length is None else -(-self.length // self.accumulation))
        seed_pass(self._loader, self._seed, epoch)
        for batch, is_last in self._draw(self._iterate(), epoch):
            self._drawn += 1
            if self._drawn == 1 and self._watches_hidden:
                self._compare_hidden_state()
            self._is_last = is_last
            if self._drawn <= counted:
                if self._drawn == counted:
                    log_skipped(counted, epoch, time.perf_counter() - start_s)
                    session.stopwatch.read()
                    if session.is_over:
                        return
                continue
            self._batch, self._is_reported = batch, False
            seed = derive_in_order(self._seed, "step", self._drawn, before=(epoch,), after=self._rank)
            seed_all(seed, self._generators)
            session.batch_arrived()
            yield batch
            self._check_complete()
            if not session.pending_micro_batches:
                self._describe_mode()
            if session.is_over and not session.pending_micro_batches:
                return
        self._check_drawn(state)

    def _describe_mode(self) -> None:
        """Log once that the model is in evaluation mode, if it is."""
        if not self._knows_mode and (described := describe_evaluation_mode(self._model)) is not None:
            _LOGGER.warning(described)
        self._knows_mode = True

    def _check_drawn(self, start: TrainState) -> None:
        """Refuse an epoch without batches or samples; warn if it is shorter than in the saved run.

        Args:
            start: The state at the first batch that was drawn.
        """
        epoch, counted = start.iteration.epoch, start.epoch_batches
        if self._drawn == 0 or (self._drawn < counted and hasattr(self._loader, "__next__")):
            raise SessionError(
                f"the loader yielded {self._drawn} batches in epoch {epoch}, where {max(counted, 1)} or more are "
                "needed: pass an iterable that yields the same epochs each time it is iterated, not an iterator"
            )
        if counted == 0 and self._session.state.iteration.sample == start.iteration.sample:
            raise SessionError(f"no batch of epoch {epoch} has samples: check which samples the loader leaves out")
        if self._drawn < counted:
            _LOGGER.warning(
                "epoch %d has %d batches, but the saved run has already counted %d of it: the epoch ends here",
                epoch,
                self._drawn,
                counted,
            )

    def _compare_hidden_state(self) -> None:
        """Warn once if the loader differs from what it was at the first batch of the epoch before."""
        # At the first batch an `__iter__` that resets its object has done so.
        hidden = hidden_state(self._loader)
        if self._hidden is not None and warn_about_changes(self._hidden, hidden):
            self._watches_hidden = False
        self._hidden = hidden

    def _iterate(self) -> Iterator[Any]:
        """Return an iterator over an epoch; in the first one, workers that read the same samples are named."""
        iterator, is_first = iter(self._loader), not self._has_iterated
        self._has_iterated = True
        return compare_workers(self._loader, iterator) if is_first else iterator

    def _draw(self, iterator: Iterator[Any], epoch: int) -> Iterator[tuple[Any, bool | None]]:
        """Yield each batch, and whether it is the last of the epoch."""
        batches = self._draw_seeded(iterator, epoch)
        if self.accumulation == 1:
            for index, batch in enumerate(batches, 1):
                yield batch, None if self.length is None else index == self.length
            return
        # An update that is cut short by the end of the epoch has to be completed by its last micro-batch, and a stream
        # may end before or after the length that it announces.
        batch = next(batches, _NO_BATCH)
        while batch is not _NO_BATCH:
            following = next(batches, _NO_BATCH)
            yield batch, following is _NO_BATCH
            batch = following

    def _draw_seeded(self, iterator: Iterator[Any], epoch: int) -> Iterator[Any]:
        # A loader without workers draws its augmentations in this process, and a sampler its order.
        # Its order is the same on all ranks, unless DistributedSampler draws it: then augmentations may differ.
        index, rank = 0, self._rank if self._is_split else ()
        while True:
            self._session.stopwatch.wait_begins()
            if self._seed_batch is not None:
                self._seed_batch(derive(self._seed, "batch", epoch, index, *rank))
            batch = next(iterator, _NO_BATCH)
            if not self._has_exact_length:
                self._session.compare_batches(index, has_more=batch is not _NO_BATCH)
            if batch is _NO_BATCH:
                return
            index += 1
            yield batch

    def _check_complete(self) -> None:
        """Refuse to yield the next batch before the loop reported all of this one."""
        if not self._is_reported:
            raise SessionError(
                "the last batch was not reported: call session.update(losses) for every batch, after optimizer.step(); "
                "for a batch that the loop leaves out, session.update(losses, skipped=True); for one without samples, "
                "session.update({})"
            )
        if self._session.pending_micro_batches and self.completes_update:
            raise SessionError(
                "all micro-batches of the update were reported, and the update was not: call optimizer.step() and then "
                "session.update() `if session.completes_update:`"
            )
        self._session.check_scheduler_position()


def log_skipped(batches: int, epoch: int, duration_s: float) -> None:
    """Log how long a resumed run read batches that it had counted; a warning if that was long."""
    level = logging.WARNING if duration_s > _SLOW_S else logging.INFO
    _LOGGER.log(
        level,
        "skipped the %d batches of epoch %d that the saved run counts, in %.1f s; a checkpoint at the end of an epoch "
        "needs none",
        batches,
        epoch,
        duration_s,
    )
