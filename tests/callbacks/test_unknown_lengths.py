"""Every shipped callback in a loop that knows nothing about its run: it works, or it is refused before training."""

import pytest
import torch

from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.callbacks.evaluation import OfflineLossCallback
from noether.core.errors import SettingsError
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.testing.shipped import SETTINGS, all_examples

NEED_FACTS = {"ParamCountCallback", "DatasetStatsCallback", "HyperparamsCallback"}
EXAMPLES = [
    each
    for interval in ("every_n_epochs", "every_n_updates", "every_n_samples")
    for each in all_examples(interval, 2)
    if type(each).__name__ in SETTINGS
    # Others read what a callback logs or remembers, or outputs.
    if not getattr(each, "metric_key", None)
    and not getattr(each, "weights", None)
    and type(each).__name__ != "TrackOutputsCallback"
]


@pytest.mark.parametrize("run", [Run(), Run(end=TrainingIteration(epoch=3)), Run(end=TrainingIteration(sample=30))])
@pytest.mark.parametrize("callback", EXAMPLES, ids=lambda each: each.name)
def test_a_loop_without_facts_works_or_is_refused_at_its_start(callback, run):
    reducer = compose(callback)
    state = TrainState(params={"weight": torch.ones(2)})
    if type(callback).__name__ in NEED_FACTS or isinstance(callback, PeriodicDataIteratorCallback):
        with pytest.raises(SettingsError, match=r"pass Run\("):
            reducer(state, BeforeTraining(run=run))
        return
    state, _ = reducer(state, BeforeTraining(run=run))
    for updates in (3, 1, 4):
        for _ in range(updates):
            losses = {"total": torch.ones(())}
            readings = {"lr": {"default": 0.1}, "weight_decay": {}, "grad_norm": torch.ones(()), "finite": True}
            readings["gradients"] = {"weight": torch.ones(2)}
            event = AfterUpdate(run=run, samples=4, losses=losses, duration_s=0.1, **readings)
            state, _ = reducer(state.advance(samples=4), event)
        state, _ = reducer(state.next_epoch(), AfterEpoch(run=run))
    state, _ = reducer(state.replace(ended=True), AfterTraining(run=run))
    assert state.iteration == TrainingIteration(3, 8, 32)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, r"Loss.* iterates 'val', and the run has no data: pass Run\(data=\{'val': loader\}, forward=...\)"),
        ({"data": {"vla": []}}, r"Loss.* iterates 'val', and the run has 'vla'; did you mean 'vla'\?: pass Run\("),
        (
            {"data": {"val": []}},
            r"Loss.* evaluates the model, and the run has no forward: pass Run\(forward=...\), a fun",
        ),
    ],
)
def test_a_loop_without_the_data_of_an_evaluation_is_refused_at_its_start(facts, message):
    reducer = compose(OfflineLossCallback(every_n_epochs=1, dataset_key="val"))
    with pytest.raises(SettingsError, match=message):
        reducer(TrainState(), BeforeTraining(run=Run(**facts)))
