"""The section `trainer`: how a run is trained, evaluated and saved, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, final

from noether.config.objects import kinds
from noether.config.objects.functions import Function, MetricKind, metric_label
from noether.config.objects.kinds import Kind
from noether.config.optimizer_settings import check_number
from noether.core.errors import Problem, check_choice, check_whole, raise_problems
from noether.core.schedules.schedule import INTERVALS

ENDS = ("max_epochs", "max_updates", "max_samples")
"""Settings of `trainer` that give the end of a run; exactly one is given."""

Loss: TypeAlias = Annotated[Function, kinds.OUTPUT_FUNCTION]
Sampler: TypeAlias = Annotated[Kind, kinds.SAMPLER]
Metric: TypeAlias = Annotated[MetricKind | Callable[..., Any] | str, kinds.METRIC]


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Metrics that `trainer.evaluate` measures, and their interval. In YAML the datasets are beside the interval.

    Args:
        every_n_epochs: Interval in epochs; give exactly one interval.
        every_n_updates: Interval in updates.
        every_n_samples: Interval in samples.
        datasets: For each dataset key a list of `loss`, names of metrics, dotted paths of functions, or `{kind: ...}`
            with the settings of a function or class and a `name`.

    Raises:
        SettingsError: If there is not exactly one interval, it is not a whole number, or no metric is listed.

    Example:
        >>> EvaluateSettings(every_n_epochs=1, datasets={"val": ("loss", "accuracy")}).datasets["val"]
        ('loss', 'accuracy')
    """

    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    every_n_samples: int | None = None
    datasets: Mapping[str, tuple[Metric, ...]]

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        yield from _exactly_one(self, INTERVALS)
        if not self.datasets:
            yield Problem("", "names no dataset; expected for example `val: [loss, accuracy]`")
        for key, metrics in self.datasets.items():
            if not metrics:
                yield Problem(key, "names no metric; expected for example [loss, accuracy]")
            labels = ["loss" if metric == "loss" else f"metric {metric_label(metric)}" for metric in metrics]
            if len(set(labels)) < len(labels):
                shown = [label.removeprefix("metric ") for label in labels]
                fix = " or give it another name" if any(isinstance(each, MetricKind) for each in metrics) else ""
                yield Problem(key, f"{shown} names a metric twice; remove one{fix}")


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How checkpoints are written. In YAML `asynchronous` is called `async`, which is a keyword of Python.

    Args:
        asynchronous: Whether to write them in a background thread during training.
        on_error: What a failed write does: `stop` ends training, `warn` continues without that checkpoint.
        at_end: Whether to save the end of training, by early stopping too, where no callback saves a checkpoint of it
            from which the run could be resumed.
        every_n_minutes: Save after the first update that ends so many minutes, above 0, after the last checkpoint from
            which the run could be resumed; None for no such saves. The checkpoint stays until the next of that kind is
            saved. Time decides when, so the plan does not count these checkpoints; the run is the same with them.

    Raises:
        SettingsError: If a value is out of range.

    Example:
        >>> CheckpointSettings(on_error="ignore")
        Traceback (most recent call last):
        noether.core.errors.SettingsError: on_error: 'ignore' is not one of 'stop', 'warn'
    """

    asynchronous: bool = True
    on_error: Literal["stop", "warn"] = "stop"
    at_end: bool = True
    every_n_minutes: float | None = None

    def __post_init__(self) -> None:
        minutes = self.every_n_minutes
        raise_problems(
            [
                check_choice("on_error", self.on_error, ("stop", "warn")),
                None if minutes is None else check_number("every_n_minutes", minutes, above=True),
            ]
        )


@final
@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How a run is trained, and where it ends.

    Args:
        max_epochs: End of the run in epochs; give exactly one end.
        max_updates: End of the run in updates.
        max_samples: End of the run in samples. As for intervals in samples, those that the dataset's `collate` leaves
            out do not count; the plan counts all.
        max_hours: Time of one process, above 0, such as 11.5 for jobs of 12 hours; None for no limit. It counts from
            the start of `noether train`. Once it has passed, the run is saved and left as at a SIGTERM, with exit code
            75: after the current update, or before the next batch of an evaluation. It is no end of training: a resumed
            run has the full time again, but not one that torchrun restarts (`--max-restarts`).
        effective_batch_size: Samples of one update, at least 1.
        max_batch_size: Largest number of samples in one forward pass; larger updates accumulate gradients. None for no
            limit.
        eval_batch_size: Samples of one forward pass in evaluation; None for the number in training.
        loss: Dotted path of a pure function `(outputs, batch) -> {name: mean over samples}`, or of one that returns one
            loss; a `noether.Mean` gives a loss another weight than the samples. With settings, `{kind: mine.huber,
            delta: 0.5}`: the further parameters of the function, or those of a class whose instance is the loss.
        evaluate: Metrics to measure during training, and their interval; None to measure none.
        evaluate_first: Whether to measure them before the first update too.
        device: `cpu`, `cuda`, `cuda:1` and the like, or `auto` for the best available.
        precision: dtype of the forward pass. With `float16` losses are scaled before the backward pass, as by
            `torch.amp.GradScaler`; an update whose gradients overflow is skipped, and checkpoints hold the scale.
        nonfinite: What to do with an update whose loss or gradient is not finite.
        clip_grad_norm: Largest norm of all gradients together, above 0; None for no clipping.
        clip_grad_value: Largest absolute value of a gradient, above 0; None for no clipping.
        num_workers: Number of processes that load data; with 0 the training process loads it. Of a stream, each reads a
            share, which its `__iter__` finds by `torch.utils.data.get_worker_info()`; a resumed run needs as many.
        drop_last: Whether to leave out the last batch of an epoch if it is short.
        shuffle: Whether each epoch reads the samples in another order, a function of the seed and the epoch. None
            shuffles, unless `sampler` or a stream gives the order.
        sampler: Dotted path, or `kind` with settings, of a sampler such as `torch.utils.data.WeightedRandomSampler`, or
            of a function that returns the indices of an epoch. It is called for each epoch with those of `dataset`,
            `seed`, `epoch` and `generator` that it has parameters for; `set_epoch(epoch)` is called where it exists.
            It may yield batches of `effective_batch_size` samples.
        checkpoints: How checkpoints are written.
        donate: Whether an update may write to the tensors of the state that it starts from: faster, with less memory,
            and the same bits. A tensor that a callback keeps is copied first.
        compile: Whether `torch.compile` compiles each update as a whole: faster after some seconds, and equal up to the
            last bits. If an update cannot be compiled, a warning says why.
        parallel: What each of several processes, as torchrun starts them, holds: `replicate` for the whole model and
            optimizer, with gradients averaged over processes; `shard` for a part of the rows of each parameter of at
            least 1,024 numbers, and of the optimizer's memory of it. An update and an evaluation gather whole
            parameters. One process holds all.
        rank_timeout_s: Seconds, above 0, that one of several processes waits for the others before it gives up. Rank 0
            saves and closes the run within this time, too.
        record: `events` writes what `noether replay` needs to `events.jsonl`, which reads every loss from its device at
            every update. None writes nothing.

    Raises:
        SettingsError: If a value is out of range, or there is not exactly one end.

    Example:
        >>> TrainerSettings(max_epochs=10, max_updates=5, effective_batch_size=0, loss="my.loss")
        Traceback (most recent call last):
        noether.core.errors.SettingsError: max_updates: max_epochs and max_updates are given; expected exactly one of
        max_epochs, max_updates, max_samples
        effective_batch_size: 0 is not a whole number of at least 1
    """

    max_epochs: int | None = None
    max_updates: int | None = None
    max_samples: int | None = None
    max_hours: float | None = None
    effective_batch_size: int
    max_batch_size: int | None = None
    eval_batch_size: int | None = None
    loss: Loss
    evaluate: EvaluateSettings | None = None
    evaluate_first: bool = False
    device: str = "cpu"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    nonfinite: Literal["apply", "skip", "raise"] = "apply"
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    num_workers: int = 0
    drop_last: bool = False
    shuffle: bool | None = None
    sampler: Sampler | None = None
    checkpoints: CheckpointSettings = CheckpointSettings()
    donate: bool = True
    compile: bool = False
    parallel: Literal["replicate", "shard"] = "replicate"
    rank_timeout_s: float = 600.0
    record: Literal["events"] | None = None

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        yield from _exactly_one(self, ENDS)
        yield check_whole("effective_batch_size", self.effective_batch_size)
        for name in ("max_batch_size", "eval_batch_size"):
            yield None if getattr(self, name) is None else check_whole(name, getattr(self, name))
        for name in ("max_hours", "clip_grad_norm", "clip_grad_value", "rank_timeout_s"):
            yield None if getattr(self, name) is None else check_number(name, getattr(self, name), above=True)
        if self.shuffle is not None and self.sampler is not None:
            yield Problem("shuffle", "the sampler gives the order of the samples; remove one of them")
        if self.clip_grad_norm is not None and self.clip_grad_value is not None:
            yield Problem("clip_grad_value", "clip_grad_norm is given too; remove one of them")
        yield check_whole("num_workers", self.num_workers, at_least=0)
        if self.evaluate_first and self.evaluate is None:
            yield Problem("evaluate_first", "needs the setting `evaluate`, which is missing")
        if not re.fullmatch(r"[a-z]+(:\d+)?", self.device):
            yield Problem("device", f"{self.device!r} is not a device such as 'auto', 'cpu', 'cuda' or 'cuda:1'")


def _exactly_one(settings: object, names: Collection[str]) -> Iterator[Problem | None]:
    given = [name for name in names if getattr(settings, name) is not None]
    yield from (check_whole(name, getattr(settings, name)) for name in given)
    if len(given) != 1:
        missing = "no interval is given" if names is INTERVALS else "no end is given"
        count = f"{' and '.join(given)} are given" if given else missing
        yield Problem(given[-1] if given else "", f"{count}; expected exactly one of {', '.join(names)}")
