"""TensorBoard and Weights & Biases show artifacts, read back from their files."""

import logging
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noether import (
    AfterUpdate,
    LogFigure,
    LogFile,
    LogHistogram,
    LogImages,
    LogTable,
    LogText,
    SaveCheckpoint,
    TrainingIteration,
    TrainState,
)
from noether.effects import open_run
from noether.effects.logs.tensorboard import TensorBoard
from noether.effects.logs.wandb import WeightsAndBiases

TIME_S = 1.6e9


def at(update):
    return TrainState(iteration=TrainingIteration(update=update, sample=4 * update))


def all_kinds():
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([1, 2])
    return [
        LogFigure("figure", figure, "a line"),
        LogFigure("svg", b"<svg></svg>"),
        LogImages("images", torch.rand(2, 3, 8, 8), captions=("one", "two")),
        LogHistogram("histogram", [0.0, 1.0, 1.0], bins=2),
        LogTable("table", ["a", "b"], [[1, "x|y"], [float("nan"), None]]),
        LogText("a <report>", key="text"),
        LogFile("file", b"abc", "mesh.obj"),
    ]


def read_tensorboard(folder):
    sizes = {"images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes).Reload()


def test_tensorboard_shows_artifacts_and_says_once_what_it_cannot_show(tmp_path, caplog):
    with open_run(tmp_path, services=[TensorBoard(tmp_path / "tensorboard")]) as directory:
        for update in (1, 2):
            directory.interpreter(all_kinds(), at(update), AfterUpdate(time_s=TIME_S))
    read = read_tensorboard(tmp_path)
    (image, _) = read.Images("figure")
    assert (image.step, image.width, image.height) == (1, 100, 50)
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert [(each.step, each.width, each.height) for each in read.Images("images")] == [(1, 17, 8), (2, 17, 8)]
    histogram = read.Histograms("histogram")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (0.0, 1.0, 3)
    assert (list(histogram.bucket), list(histogram.bucket_limit)) == ([1, 2], [0.5, 1.0])
    shown = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert shown["table"] == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| NaN | None |"
    assert shown["text"] == "a <report>"
    assert caplog.messages == [
        "TensorBoard cannot show SVG figures, such as 'svg': it is in artifacts/ of the run",
        "TensorBoard cannot show files, such as 'file': it is in artifacts/ of the run",
    ]


def test_a_resume_rewinds_artifacts_in_tensorboard(tmp_path):
    for updates in (range(1, 5), range(3, 4)):
        with open_run(tmp_path, services=[TensorBoard(tmp_path / "tensorboard")]) as directory:
            directory.resume()
            for update in updates:
                effects = [LogText(str(update), key="text"), *([SaveCheckpoint()] if update == 2 else [])]
                directory.interpreter(effects, at(update), AfterUpdate(time_s=TIME_S))
    assert [each.step for each in read_tensorboard(tmp_path).Tensors("text")] == [1, 2, 3]


def test_wandb_gets_every_kind(tmp_path, logged_out, caplog):
    caplog.set_level(logging.WARNING, "noether")
    with open_run(tmp_path, services=[WeightsAndBiases(tmp_path / "wandb", "x", mode="offline")]) as directory:
        directory.interpreter(all_kinds(), at(1), AfterUpdate(time_s=TIME_S))
    assert [each for each in caplog.messages if "failed" in each] == []
    media = [path.relative_to(path.parents[1]) for path in (tmp_path / "wandb").rglob("media/*/*")]
    names = {Path(path).name.partition("_")[0] for path in media}
    assert {"figure", "images", "svg", "text", "table"} <= names
