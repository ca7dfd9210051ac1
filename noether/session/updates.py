"""Reports of a loop about its micro-batches and updates, which become events."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any

from torch import Tensor

from noether.core.event import AfterAccumulationStep, AfterUpdate
from noether.core.event_fields import check_fields
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.losses import loss_weights
from noether.core.tensors.tree import FrozenDict
from noether.session.errors import SessionError
from noether.session.events import SessionEvents
from noether.session.lengths import Contradiction
from noether.session.loader import warn
from noether.session.losses import MicroBatch, is_finite, mean_losses, named_losses
from noether.session.model_changes import ModelChanges
from noether.session.optimizer_watch import MEASURED
from noether.session.optimizers import TorchOptimizer, is_skipped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.optim import Optimizer

    from noether.session.loop import BatchLoop
    from noether.session.losses import Losses, ReportedLosses


class SessionUpdates(SessionEvents):
    """Turns what a loop reports of its micro-batches and updates into events.

    Args:
        model: The model of the loop.
        reads_all_events: Whether a function of the user's runs the effects, which may read any event.
        parts: As for `SessionState`.
    """

    def __init__(self, *, model: nn.Module, reads_all_events: bool, **parts: Any) -> None:
        super().__init__(**parts)
        self._changes = ModelChanges(model)
        self._loop: BatchLoop | None = None
        self._steps_with_samples = 0  # micro-batches of this update, on any rank
        self._reads_all_events = reads_all_events
        self._has_compared_params = False  # of all ranks, after the first update of this process

    def micro_batch(
        self, losses: ReportedLosses, *, outputs: Any = None, samples: int | None = None, of: int | None = None
    ) -> None:
        """Report a micro-batch whose gradients are computed, before the optimizer steps.

        Args:
            losses: Mean loss, or losses by name; `total` is added as their sum. They are detached. A `Mean` gives a
                loss its weight in the mean over micro-batches and updates. Empty if the framework left the micro-batch
                out. Losses of a micro-batch without samples are ignored. An update counts as skipped if none of its
                micro-batches has both samples and losses.
            outputs: What the model returned, for callbacks that track it.
            samples: Its samples, >= 0; by default those of the batch that `batches` yielded.
            of: Micro-batches of this update; by default as `accumulation` says.

        Raises:
            SessionError: If there is no batch, or the loop has already reported it.
            SettingsError: If `samples` is not a whole number >= 0.
        """
        if samples is not None:
            check_fields(AfterAccumulationStep, {"samples": samples})
            self.has_equal_batches = self.has_equal_batches and self._loop is None
        batch = None if self._loop is None else self._loop.report()
        if samples is None:
            if self._loop is None:
                raise SessionError("outside of session.batches(loader), the batch is not known: pass samples=")
            samples = self.run.count_samples(batch)
        if not self._micro_batches:
            self._settled, self._steps_with_samples = self._state, 0
        losses = named_losses(losses) if samples else FrozenDict()  # the mean over no samples is NaN
        if outputs is not None:
            outputs = map_tensors(Tensor.detach, outputs)
        self._epoch_batches += 1
        micro_batch = MicroBatch(samples=samples, losses=losses, outputs=outputs)
        self._micro_batches.append(micro_batch)
        self.stopwatch.step_made()
        if self._listens_to_micro_batches:
            if of is None:
                of = 1 if self._loop is None else self._loop.accumulation_steps
            self._dispatch_micro_batch(micro_batch, of)

    def measure_gradients(self, optimizer: Optimizer | None = None, *, scale: float | None = None) -> None:
        """Measure `grad_norm` and `gradients` of the update now, if a callback reads them: call it before clipping.

        Without this call, `grad_norm` and `gradients` are those with which the optimizer steps, after clipping.

        Args:
            optimizer: The optimizer whose gradients are complete; by default all optimizers of the session.
            scale: What a gradient scaler multiplied the gradients by, if they are not unscaled yet.

        Raises:
            SessionError: If the session has no optimizer of `torch.optim`.

        Example:
            >>> import torch
            >>> from noether import AfterUpdate, Session, callback
            >>> @callback("show", readings=("gradients",))
            ... def show(state, event):
            ...     if isinstance(event, AfterUpdate):
            ...         print(event.gradients)
            ...     return state, ()
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> session = Session(show, interpreter=lambda *_: None, model=model, optimizer=sgd, max_updates=1)
            >>> for batch in session.batches([torch.full((4, 1), 8.0)]):
            ...     loss = model(batch).mean()
            ...     loss.backward()
            ...     session.measure_gradients()
            ...     norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            ...     sgd.step()
            ...     session.update(loss)
            FrozenDict({'weight': tensor([[8.]])})
        """
        if not isinstance(self._optimizer, TorchOptimizer):
            raise SessionError("the session has no optimizer whose gradients it can read: pass optimizer=")
        if MEASURED & self.readings:
            self._optimizer.measure(optimizer, scale)

    def _dispatch_micro_batch(self, micro_batch: MicroBatch, of: int) -> None:
        """Dispatch `AfterAccumulationStep` with the samples and losses of all ranks, unless there are none."""
        samples, losses, time_s = micro_batch.samples, micro_batch.losses, self._clock.wall_s()
        if self.ranks.are_several:
            what = f"micro-batch {len(self._micro_batches)} of {self._next_update}"
            samples, losses, time_s = self._exchange.reduce_micro_batch(what, micro_batch, time_s)
        if not samples:
            return
        self._steps_with_samples += 1
        self._dispatch(
            self._state,
            AfterAccumulationStep,
            losses=losses,
            outputs=micro_batch.outputs,
            samples=samples,
            accumulation_step=self._steps_with_samples - 1,
            accumulation_steps=max(of, self._steps_with_samples),
            time_s=time_s,
        )

    @property
    def _next_update(self) -> str:
        return f"update {self._state.iteration.update + 1}"

    def update(  # noqa: PLR0913  # every reading, by name
        self,
        losses: ReportedLosses | None = None,
        *,
        outputs: Any = None,
        samples: int | None = None,
        skipped: bool | None = None,
        mean: ReportedLosses | None = None,
        grad_norm: Tensor | float | None = None,
        finite: Tensor | bool | None = None,
        forward_s: float | None = None,
        backward_s: float | None = None,
        optimizer_s: float | None = None,
    ) -> None:
        """Report an update, after `optimizer.step()` and `scheduler.step()`; apply what callbacks change.

        Args:
            losses: As for `micro_batch`, which is called with them; None if the loop has reported the micro-batches.
            outputs: As for `micro_batch`.
            samples: As for `micro_batch`.
            skipped: Whether the optimizer left the update out, as under a `GradScaler`. By default, an update counts as
                skipped if the optimizer made no step, and the scaler lowered its scale or gradients are not finite.
            mean: Losses of the update, in place of the sample-weighted mean over its micro-batches.
            grad_norm: 2-norm of the gradients, such as `clip_grad_norm_` returns; by default, if a callback
                reads it, that of the gradients at `measure_gradients`, or else as the optimizer steps.
            finite: Whether losses and gradients are finite; by default, the session checks it if a callback reads it.
            forward_s: Seconds in forward passes, if the loop measured them.
            backward_s: Seconds in backward passes, if the loop measured them.
            optimizer_s: Seconds in the optimizer, if the loop measured them.

        Raises:
            SessionError: If there is no micro-batch, the optimizer made no step, or training is over.
            SettingsError: If a reading is not what `AfterUpdate` documents.
        """
        times = {"forward_s": forward_s, "backward_s": backward_s, "optimizer_s": optimizer_s}
        readings = {"skipped": skipped, "grad_norm": grad_norm, "finite": finite, **times}
        if given := {name: value for name, value in readings.items() if value is not None}:
            check_fields(AfterUpdate, given)
        if losses is not None:
            self.micro_batch(losses, outputs=outputs, samples=samples)
        self._check_update()
        counted, self._micro_batches = [each for each in self._micro_batches if each.samples], []
        reported = mean_losses(counted) if mean is None or not counted else named_losses(mean)
        known = self._read_update(counted, reported, skipped=skipped, finite=_copy(finite)) | times
        if grad_norm is not None or known["skipped"]:
            known["grad_norm"] = _copy(grad_norm)
        if self.ranks.are_several:
            known |= self._reduce_update(counted, known, None if mean is None else reported)
        if known["skipped"]:
            known["gradients"] = None
        if not known["samples"]:
            self._warn_of_empty_update()
        self._count_update(AfterUpdate.of(run=self.run, **{"time_s": self._clock.wall_s(), **known}))
        self._steps_before = self._count_steps()
        if self._optimizer is not None:
            self._optimizer.end_update()
        self._warn_of_changes()

    def _count_update(self, event: AfterUpdate) -> None:
        """Count an update, and dispatch its event or defer it."""
        state = self._state.advance(samples=event.samples, epoch_batches=self._epoch_batches)
        # If Ctrl-C comes while the stretch has an update that the state does not count, there is nothing to save.
        model_status, self._model_status = self._model_status, "partly written"
        if self.ranks.are_several or not self._stretch.defer(state, event):
            self._model_status = model_status
            self._call_deferred_callbacks()
            state = self._state.advance(samples=event.samples, epoch_batches=self._epoch_batches)  # after the callbacks
            self._dispatch_event(state, event)
            return
        self._training_thread = get_ident()
        for memory in self._live_memories:
            memory.note()
        self._state, self._model_status = state, "settled"
        self.stopwatch.wait_begins()

    def _read_update(
        self, counted: list[MicroBatch], reported: Losses, *, skipped: bool | None, finite: Tensor | bool | None
    ) -> dict[str, Any]:
        """Return the readings of this rank that the loop does not have to report."""
        if skipped is None:
            lowered = self._scaler is not None and self._scaler.has_lowered()
            skipped = is_skipped(self._optimizer, self.steps, reported, lowered=lowered)
        skipped = skipped or not reported
        measured = {} if self._optimizer is None else self._optimizer.readings
        if finite is None and "finite" in self.readings:
            finite = not skipped and is_finite(reported["total"]) & measured.get("finite", True)
        known: dict[str, Any] = {
            **measured,
            "losses": reported,
            "outputs": tuple([each.outputs for each in counted]),
            "accumulated": tuple([each.samples for each in counted]),
            "samples": sum([each.samples for each in counted]),
            "finite": finite,
            "skipped": skipped,
            **self.stopwatch.read(),
        }
        if weights := loss_weights(reported):
            known["loss_weights"] = weights
        return known

    def _reduce_update(
        self, counted: list[MicroBatch], known: Mapping[str, Any], mean: Losses | None
    ) -> dict[str, Any]:
        """Return the readings of an update over all ranks; if no callback reads them, skip the exchange."""
        is_first, self._has_compared_params = not self._has_compared_params, True
        total = known["samples"] * self.ranks.world_size
        if not is_first and self.has_equal_batches and not self._is_read(total):
            return {"samples": total}
        sent = {"mean": None if mean is None else dict(mean), "time_s": self._clock.wall_s()}
        return self._exchange.reduce_update(self._next_update, counted, {**known, **sent}, params=is_first)

    def _is_read(self, samples: int) -> bool:
        """Return whether a callback, or an interpreter of the user's, reads the update that ends now."""
        state = self._state.advance(samples=samples, epoch_batches=self._epoch_batches)
        called = self._reducer.members_called(state, AfterUpdate)
        own = {id(self._scheduler), id(self._scaler)}
        return self._reads_all_events or any(id(member) not in own for member in called)

    def _warn_of_changes(self) -> None:
        for change in self._changes.describe(self._state.iteration.epoch):
            warn(change)

    def _check_update(self) -> None:
        if self._loop is not None:
            self._loop.check_update(self.pending_micro_batches)
        elif not self._micro_batches:
            raise SessionError("an update needs micro-batches: call update(losses, samples=...) or micro_batch(...)")
        per_epoch = self._updates_per_epoch
        if per_epoch is not None and self._position == per_epoch:
            reason = f"epoch {self._state.iteration.epoch} has more updates than updates_per_epoch={per_epoch}"
            self._forget_lengths(Contradiction(reason))


def _copy(value: Any) -> Any:
    """Return a reading, a tensor as a copy: a loop may write the next reading into the same tensor."""
    return value.detach().clone() if isinstance(value, Tensor) else value
