"""`configs/heat.yaml` through the real command line: it learns, saves the best, and evaluates averages."""

import json

import pytest
from command import ROOT, invoke, lines, noether, only_run, pointer

EPOCHS = 3  # of 20: enough to see that it learns


def data_settings(folder, size):
    """Return the arguments that set the points of a side of the grid, and where the datasets are cached."""
    settings = {"size": size, "cache": folder / "cache"}
    splits = ("train", "val", "test")
    return [f"--set=data.{split}.{name}={value}" for split in splits for name, value in settings.items()]


@pytest.fixture(scope="session", params=[16, pytest.param(32, marks=pytest.mark.slow)])
def size(request):
    return request.param


@pytest.fixture(scope="session")
def heat(tmp_path_factory, size):
    """Folder of a shortened run of `configs/heat.yaml`, its dataset cached beside it."""
    folder = tmp_path_factory.mktemp("heat")
    words = [*data_settings(folder, size), f"--set=trainer.max_epochs={EPOCHS}"]
    done = noether("train", ROOT / "configs/heat.yaml", *words, cwd=folder)
    assert done.stderr == ""  # no progress bar without a terminal
    return folder


def test_the_error_on_the_test_set_is_below_five_percent(heat):
    run = only_run(heat / "runs/heat")
    noether("eval", run, "--checkpoint", "last", cwd=heat)
    measured = json.loads((run / f"eval/{pointer(run, 'last')}.json").read_text())
    assert measured["test/relative_l2"] < 0.05
    noether("eval", run, "--checkpoint", "latest", "--weights", "ema=0.99", cwd=heat)
    average = json.loads((run / f"eval/{pointer(run, 'latest')}.ema=0.99.json").read_text())
    assert average["test/relative_l2"] == measured["test/relative_l2/ema=0.99"]


def test_outputs_averages_and_best_values_are_logged(heat):
    run = only_run(heat / "runs/heat")
    epochs = [line["metrics"] for line in lines(run) if line["event"] == "after_epoch"]
    assert len(epochs) == EPOCHS
    errors = [epoch["val/relative_l2/ema=0.99"] for epoch in epochs]
    assert errors == sorted(errors, reverse=True)
    assert epochs[-1]["val/relative_l2/ema=0.99/best"] == errors[-1]
    assert all(0 < epoch["heat_drift/E1"] < 1 for epoch in epochs)
    assert {"loss/online/field/E1", "loss/online/gradient/E1", "loss/online/total/E1"} <= set(epochs[0])
    best = "best_model.val.relative_l2.ema=0.99"
    assert pointer(run, best) == pointer(run, f"{best}.tolerance=2") == pointer(run, f"{best}.tolerance=4")


def test_the_dataset_is_generated_once(heat, size):
    def modification_times():
        return {path.name: path.stat().st_mtime_ns for path in (heat / "cache").iterdir()}

    before = modification_times()
    assert len(before) == 3
    assert all(not name.startswith(".") for name in before)
    invoke("validate", ROOT / "configs/heat.yaml", *data_settings(heat, size), cwd=heat)  # builds the datasets again
    assert modification_times() == before
