"""When a checkpoint is written: at once, or in a thread of its own while training goes on."""

from __future__ import annotations

import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, final

from noether.core.tensors.donation import lease
from noether.core.tensors.tree import clone_tensors
from noether.effects.checkpoints.listing import CheckpointError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from noether.core.effect import SaveCheckpoint
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.effects.checkpoints.store import CheckpointStore
    from noether.effects.run_logs import RunLogs

    OnError = Literal["stop", "warn"]

_LOGGER: Final = logging.getLogger(__name__)


@final
class Saver:
    """Carries out `SaveCheckpoint`.

    The saves of one event are written one after the other, and the next event that saves waits for them: no more than
    one older state is kept in memory.

    Args:
        store: Where checkpoints go.
        logs: The logs of the run, whose lines up to a checkpoint are written to the disk before it is committed.
        asynchronous: Whether they are written in a thread of their own. A state is never written to, so nothing is
            copied for that, and one that is to be donated is leased.
        borrowed: Whether states view live tensors, as those of `TrainState.from_module` do; what is then written in a
            thread of its own is copied first.
        on_error: What a save that fails does: `stop` raises, in a thread of its own at the next event; `warn` goes on.
    """

    def __init__(
        self,
        store: CheckpointStore,
        logs: RunLogs,
        *,
        asynchronous: bool = False,
        borrowed: bool = True,
        on_error: OnError = "stop",
    ) -> None:
        self._store = store
        self._logs = logs
        self._copies = borrowed
        self._on_error = on_error
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="noether-save") if asynchronous else None
        self._running: list[Future[None]] = []
        self._asked: tuple[Event, TrainingIteration] | None = None  # by the saves that are under way
        # Python waits for the thread when it exits, and nobody would learn what went wrong there.
        weakref.finalize(self, _tell, self._running)

    def save(self, effect: SaveCheckpoint, state: TrainState, event: Event) -> None:
        """Save, or begin to: the handler of `SaveCheckpoint`.

        Raises:
            CheckpointError: If it failed, or an earlier one did, and errors stop.
        """
        logged = partial(self._logs.fsync, self._logs.flush())
        if self._worker is None:
            self._write(effect, state, event, logged)
            return
        # Events may be equal, or one object: a loop of one's own may dispatch the same again and again.
        if self._asked is None or self._asked[0] is not event or self._asked[1] != state.iteration:
            self.wait()
        self._asked = (event, state.iteration)
        kept = _own(state) if self._copies else lease(state)
        self._running.append(self._worker.submit(self._write, effect, kept, event, logged))

    def check(self) -> None:
        """Raise what went wrong in a save that has ended; called at every event.

        Raises:
            CheckpointError: If a save failed, and errors stop.
        """
        while self._running and self._running[0].done():
            self._running.pop(0).result()

    def wait(self) -> None:
        """Return once no save is under way.

        Raises:
            CheckpointError: If one failed, and errors stop.
        """
        while self._running:
            self._running.pop(0).result()
        self._asked = None

    def _write(self, effect: SaveCheckpoint, state: TrainState, event: Event, logged: Any) -> None:
        try:
            self._store.save(effect, state, event, logged)
        except CheckpointError as error:
            if self._on_error == "stop":
                raise
            _LOGGER.warning("%s; training goes on without it", error)


def _own(state: TrainState) -> TrainState:
    """Return a state that shares no tensors with live objects."""
    trees = ("params", "buffers", "opt_state", "hyperparams", "callback_states")
    return state.replace(**{name: clone_tensors(getattr(state, name)) for name in trees})


def _tell(running: list[Future[None]]) -> None:
    for future in running:
        if (error := future.exception()) is not None:
            _LOGGER.error("%s", error)
