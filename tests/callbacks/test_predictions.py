import pytest
import torch

from noether import AfterEpoch, BeforeTraining, LogFigure, LogTable, Run, TrainState
from noether.core.callbacks import PredictionsCallback
from noether.core.errors import OutputError, SettingsError

PNG = b"\x89PNG\r\n\x1a\n"
BATCHES = [torch.zeros(0), torch.tensor([1.0, 2.0]), torch.tensor([3.0])]


def fire(figure, batches=BATCHES):
    seen = []

    def forward(state, batch):
        seen.append(batch.tolist())
        return {}, 2 * batch

    run = Run(data={"val": batches}, forward=forward)
    effects = PredictionsCallback(every_n_epochs=1, dataset_key="val", figure=figure)(
        TrainState().next_epoch(), AfterEpoch(run=run)
    )[1]
    return effects, seen


def test_only_the_first_batch_with_samples_is_predicted():
    (effect,), seen = fire(lambda outputs, batch: LogTable("table", ["x", "y"], [*zip(batch, outputs, strict=True)]))
    assert seen == [[1.0, 2.0]]
    assert effect.key == "table"


def test_bytes_and_figures_become_a_figure_of_the_dataset():
    (effect,), _ = fire(lambda outputs, batch: PNG)
    assert isinstance(effect, LogFigure)
    assert effect.key == "val/predictions"


def test_a_function_that_returns_something_else_is_an_error_that_says_what_to_return():
    with pytest.raises(OutputError, match="figure returned a NoneType; return a figure of matplotlib"):
        fire(lambda outputs, batch: None)


def test_a_dataset_without_samples_is_named():
    (effect,), seen = fire(lambda outputs, batch: PNG, [])
    assert "val has no samples" in effect.text
    assert seen == []


def test_a_run_without_the_dataset_is_refused_before_training():
    callback = PredictionsCallback(every_n_epochs=1, dataset_key="vla", figure=print)
    with pytest.raises(SettingsError, match="did you mean 'val'"):
        callback(TrainState(), BeforeTraining(run=Run(data={"val": []}, forward=print)))
