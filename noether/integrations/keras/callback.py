"""noether's callbacks in `model.fit` of Keras 3, with torch as its backend.

The logs that Keras passes to `on_train_batch_end` are means since the start of the epoch. The loss of one batch is the
result of `model.compute_loss`, a method that Keras documents for overriding: during `fit` the callback overrides it on
the model object and reads its result. `noether.integrations.keras.module` describes the names of params and buffers.

| Keras | noether | with |
|---|---|---|
| `on_train_begin` | `BeforeTraining`, then a missing `AfterEpoch` | `resumed` if its directory has a checkpoint |
| `on_epoch_begin` | | in a resumed run, restores the random generators, once |
| `on_train_batch_begin` | | ends the wait for data; multiplies the learning rate by `lr_scale` |
| `model.compute_loss` in training | `AfterAccumulationStep`, if a callback handles it | all its fields; no gradients are computed yet |
| `on_train_batch_end` | | restores the learning rate |
| the same, once for each update | `AfterUpdate` | losses, outputs, samples, learning rate, weight decay, `duration_s`, `data_s`, `step_s` |
| `on_epoch_end` | `AfterEpoch` | if all updates of the epoch are counted |
| `on_train_end` | `AfterTraining` | at the end of the run, or if `state.stop` gives a reason |
| `state.stop` | `model.stop_training` | right after the event that set it |

Differences from noether's trainer:

- `losses` has one entry, `total`: the loss with all terms that Keras adds, such as regularization.
- With `gradient_accumulation_steps` Keras takes the plain mean over batches of any size, and so does the loss of an
  update. Keras carries gradients over the end of an epoch, without a short last group; if the number of batches is not a
  multiple of these steps, epochs differ in length, and a run that resumes at the end of one does not have its gradients.
- A learning rate is a 32-bit float: 0.1 is logged as 0.10000000149011612.
- Keras does not give the number of samples of an epoch: pass `Run(samples_per_epoch=..., effective_batch_size=...)` if a
  callback needs it, as `ProgressCallback` does.
- `epochs` of `fit` is the end of the run, counted from its start: to train a run of three epochs for three more, call
  `fit` with six.
- `fit` starts with the first batch of an epoch. To resume a run that was cut within an epoch, call it twice: with the
  remaining batches and `epochs` one more than the completed epochs, then with all batches. Pass
  `Run(end=..., updates_per_epoch=...)` then, because neither call gives them. The callback sets the epoch to start with,
  instead of `initial_epoch`.
- `shuffle=True` and dropout of torch modules draw from torch's global generator. Its state, and the counters of Keras'
  dropout, are in noether's checkpoints and in `session.state_dict()`: a resume at the end of an epoch is exact. It is not
  with `steps_per_epoch`, where Keras reads on in its data, nor for a `PyDataset` that shuffles itself in `on_epoch_end`.
- Files that Keras saves (`model.save`, `BackupAndRestore`) contain weights and optimizer. `callback.session.state_dict()`
  contains the rest of the run; pass it to a new callback as `remembered=`.
- An update that a `LossScaleOptimizer` skips counts as any other. Keras does not show gradients: callbacks that
  read `grad_norm` or `gradients` are refused, and `finite` is that of the loss.
- A model whose `train_step` steps several optimizers, such as `self.g_optimizer` and `self.d_optimizer`, is saved with
  each under the name of its attribute; a batch is one update, and calls `self.compute_loss` once.
- A model with `jit_compile=True` is refused, because no callback can run inside of a compiled step.
"""  # noqa: E501  # a table

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.iteration import TrainingIteration
from noether.core.loop import updates_in_epoch
from noether.core.run import Run
from noether.core.tensors.tree import FrozenDict
from noether.effects.console.live.other_bars import announce_bar
from noether.integrations.keras.backend import keras
from noether.integrations.keras.module import KerasModule
from noether.integrations.keras.optimizers import wrap_optimizers
from noether.session.rank_exchange import check_world_size
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
    from noether.integrations.keras.optimizer import KerasOptimizer
    from noether.integrations.keras.optimizers import KerasOptimizers

