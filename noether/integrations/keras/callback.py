"""noether's callbacks in `model.fit` of Keras 3, with torch as its backend.

The logs that Keras gives to `on_train_batch_end` are means since the epoch began. The loss of the batch itself is what
`model.compute_loss` returns, a method that Keras documents for overriding: while `fit` runs, the callback overrides it
on the model object, and listens. Names of params and buffers are in `noether.integrations.keras.module`.

| Keras | noether | with |
|---|---|---|
| `on_train_begin` | `BeforeTraining`, after it an `AfterEpoch` that is owed | `resumed` if its directory holds a checkpoint |
| `on_train_batch_begin` | | the time before it was spent waiting for data; `lr_scale` is multiplied into the learning rate |
| `model.compute_loss` in training | `AfterAccumulationStep`, if anybody listens | everything; but the gradients are not there yet |
| `on_train_batch_end` | | the learning rate is what it was |
| the same, once for each update | `AfterUpdate` | losses, outputs, samples, learning rate, weight decay, `duration_s`, `data_s`, `step_s` |
| `on_epoch_end` | `AfterEpoch` | once all updates of the epoch are counted |
| `on_train_end` | `AfterTraining` | at the end of the run, or where `state.stop` gives a reason |
| `state.stop` | `model.stop_training` | right after the event at which it was decided |

What is different from noether's own trainer:

- `losses` has one entry, `total`: the loss with all that Keras adds to it, such as regularization.
- With `gradient_accumulation_steps` Keras takes the plain mean over batches, whatever their sizes, and so does the loss
  of an update. It carries gradients over the end of an epoch: there is no short last group, and an epoch whose batches
  are not a multiple of these steps is refused.
- A learning rate is a number of 32 bits: 0.1 is logged as 0.10000000149011612.
- Keras does not tell how many samples an epoch has: give `Run(samples_per_epoch=..., effective_batch_size=...)` where a
  callback asks for it, as `ProgressCallback` does.
- `epochs` of `fit` is where the run ends, whatever was trained before: a run of three epochs is not made longer by another
  call with three, but by one with six.
- `fit` begins with the first batch of an epoch. A run that was cut in the middle of one goes on in two calls: with the
  batches that are left and `epochs` one more than the epochs that are completed, then with all; give
  `Run(end=..., updates_per_epoch=...)` then, for neither call tells them. The epoch to begin with is set by the
  callback, in place of `initial_epoch`.
- `shuffle=True` and dropout of torch modules draw from torch's global generator, which is in no checkpoint: a resume is
  exact where the order of data is a function of the epoch. Seeds of Keras' own dropout are buffers, and are saved.
- What Keras saves itself (`model.save`, `BackupAndRestore`) holds weights and optimizer. `callback.session.state_dict()` is
  what the run remembers beside them; a new callback takes it as `remembered=`.
- An update that a `LossScaleOptimizer` leaves out is not told from others. `grad_norm` is not there.
- A model with `jit_compile=True` is refused: nobody could listen inside of what is compiled.
"""  # noqa: E501  # a table

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.tensors.tree import FrozenDict
from noether.integrations.keras.backend import keras
from noether.integrations.keras.module import KerasModule
from noether.integrations.keras.optimizer import KerasOptimizer
from noether.session.session import Session
from noether.session.settings import fill_run
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects import RunDirectory

_CLOCK: Final = Clock()
_RUN: Final = Run()
_NOTHING: Final[Mapping[str, Any]] = FrozenDict()


