"""noether's callbacks in a loop with Hugging Face Accelerate.

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    run = AcceleratedRun(reducer, accelerator=accelerator, model=model, optimizer=optimizer, scheduler=scheduler,
                         run=Run(end=TrainingIteration(epoch=10)), directory=open_run("runs/mine"))
    accelerator.register_for_checkpointing(run)
    for x, y in run.batches(loader):
        with accelerator.accumulate(model):
            run.backward({"mse": mse_loss(model(x), y)})  # in place of accelerator.backward
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.update()

| the loop | noether | with |
|---|---|---|
| `run.batches(loader)` begins | `BeforeTraining`, after it an `AfterEpoch` that is owed | `resumed` after `accelerator.load_state`, or if the directory holds a checkpoint |
| it yields a batch | | the time before it was spent waiting for data |
| `run.backward(losses)` | `AfterAccumulationStep`, if anybody listens | losses, outputs if they are given, samples of the batch |
| `run.update()` where `accelerator.sync_gradients` | `AfterUpdate` | sample-weighted means of the losses since the last update, learning rates of the step, `grad_norm` if anybody reads it |
| the same, where a gradient scaler left the step out | `AfterUpdate(skipped=True)` | |
| the loader is at its end | `AfterEpoch` | |
| `run.end` is reached, or `state.stop` gives a reason | `AfterTraining` | `run.batches` ends |
| `accelerator.save_state`, `load_state` | `state_dict`, `load_state_dict` | in the checkpoints of accelerate |

What is different from noether's own trainer:

- Accelerate divides every loss by `gradient_accumulation_steps`: a short last micro-batch weighs as much as a full one, and
  a short last group of an epoch makes a smaller update. The losses in events are weighted by samples.
- `accumulation_steps` of a micro-batch in a short last group is the number that others have: nobody knows that it is short.
- A run ends where `Run(end=...)` says, which has to be given.
- Batches that are left of an epoch are found again where their order is a function of the epoch: without shuffling, or
  with `Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))`. Dropout draws from torch's
  generator, whose place is in the checkpoints of accelerate and not in those of noether.
- Save a checkpoint of accelerate right after `run.update()`, not inside of an update.
- With a gradient scaler `grad_norm` is that of scaled gradients. `forward_s`, `backward_s`, `optimizer_s` are not there.
- On several processes losses are averaged, samples summed (those that accelerate repeats to make batches even included),
  and effects are carried out by the main one: `open_run(path, rank=accelerator.process_index)`.
"""  # noqa: E501  # a table

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.tensors.tree import map_tensors
from noether.session.scheduler import SchedulerMemory
from noether.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator  # type: ignore[import-untyped]  # it has no types
    from torch import nn

    from noether.core.callback import Callback

_NO_RUN = Run()


