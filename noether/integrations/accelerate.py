"""noether's callbacks in a loop with Hugging Face Accelerate.

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    session = AcceleratedSession(callbacks, accelerator=accelerator, model=model, optimizer=optimizer,
                                 scheduler=scheduler, max_epochs=10, directory=open_run("runs/mine"))
    accelerator.register_for_checkpointing(session)
    for x, y in session.batches(loader):
        with accelerator.accumulate(model):
            session.backward({"mse": mse_loss(model(x), y)})  # in place of accelerator.backward
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        session.update()

| the loop | noether | with |
|---|---|---|
| `session.batches(loader)` begins | `BeforeTraining`, after it the `AfterEpoch` of a full epoch | `resumed` after `accelerator.load_state`, or if the directory holds a checkpoint |
| it yields a batch | | the time before it was spent waiting for data |
| `session.backward(losses)` | `AfterAccumulationStep`, if a callback listens | losses, outputs if they are given, samples of the batch |
| `session.update()` where `accelerator.sync_gradients` | `AfterUpdate` | sample-weighted means of the losses since the last update, learning rates of the step, `grad_norm` and `gradients` before clipping if a callback reads them |
| the same, where a gradient scaler skipped the step | `AfterUpdate(skipped=True)` | |
| the loader ends | `AfterEpoch` | |
| the end is reached, or `state.stop` gives a reason | `AfterTraining` | `session.batches` ends |
| `accelerator.save_state`, `load_state` | `state_dict`, `load_state_dict` | in the checkpoints of accelerate |

Differences from noether's own trainer and from `Session`:

- Accelerate divides every loss by `gradient_accumulation_steps`: a short last micro-batch weighs as much as a full one, and
  a short last group of an epoch makes a smaller update. The losses in events are weighted by samples, or by their own
  weights (`noether.Mean`), which the gradients are not.
- `accumulation_steps` of a micro-batch in a short last group is the number of a full group. With
  `GradientAccumulationPlugin(sync_with_dataloader=False)` the last group of an epoch is completed in the next one, and a
  run that resumes at the end of such an epoch does not have its gradients.
- The session seeds torch, numpy and `random` as in a plain loop: the order of an epoch from `(seed, epoch)`, dropout and
  augmentation from `(seed, epoch, batch)`, those of later ranks from their rank too. So a resume is exact, also within an
  epoch, whose batches it reads again from the first. A `SeedableRandomSampler` keeps the seed that it took from torch's
  generator in `prepare`: call `accelerate.utils.set_seed` before.
- Save a checkpoint of accelerate right after `session.update()`, not inside of an update.
- A gradient scaler is accelerate's; noether's checkpoints hold its scale, and `grad_norm` and `gradients` are
  unscaled. `forward_s`, `backward_s` and `optimizer_s` are missing.
- Of several optimizers, a batch may step any: it is one update. Call `accelerator.backward` for some losses and
  `session.backward` for the last. Then `grad_norm` and `gradients` are those with which each optimizer steps, after
  clipping.
- On several processes all is as in `Session`: samples are summed, including those that accelerate repeats to fill up
  batches, and losses are averaged over them. Loaders of `data` that `prepare` has split are evaluated whole. A model that
  FSDP or DeepSpeed shards is refused, because no process has it whole.
"""  # noqa: E501  # a table

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Final, final

from torch.utils.data import default_collate

from noether.core.run import Run
from noether.core.tensors.batch import batch_size as count_rows
from noether.core.tensors.means import Mean, read_weight
from noether.session.errors import SessionError
from noether.session.hidden_state import generators_of_model
from noether.session.loader import seed_pass, set_epoch, warn_if_unrepeatable
from noether.session.loop import log_skipped
from noether.session.randomness import derive, preserve_generators, seed_all
from noether.session.rank_exchange import check_world_size
from noether.session.session import Session
from noether.session.timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch
    from accelerate import Accelerator  # type: ignore[import-untyped]  # it has no types
    from torch import Tensor, nn

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects import RunDirectory

_CLOCK: Final = Clock()
_RUN: Final = Run()
_NO_BATCH: Final[Any] = object()