_CLOCK: Final = Clock()
_RUN: Final = Run()
_NOTHING: Final[Mapping[str, Any]] = FrozenDict()


@final
class NoetherCallback(keras.callbacks.Callback):  # type: ignore[misc]  # Keras is untyped
    """Runs noether's callbacks beside `model.fit`.

    Args:
        callbacks: One callback, or several in order.
        remembered: Result of `session.state_dict()`, to resume with a model that Keras loaded.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: Batches of tensors by dataset key, for callbacks that evaluate.
        seed: Seed of the random numbers of callbacks.
        clock: Reads the time.
        run: Facts about the run that Keras does not know.

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
        self._run, self._remembered, self._directory = run, remembered, directory
        self._make_session = partial(
            Session, callbacks, directory=directory, interpreter=interpreter, data=data, seed=seed, clock=clock
        )
        self._session: Session | None = None
        self._optimizer: KerasOptimizer | KerasOptimizers | None = None
        self._losses: list[Tensor] = []
        self._awaits_loss = False
        self._shows_bar = False

    @property
    def session(self) -> Session:
        """The session beside the model.

        Raises:
            RuntimeError: If training has not started.
        """
        if self._session is None:
            raise RuntimeError("the session starts with training: call model.fit(..., callbacks=[callback]) first")
        return self._session

    def on_train_begin(self, logs: Any = None) -> None:
        """Start or resume the run.

        Raises:
            ValueError: If the model is compiled with `jit_compile=True` or is not the model of an earlier call; if the
                batches are not the remaining ones of the epoch; or if the optimizer has accumulated the gradients of
                only a part of an update.
        """
        if self.model.jit_compile:
            raise ValueError(
                "callbacks cannot run inside of a compiled step: call model.compile(..., jit_compile=False)"
            )
        session, optimizer = self._session_and_optimizer()
        if not optimizer.belongs_to(self.model):
            raise ValueError(
                "this callback belongs to another model or optimizer: pass a new NoetherCallback; to resume the run, "
                "pass NoetherCallback(..., remembered=callback.session.state_dict())"
            )
        self._losses = []
        updates = _count_updates(self.params["steps"], optimizer.accumulation_steps)
        end = TrainingIteration(epoch=self.params["epochs"])
        session.load()
        optimizer.check_update_boundary()
        _check_position(session.state, fill_run(session.run, end=end, updates_per_epoch=updates), updates)
        self._shows_bar = self.params.get("verbose") in {1, "auto"}
        announce_bar(self, is_shown=self._shows_bar)
        if self._directory is not None:
            self._directory.exit.add(self._end_bar)
        session.begin(end=end, updates_per_epoch=updates)
        self._override_compute_loss()
        # As keras.callbacks.BackupAndRestore does; after the last epoch nothing is left to train.
        epoch = self.params["epochs"] if session.is_over else session.state.iteration.epoch
        self.model._initial_epoch = epoch or None  # noqa: SLF001  # Keras has no public name for it

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restore the random generators of a resumed run, from which Keras draws the order of the epoch next."""
        if not self.session.state.epoch_batches:
            self.session.restore_generators()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Record the time and scale the learning rate."""
        self.session.restore_generators()  # within an epoch
        self.session.batch_arrived()
        self._session_and_optimizer()[1].scale_lr()
        self._awaits_loss = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Dispatch `AfterUpdate` after the last batch of an update.

        Raises:
            TypeError: If the model does not call `compute_loss`.
        """
        session, optimizer = self._session_and_optimizer()
        optimizer.restore_lr()
        if self._awaits_loss:
            raise TypeError(
                f"train_step of {self.model.name} does not call self.compute_loss(...), so its loss is unknown: call "
                "it there, and override compute_loss for a custom loss"
            )
        if session.pending_micro_batches == optimizer.accumulation_steps:
            losses, self._losses = self._losses, []
            optimizer.steps += 1
            session.update(mean=sum(losses[1:], start=losses[0]) / len(losses))
        self._apply_stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Dispatch `AfterEpoch` if the epoch is completed."""
        self.session.end_epoch(cut_short=self.model.stop_training)
        self._apply_stop()

    def on_train_end(self, logs: Any = None) -> None:
        """Dispatch `AfterTraining` if the run is at its end."""
        self.model._initial_epoch = None  # noqa: SLF001  # otherwise another call would start there
        self.model.__dict__.pop("compute_loss", None)
        if self.session.is_over:
            self.session.end()
        else:
            if self.model.stop_training:
                self.session.record_stop("a callback of Keras set model.stop_training")
            self.session.close()
        self._shows_bar = False
        announce_bar(self, is_shown=False)

    def _end_bar(self, error: BaseException | None) -> None:  # as a run directory calls it
        """End the line of the bar where an exception ends `fit`, for which Keras calls no callback."""
        if self._shows_bar:
            self._shows_bar = False
            announce_bar(self, is_shown=False)
            print()  # noqa: T201  # below the bar of Keras

    def _session_and_optimizer(self) -> tuple[Session, KerasOptimizer | KerasOptimizers]:
        """Return the session and the optimizer, created at the first call because Keras sets the model late."""
        if self._session is None or self._optimizer is None:
            module = KerasModule(self.model)
            self._optimizer = wrap_optimizers(module)
            run = fill_run(self._run, forward=module.evaluate)
            self._session = self._make_session(run=run, model=module, optimizer=self._optimizer)
            alone = "Keras does not average gradients over processes with torch, so train in one, without torchrun"
            check_world_size(self._session.ranks, 1, alone)
            self._session.continue_after_end = (
                "call fit with more epochs, which count from the start of the run, such as epochs=6 after epochs=3"
            )
            # Files of Keras do not have the counters of dropout and augmentation layers.
            seeds = {name: each for name, each in module.named_buffers() if name.endswith("seed_generator_state")}
            self._session.remember_generators(counters=seeds)
            if self._remembered:
                self._session.load_state_dict(self._remembered)
        return self._session, self._optimizer

    def _override_compute_loss(self) -> None:
        """Override `compute_loss` on the model object."""
        self.model.__dict__.pop("compute_loss", None)  # left by a call that raised
        compute = self.model.compute_loss

        def compute_loss(x: Any = None, y: Any = None, y_pred: Any = None, *others: Any, **options: Any) -> Any:
            loss = compute(x, y, y_pred, *others, **options)
            if self._awaits_loss:  # the loss of an evaluation is ignored
                self._awaits_loss = False
                self._micro_batch(loss.detach(), x, y_pred)
            return loss

        self.model.compute_loss = compute_loss

    def _micro_batch(self, loss: Tensor, inputs: Any, outputs: Any) -> None:
        session, optimizer = self._session_and_optimizer()
        self._losses.append(loss)
        samples = session.run.count_samples(inputs)
        session.micro_batch(loss, outputs=outputs, samples=samples, of=optimizer.accumulation_steps)

    def _apply_stop(self) -> None:
        if self.session.is_over:
            self.model.stop_training = True


def _count_updates(batches: int | None, steps: int) -> int | None:
    """Return the number of updates in `batches` batches of `steps` each, or None if epochs differ in it."""
    return None if batches is None or batches % steps else batches // steps


def _check_position(state: TrainState, run: Run, updates: int | None) -> None:
    """Refuse batches other than the remaining ones of the epoch."""
    at, per_epoch = state.iteration, getattr(run, "updates_per_epoch", None)
    if updates is None or per_epoch is None or state.stop is not None or at.reached(run.end):
        return
    done = updates_in_epoch(state, run) % per_epoch
    left, epochs = per_epoch - done, at.epoch + 1
    if done and left != updates:  # at the start of an epoch its length may change
        raise ValueError(
            f"the run resumes at {at}, where {left} of {per_epoch} updates are left of the epoch, but fit received "
            f"{updates}: call fit with the remaining batches and epochs={epochs}, then with all batches, and pass "
            "Run(end=..., updates_per_epoch=...)"
        )