@final
class NoetherCallback(keras.callbacks.Callback):  # type: ignore[misc]  # Keras is untyped
    """Runs noether's callbacks beside `model.fit`.

    Args:
        callbacks: One callback, or several in order.
        remembered: What `session.state_dict()` returned, to resume with a model that Keras itself has loaded.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: What callbacks evaluate, by dataset key, as batches of tensors.
        seed: Seeds the random numbers of callbacks.
        clock: Reads the time.
        run: Further facts about the run, which Keras does not know.

    Example:
        >>> import torch
        >>> from noether.core.callbacks import OnlineLossCallback
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        >>> show = lambda effects, state, event: print(state.iteration, *effects) if effects else None
        >>> callback = NoetherCallback(OnlineLossCallback(every_n_epochs=1), interpreter=show)
        >>> x, y = torch.zeros(8, 2), torch.zeros(8, 1)
        >>> _ = model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[callback])
        E1_U2_S8 LogScalars(values=FrozenDict({'loss/online/total/E1': tensor(..., dtype=torch.float64)}))
    """

    def __init__(
        self,
        callbacks: Callback | Sequence[Callback],
        *,
        remembered: Mapping[str, Any] = _NOTHING,
        directory: RunDirectory | None = None,
        interpreter: Callable[[Effects, TrainState, Event], None] | None = None,
        data: Mapping[str, Iterable[Any]] | None = None,
        seed: int = 0,
        clock: Clock = _CLOCK,
        run: Run = _RUN,
    ) -> None:
        super().__init__()
        self._run, self._remembered = run, remembered
        self._make_session = partial(
            Session, callbacks, directory=directory, interpreter=interpreter, data=data, seed=seed, clock=clock
        )
        self._session: Session | None = None
        self._optimizer: KerasOptimizer | None = None
        self._losses: list[Tensor] = []
        self._awaits_loss = False

    @property
    def session(self) -> Session:
        """The session beside the model.

        Raises:
            RuntimeError: If training has not begun.
        """
        if self._session is None:
            raise RuntimeError("the session begins with training: call model.fit(..., callbacks=[callback]) first")
        return self._session

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin the run, or go on with it.

        Raises:
            ValueError: If the model is compiled with `jit_compile=True`, or is not the one of before; if the batches of
                an epoch do not make whole updates, or are not those that are left of it; or if the optimizer is in the
                middle of an update.
        """
        if self.model.jit_compile:
            raise ValueError("nobody can listen inside of a compiled step: call model.compile(..., jit_compile=False)")
        session, optimizer = self._watched()
        if not optimizer.belongs_to(self.model):
            raise ValueError(
                "this callback watches another model or optimizer: give a new NoetherCallback, to go on with the run "
                "NoetherCallback(..., remembered=callback.session.state_dict())"
            )
        self._losses = []
        updates = _updates(self.params["steps"], optimizer.accumulation_steps)
        end = TrainingIteration(epoch=self.params["epochs"])
        session.load()
        optimizer.check_whole()
        _check_position(session.state, fill_run(session.run, end=end, updates_per_epoch=updates), updates)
        session.begin(end=end, updates_per_epoch=updates)
        self._listen()
        # As keras.callbacks.BackupAndRestore does; past the last epoch there is nothing to do.
        epoch = self.params["epochs"] if session.is_over else session.state.iteration.epoch
        self.model._initial_epoch = epoch or None  # noqa: SLF001

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Take the time, and scale the learning rate."""
        self.session.batch_arrived()
        self._watched()[1].batch_begins()
        self._awaits_loss = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Tell of an update.

        Raises:
            TypeError: If the model does not call `compute_loss`.
        """
        session, optimizer = self._watched()
        optimizer.batch_ended()
        if self._awaits_loss:
            raise TypeError(
                f"train_step of {self.model.name} does not call self.compute_loss(...), so what its loss was nobody "
                "knows: have it do so, and override compute_loss for a loss of its own"
            )
        if session.pending == optimizer.accumulation_steps:
            losses, self._losses = self._losses, []
            optimizer.steps += 1
            session.update(mean=sum(losses[1:], start=losses[0]) / len(losses))
        self._stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tell of the end of an epoch, if it is completed."""
        self.session.end_epoch(cut_short=self.model.stop_training)
        self._stop()

    def on_train_end(self, logs: Any = None) -> None:
        """Tell of the end of training, if the run is at its end."""
        self.model._initial_epoch = None  # noqa: SLF001  # or another call would begin there
        self.model.__dict__.pop("compute_loss", None)
        if self.session.is_over:
            self.session.end()
        else:
            self.session.close()

    def _watched(self) -> tuple[Session, KerasOptimizer]:
        """Return the run and the optimizer, made when the model is first there."""
        if self._session is None or self._optimizer is None:
            module = KerasModule(self.model)
            self._optimizer = KerasOptimizer(module)
            run = fill_run(self._run, forward=module.evaluate)
            self._session = self._make_session(run=run, model=module, optimizer=self._optimizer)
            if self._remembered:
                self._session.load_state_dict(self._remembered)
        return self._session, self._optimizer

    def _listen(self) -> None:
        """Override `compute_loss` on the model object."""
        self.model.__dict__.pop("compute_loss", None)  # of a call that an exception ended
        compute = self.model.compute_loss

        def compute_loss(x: Any = None, y: Any = None, y_pred: Any = None, *others: Any, **options: Any) -> Any:
            loss = compute(x, y, y_pred, *others, **options)
            if self._awaits_loss:  # and not that of an evaluation
                self._awaits_loss = False
                self._micro_batch(loss.detach(), x, y_pred)
            return loss

        self.model.compute_loss = compute_loss

    def _micro_batch(self, loss: Tensor, inputs: Any, outputs: Any) -> None:
        session, optimizer = self._watched()
        self._losses.append(loss)
        samples = session.run.batch_size(inputs)
        session.micro_batch(loss, outputs=outputs, samples=samples, of=optimizer.accumulation_steps)

    def _stop(self) -> None:
        if self.session.is_over:
            self.model.stop_training = True


def _updates(batches: int | None, accumulated: int) -> int | None:
    """Return how many updates so many batches make, None where nobody knows."""
    if batches is None:
        return None
    if batches % accumulated:
        raise ValueError(
            f"an epoch of {batches} batches is not made of whole updates of {accumulated}, and Keras would carry "
            "gradients over its end: choose gradient_accumulation_steps or batch_size so that it is"
        )
    return batches // accumulated


def _check_position(state: TrainState, run: Run, updates: int | None) -> None:
    """Refuse other batches than those that are left of the epoch."""
    at, per_epoch = state.iteration, getattr(run, "updates_per_epoch", None)
    if updates is None or per_epoch is None or state.stop is not None or at.reached(run.end):
        return
    left = per_epoch - at.update % per_epoch
    if left != updates:
        epochs = at.update // per_epoch + 1
        raise ValueError(
            f"the run goes on at {at}, where {left} of {per_epoch} updates are left of the epoch, and fit was given "
            f"{updates}: give it the batches that are left with epochs={epochs}, then all of them, and "
            "Run(end=..., updates_per_epoch=...)"
        )