@final
class AcceleratedRun:
    """A run of callbacks beside a loop with Accelerate.

    Args:
        reducer: Any one callback, such as `compose(...)` or `load_callbacks(path)`.
        accelerator: The accelerator.
        model: The model, prepared.
        optimizer: Its optimizer, prepared.
        scheduler: A scheduler of the learning rate, prepared, so that a checkpoint of noether holds its position.
        run: Its `end`, and what callbacks evaluate.
        settings: `directory`, `interpreter`, `seed` and `format_duration`, as for `Session`.

    Raises:
        ValueError: If there is neither a directory nor an interpreter.
        KeyError: If a callback iterates data that the run does not have.

    Example:
        >>> from accelerate import Accelerator
        >>> from noether import TrainingIteration
        >>> from noether.core.callbacks import OnlineLossCallback
        >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 1)
        >>> loader = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> show = lambda effects, state, event: print(state.iteration, *effects) if effects else None
        >>> live = {"run": Run(end=TrainingIteration(epoch=1)), "interpreter": show}
        >>> losses = OnlineLossCallback(every_n_epochs=1)
        >>> run = AcceleratedRun(losses, accelerator=accelerator, model=model, optimizer=optimizer, **live)
        >>> for batch in run.batches(loader):
        ...     with accelerator.accumulate(model):
        ...         run.backward(model(batch).square().mean())
        ...         optimizer.step(); optimizer.zero_grad()
        ...     run.update()
        E1_U2_S8 LogScalars(values=FrozenDict({'loss/online/total/E1': tensor(..., dtype=torch.float64)}))
    """

    def __init__(
        self,
        reducer: Callback,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any = None,
        run: Run = _NO_RUN,
        **settings: Any,
    ) -> None:
        self._accelerator, self._model = accelerator, accelerator.unwrap_model(model)
        self._scheduler = None if scheduler is None else SchedulerMemory(getattr(scheduler, "scheduler", scheduler))
        self.live = Session(
            reducer if self._scheduler is None else compose(self._scheduler, reducer),
            run=run.replace(rank=accelerator.process_index, world_size=accelerator.num_processes),
            model=self._model,
            optimizer=getattr(optimizer, "optimizer", optimizer),  # accelerate's wrapper has no hooks
            **settings,
        )
        self._batch: Any = None
        self._grad_norm: Tensor | None = None
        self._seen = 0  # steps of the optimizer at the last update

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches that are left of the run, epoch after epoch, and tell of what lies between them.

        Args:
            loader: The training data, prepared.
        """
        steps = self._accelerator.gradient_accumulation_steps
        if self.live.load() and self._scheduler is not None:
            self._scheduler.restore(self.live.state)
        known: dict[str, Any] = {**lengths(loader, steps, self._accelerator.num_processes)}
        self.live.begin(**known)
        self._seen = self.live.steps
        while not self.live.is_over:
            yield from self._epoch(loader, steps)
            self.live.end_epoch(cut_short=self.live.is_over)
        self.live.end()

    def backward(self, losses: Tensor | Mapping[str, Tensor], outputs: Any = None, **keywords: Any) -> None:
        """Go backward from the sum of the losses, as `accelerator.backward` does, and tell of the micro-batch.

        Args:
            losses: The mean loss of the micro-batch, or several by name.
            outputs: What the model returned, for callbacks that track it.
            keywords: Further arguments of `accelerator.backward`.
        """
        named = losses if isinstance(losses, Mapping) else {"total": losses}
        self._accelerator.backward(sum(named.values()), **keywords)
        self.live.micro_batch(
            samples=self._samples(),
            losses={name: self._averaged(loss.detach()) for name, loss in named.items()},
            outputs=map_tensors(Tensor.detach, outputs),
            of=self._accelerator.gradient_accumulation_steps,
        )
        if self._accelerator.sync_gradients and "grad_norm" in self.live.readings:
            self._grad_norm = get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])

    def update(self) -> None:
        """Tell of the update, if the micro-batch completed one. Call it once for each, after `scheduler.step`.

        Raises:
            RuntimeError: If the optimizer has not stepped.
        """
        if not self._accelerator.sync_gradients:
            return
        made, self._seen = self.live.steps - self._seen, self.live.steps
        if not made and not self._accelerator.optimizer_step_was_skipped:
            raise RuntimeError("the optimizer made no step: call run.update() after optimizer.step()")
        norm, self._grad_norm = self._grad_norm, None
        self.live.update(skipped=not made, grad_norm=norm)

    def state_dict(self) -> dict[str, Any]:
        """Return what the run remembers beside model and optimizer."""
        return self.live.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Recall what a run remembered, before its batches are asked for.

        Raises:
            ValueError: If `saved` is nothing that `state_dict` returns.
        """
        self.live.load_state_dict(saved)

    def _epoch(self, loader: Any, steps: int) -> Iterator[Any]:
        """Yield the batches that are left of the epoch, while the run goes on."""
        at, per_epoch = self.live.state.iteration, getattr(self.live.run, "updates_per_epoch", None)
        inside = 0 if per_epoch is None else at.update - at.epoch * per_epoch
        left = self._accelerator.skip_first_batches(loader, inside * steps) if inside else loader
        if hasattr(left, "set_epoch"):
            left.set_epoch(at.epoch)
        for batch in left:
            self.live.batch_arrived()
            self._batch = batch
            yield batch
            if self.live.is_over:
                return

    def _samples(self) -> int:
        accelerator, size = self._accelerator, self.live.run.batch_size(self._batch)
        if accelerator.num_processes == 1:
            return size
        if accelerator.even_batches:
            return size * int(accelerator.num_processes)
        samples: Tensor = accelerator.reduce(torch.tensor(size, device=accelerator.device), "sum")
        return int(samples)

    def _averaged(self, loss: Tensor) -> Tensor:
        if self._accelerator.num_processes == 1:
            return loss
        averaged: Tensor = self._accelerator.reduce(loss.clone(), "mean")
        return averaged


def lengths(loader: Any, steps: int, processes: int) -> dict[str, int]:
    """Return how long an epoch is, as far as a prepared loader tells.

    Args:
        loader: The loader.
        steps: Micro-batches of one update.
        processes: Processes among which batches are shared out; they are filled up so that all have as many.
    """
    if not hasattr(getattr(loader, "dataset", None), "__len__") or not hasattr(loader, "total_batch_size"):
        return {}
    samples = len(loader) * loader.total_batch_size
    return {
        "updates_per_epoch": -(-len(loader) // steps),
        "samples_per_epoch": samples if processes > 1 else min(samples, loader.total_dataset_length),
        "effective_batch_size": loader.total_batch_size * steps,
    }