@final
class AcceleratedSession:
    """Runs callbacks beside a loop with Accelerate.

    Args:
        callbacks: One callback, or several in order.
        accelerator: The accelerator.
        model: The model, prepared.
        optimizer: Its optimizer, prepared, or several by name, as `{"g": adam_g, "d": adam_d}`.
        scheduler: A scheduler of the learning rate, prepared, or several by name; noether's checkpoints then hold its
            position.
        directory: The run on disk, `noether.open_run(path)`; if it holds a checkpoint, the run resumes there.
        interpreter: Runs effects; by default that of the directory.
        data: Batches by dataset key, for callbacks that evaluate.
        loss: `(outputs, batch) -> {name: mean over samples}`, for evaluations.
        max_epochs: Epochs after which training ends, >= 1.
        max_updates: Updates after which training ends, >= 1.
        max_samples: Samples after which training ends, >= 1; at most one of the three.
        seed: Seeds the random numbers of the loop and of callbacks.
        precision: Autocast dtype of evaluations.
        clock: Reads the time.
        run: Further facts about the run.

    Raises:
        SessionError: If the parts cannot work together.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from noether.core.callbacks import OnlineLossCallback
        >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 1)
        >>> loader = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> show = lambda effects, state, event: print(state.iteration, *effects) if effects else None
        >>> losses, parts = OnlineLossCallback(every_n_epochs=1), {"model": model, "optimizer": optimizer}
        >>> session = AcceleratedSession(losses, accelerator=accelerator, max_epochs=1, interpreter=show, **parts)
        >>> for batch in session.batches(loader):
        ...     with accelerator.accumulate(model):
        ...         session.backward(model(batch).square().mean())
        ...         optimizer.step(); optimizer.zero_grad()
        ...     session.update()
        E1_U2_S8 LogScalars(values=FrozenDict({'loss/online/total/E1': tensor(..., dtype=torch.float64)}))
    """

    def __init__(  # noqa: PLR0913  # every part of a run, by name
        self,
        callbacks: Callback | Sequence[Callback],
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any = None,
        directory: RunDirectory | None = None,
        interpreter: Callable[[Effects, TrainState, Event], None] | None = None,
        data: Mapping[str, Iterable[Any]] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        max_epochs: int | None = None,
        max_updates: int | None = None,
        max_samples: int | None = None,
        seed: int = 0,
        precision: torch.dtype | None = None,
        clock: Clock = _CLOCK,
        run: Run = _RUN,
    ) -> None:
        self._accelerator, self._model = accelerator, accelerator.unwrap_model(model)
        self.session = Session(
            callbacks,
            model=self._model,
            optimizer=_unwrap(optimizer, "optimizer"),  # accelerate's wrapper has no hooks
            scheduler=_unwrap(scheduler, "scheduler"),
            scaler=accelerator.scaler,
            directory=directory,
            interpreter=interpreter,
            data=data,
            loss=loss,
            max_epochs=max_epochs,
            max_updates=max_updates,
            max_samples=max_samples,
            seed=seed,
            precision=precision,
            clock=clock,
            run=run,
        )
        check_world_size(self.session.ranks, accelerator.num_processes, "start all processes with accelerate launch")
        self.session.seeds_loop = self.session.resumes_within_epochs = True
        self._generators = generators_of_model(self._model)
        self._batch: Any = None
        self._has_several = isinstance(optimizer, Mapping)  # of which each has its own gradients as it steps

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches that are left of the run, epoch after epoch, and dispatch the events between them.

        Args:
            loader: The training data, prepared.
        """
        warn_if_unrepeatable(loader)
        # Accelerate takes the seed of a shuffling sampler from torch's generator as it prepares a loader.
        with preserve_generators(), self.session.save_where_it_ends():
            self._begin(loader)
            while not self.session.is_over:
                yield from self._epoch(loader)
                self.session.end_epoch(cut_short=self.session.is_over)
            self.session.end()

    def backward(
        self, losses: Tensor | Mean | Mapping[str, Tensor | Mean], outputs: Any = None, **keywords: Any
    ) -> None:
        """Compute gradients of the sum of the losses as `accelerator.backward` does, and report the micro-batch.

        Args:
            losses: The mean loss of the micro-batch, or several by name; a `Mean` gives a loss its weight in the means
                of events, and one of weight 0 is left out.
            outputs: Outputs of the model, for callbacks that track them.
            keywords: Further arguments of `accelerator.backward`.
        """
        named = losses if isinstance(losses, Mapping) else {"total": losses}
        means = {name: _to_mean(name, loss) for name, loss in named.items()}
        terms = [mean.of_batch for mean in means.values() if mean.weight != 0]
        if terms:
            self._accelerator.backward(sum(terms), **keywords)
        self.session.micro_batch(
            {name: Mean(mean.of_batch.detach(), mean.weight) for name, mean in means.items()},
            outputs=outputs,
            samples=self.session.run.count_samples(self._batch),
            of=self._accelerator.gradient_accumulation_steps,
        )
        if self._accelerator.sync_gradients and not self._has_several:
            scaler = self._accelerator.scaler
            self.session.measure_gradients(scale=None if scaler is None else scaler.get_scale())

    def update(self) -> None:
        """Report the update, if the micro-batch completed one. Call it once per batch, after `scheduler.step`.

        Raises:
            SessionError: If the optimizer made no step.
        """
        if not self._accelerator.sync_gradients:
            return
        skipped = not self.session.steps
        if skipped and not self._accelerator.optimizer_step_was_skipped:
            raise SessionError("the optimizer made no step: call session.update() after optimizer.step()")
        self.session.update(skipped=skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the run, which accelerate saves beside model and optimizer."""
        return self.session.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load a result of `state_dict`; call this before `batches`.

        Raises:
            ValueError: If `state_dict` did not return `saved`.
        """
        self.session.load_state_dict(saved)

    def _begin(self, loader: Any) -> None:
        """Load the run to resume, if there is one, and dispatch `BeforeTraining`."""
        steps = self._accelerator.gradient_accumulation_steps
        self.session.load()
        known: dict[str, Any] = {**epoch_lengths(loader, steps, self._accelerator.num_processes)}
        if known and len(loader) % steps and not self._accelerator.gradient_state.sync_with_dataloader:
            known = {}  # an epoch ends inside of an update, and the next one has another number of updates
        self.session.count_batches(known.get("updates_per_epoch"), steps, known.get("effective_batch_size"))
        self.session.has_equal_batches = has_even_batches(loader, self.session.run)
        self.session.begin(**known)

    def _epoch(self, loader: Any) -> Iterator[Any]:
        """Yield the batches that are left of the epoch, while the run is not over."""
        session, rank, start_s = self.session, self._accelerator.process_index, time.perf_counter()
        seed, epoch, counted = session.state.seed, session.state.iteration.epoch, session.state.epoch_batches
        set_epoch(loader, epoch)
        seed_pass(loader, seed, epoch)  # the same on all processes, which share the order of samples
        batches = iter(loader)
        for index in count():
            session.stopwatch.wait_begins()
            seed_all(derive(seed, "batch", epoch, index, rank))
            batch = next(batches, _NO_BATCH)
            if batch is _NO_BATCH:
                return
            if index < counted:
                if index + 1 == counted:
                    log_skipped(counted, epoch, time.perf_counter() - start_s)
                    session.stopwatch.read()
                continue
            seed_all(derive(seed, "step", epoch, index, rank), self._generators)
            session.batch_arrived()
            self._batch = batch
            yield batch
            if session.is_over:
                return


def _unwrap(prepared: Any, kind: str) -> Any:
    """Return what accelerate wrapped, or several by name."""
    if isinstance(prepared, Mapping):
        return {name: getattr(each, kind, each) for name, each in prepared.items()}
    return getattr(prepared, kind, prepared)


def _to_mean(name: str, loss: Tensor | Mean) -> Mean:
    """Return a loss as a mean whose weight is a number, or None."""
    if not isinstance(loss, Mean):
        return Mean(loss)
    return loss if loss.weight is None else Mean(loss.of_batch, read_weight(name, loss.weight))


def has_even_batches(loader: Any, run: Run) -> bool:
    """Return whether the batches of all processes certainly have equally many samples."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    is_filled_up = type(sampler).__name__ == "BatchSamplerShard" and sampler.even_batches
    return is_filled_up and loader.collate_fn is default_collate and run.batch_size is count_rows


def epoch_lengths(loader: Any, steps: int, processes: int) -> dict[str, int]:
    """Return the lengths of an epoch, or nothing if the prepared loader does not know them.

    Args:
        loader: The loader.
        steps: Micro-batches of one update.
        processes: Number of processes; batches are filled up so that each has equally many.
    """
    if not hasattr(getattr(loader, "dataset", None), "__len__") or not hasattr(loader, "total_batch_size"):
        return {}
    samples = len(loader) * loader.total_batch_size
    return {
        "updates_per_epoch": -(-len(loader) // steps),
        "samples_per_epoch": samples if processes > 1 else min(samples, loader.total_dataset_length),
        "effective_batch_size": loader.total_batch_size * steps,
    }
