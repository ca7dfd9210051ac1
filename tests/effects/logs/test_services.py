"""Log services that fail stop neither training nor saves, and keep no state alive."""

import weakref

import pytest
import torch
from service_runs import TIME_S, at, log, open_with, open_with_wandb

from noether import (
    AfterUpdate,
    LogScalars,
    LogText,
    SaveCheckpoint,
    SetSummary,
)
from noether.core.tensors.tree import freeze
from noether.effects.logs.tensorboard import TensorBoard
from noether.effects.logs.wandb import WeightsAndBiases


class Broken:
    """A service whose methods all fail."""

    name = "broken"

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def fail(*_):
            self.calls.append(name)
            raise ConnectionError(f"no route to host for {name}")

        return fail


def log_and_save(directory, state):
    """Log every effect that goes to a service, and save a checkpoint."""
    effects = [LogText("hello"), LogScalars(freeze({"loss": 0.5})), SetSummary(freeze({"best": 1})), SaveCheckpoint()]
    directory.interpreter(effects, state, AfterUpdate(time_s=TIME_S))


def test_a_failing_service_stops_neither_training_nor_a_save(folder, caplog):
    broken = Broken()
    with open_with(folder, broken) as directory:
        for update in (1, 2, 3):
            log_and_save(directory, at(update))
        assert caplog.messages == [
            (
                "broken failed and may have lost log entries; training continues: "
                "ConnectionError: no route to host for log_text"
            )
        ]
    assert broken.calls == ["log_text", "log_scalars", "set_summary", "flush"] * 3 + ["close"]
    assert caplog.messages[1:] == ["broken failed 13 times in total"]
    with open_with(folder) as directory:
        assert directory.load().iteration == at(3).iteration
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_service_that_fails_to_resume_does_not_stop_the_run(folder, caplog):
    with open_with(folder) as directory:
        log_and_save(directory, at(1))
    with open_with(folder, Broken()) as directory:
        assert directory.resume().iteration == at(1).iteration
        log_and_save(directory, at(2))
    assert caplog.messages[-1] == "broken failed 6 times in total"


SERVICES = {
    "tensorboard": TensorBoard,
    "wandb": lambda path: WeightsAndBiases(path, "digits-1", mode="offline"),
}


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("blocked_path", ["the directory", "above it"])
def test_an_unwritable_directory_stops_neither_training_nor_a_save(folder, name, blocked_path, logged_out, caplog):
    """Blocked by a file, because permissions do not apply to root."""
    path = folder / name if blocked_path == "the directory" else folder / "file" / name
    file = path if blocked_path == "the directory" else path.parent
    file.parent.mkdir(parents=True)
    file.touch()
    with open_with(folder, SERVICES[name](path)) as directory:
        directory.truncate_logs(None)
        for update in (1, 2, 3):
            log_and_save(directory, at(update))
    first, total = caplog.messages
    assert first.startswith(f"{name} failed and may have lost log entries; training continues: ")
    assert str(path) in first or str(file) in first
    assert total == f"{name} failed 6 times in total"
    with open_with(folder) as directory:
        assert directory.load().iteration == at(3).iteration
    assert file.read_bytes() == b""


def test_a_failed_service_keeps_no_state_alive(folder, logged_out):
    """Otherwise the params of every logged update would stay in memory."""
    folder.mkdir()
    (folder / "wandb").touch()
    directory, kept = open_with_wandb(folder), []
    for update in (1, 2, 3):
        params = {"weight": torch.ones(1)}
        kept.append(weakref.ref(params["weight"]))
        log(directory, at(update, params=params), loss=1.0)
        del params
        (folder / "wandb").unlink(missing_ok=True)
    assert [each() for each in kept] == [None] * 3
    assert not (folder / "wandb").exists()  # it is not tried again, which may take a minute and a half each time
    directory.close()
