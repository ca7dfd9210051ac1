"""The datasets that a configuration describes, in batches for training and for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from noether.core.progress import track_progress
from noether.session.randomness import derive, seed_all
from noether.training.data.batches import SampleCounter
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.data.orders import SamplerOrder
from noether.training.data.streamed import StreamedData
from noether.training.data.streamed_evaluation import StreamedEvaluationData
from noether.training.error_locations import build_located_function, locate_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from noether.config.schema import Config
    from noether.distributed.ranks import Ranks


def build_datasets(config: Config) -> dict[str, Any]:
    """Return the datasets of `data`, by key."""
    datasets = {}
    for key, kind in config.data.items():
        # A dataset that draws its split in its constructor has to draw the same split when the run is resumed.
        seed_all(derive(config.run.seed, f"data/{key}"))
        with locate_errors(config, ("data", key)):
            # One item of unknown length: the display says what takes long, before the constructor shows its own bar.
            (datasets[key],) = (each.build() for each in track_progress(iter([kind]), f"building data.{key}"))
    return datasets


def build_training_data(
    config: Config, dataset: Any, device: torch.device, ranks: Ranks
) -> TrainingData | StreamedData:
    """Return the training set in batches.

    Args:
        config: The configuration.
        dataset: The dataset `data.train`.
        device: Device of the batches.
        ranks: The ranks of the run; each loads its share of every update.

    Raises:
        ConfigError: If the dataset, its order or the batch size cannot be used.
    """
    trainer = config.trainer
    settings: dict[str, Any] = {
        "seed": config.run.seed,
        "effective_batch_size": trainer.effective_batch_size,
        "max_batch_size": trainer.max_batch_size,
        "drop_last": trainer.drop_last,
        "device": device,
        "name": "train",
        "count_samples": _sample_counter(config, dataset),
        "rank": ranks.rank,
        "world_size": ranks.world_size,
    }
    is_stream = isinstance(dataset, IterableDataset)
    sampler = _build_sampler(config, dataset)
    try:
        if is_stream:
            settings |= {"num_workers": trainer.num_workers, "run_samples": _samples_of_run(config)}
            return StreamedData(dataset, **settings)
        order: dict[str, Any] = {"shuffle": trainer.shuffle is not False, "sampler": sampler}
        return TrainingData(dataset, **settings, **order, num_workers=trainer.num_workers)
    except TypeError as error:
        raise config.error(("data", "train"), str(error)) from error
    except ValueError as error:
        raise config.error(("trainer", "effective_batch_size"), str(error)) from error


def build_evaluation_data(
    config: Config, datasets: Mapping[str, Any], device: torch.device
) -> dict[str, EvaluationData | StreamedEvaluationData]:
    """Return the datasets in batches, by key, without a stream that the run trains on: it would lose its position."""
    trainer = config.trainer
    size = trainer.eval_batch_size or trainer.max_batch_size or trainer.effective_batch_size
    settings: dict[str, Any] = {"seed": config.run.seed, "batch_size": size, "device": device}
    data: dict[str, EvaluationData | StreamedEvaluationData] = {}
    for key, dataset in datasets.items():
        with locate_errors(config, ("data", key)):
            settings |= {"name": key, "count_samples": _sample_counter(config, dataset)}
            if not isinstance(dataset, IterableDataset):
                data[key] = EvaluationData(dataset, **settings, num_workers=trainer.num_workers)
            elif key != "train":
                data[key] = StreamedEvaluationData(dataset, **settings)
    return data


def _samples_of_run(config: Config) -> int | None:
    """Return the samples after which the run ends; None if it ends after epochs."""
    trainer = config.trainer
    updates = -(-(trainer.max_samples or 0) // trainer.effective_batch_size) or trainer.max_updates
    return None if updates is None else updates * trainer.effective_batch_size


def _build_sampler(config: Config, dataset: Any) -> SamplerOrder | None:
    """Return the order of `trainer.sampler`; refuse an order for a stream, which has its own."""
    trainer = config.trainer
    name = "sampler" if trainer.sampler is not None else "shuffle"
    if isinstance(dataset, IterableDataset) and getattr(trainer, name):
        kind = type(dataset).__name__
        message = (
            f"data.train is a stream ({kind}), which gives its own order; remove it, and order samples in __iter__"
        )
        raise config.error(("trainer", name), message)
    if trainer.sampler is None or not hasattr(dataset, "__len__"):
        return None
    with locate_errors(config, ("trainer", "sampler")):
        return SamplerOrder(
            trainer.sampler, dataset, seed=config.run.seed, effective_batch_size=trainer.effective_batch_size
        )


def _sample_counter(config: Config, dataset: Any) -> SampleCounter:
    """Return what counts the samples of the batches of a dataset: `data.batch_size`, if it is given."""
    if config.batch_size is None:
        return SampleCounter(dataset)
    setting = f"{config.place(('data', 'batch_size'))}: data.batch_size: "
    return SampleCounter(dataset, build_located_function(config, ("data", "batch_size"), config.batch_size), setting)
