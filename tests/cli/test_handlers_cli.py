"""Handlers of the user's in `run.handlers`: what they get, and effects that nothing would handle."""

import json

import pytest
from command import contents, invoke, noether, only_run

MODULE = """
from dataclasses import dataclass

import torch

from noether import BeforeTraining, Effect, callback, every_n_epochs
from noether.core.callbacks.base import CallbackBase


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([float(index), 1.0]) / 8


def loss(outputs, batch):
    return {"square": outputs.square().mean()}


@dataclass(frozen=True)
class Ring(Effect):
    times: int


class Bell(CallbackBase):
    effects = (Ring,)

    def after_epoch(self, state, event):
        return state, (Ring(state.iteration.epoch),)

    def at_eval(self, state, event):
        return state, (Ring(7),)


class Silent(CallbackBase):
    def after_epoch(self, state, event):
        return state, (Ring(1),)


@callback("ringing", effects=(Ring,))
@every_n_epochs(1)
def ringing(state, event):
    return state, (Ring(1),)


def late(state, event):
    return state, ((Ring(1),) if state.iteration.update == 2 else ())


def counted(state, event):
    if type(event).__name__ == "AfterUpdate":
        with open("calls.txt", "a") as file:
            file.write(f"{state.iteration.update}\\n")
    return state, ()


def failing(state, event):
    return state, (Ring(1 + 0 * event.no_such_field),)


def ring_bell(effect, state, event, *, directory, services, sound="ding"):
    with (directory / "bell.txt").open("a") as file:
        file.write(f"{sound} {effect.times} {sorted(services)}\\n")


def hear(effect, state, event, *, directory=None, **other):
    with open("heard.txt", "a") as file:
        file.write(f"{directory} {sorted(other)}\\n")


def ring_loudly(effect, state, event, *, directory, volume):
    (directory / "loud.txt").write_text(str(volume))
"""

CONFIG = """\
run:
  name: bells
  output: out
  handlers: HANDLERS
model: {kind: torch.nn.Linear, in_features: 2, out_features: 1}
data: {train: {kind: bells.Data}}
optimizer: {kind: torch.optim.SGD, lr: 0.1}
trainer: {effective_batch_size: 4, loss: bells.loss, max_epochs: 2}
callbacks:
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_weights: true, save_optim: true}
  - {kind: bells.CALLBACK}
"""
RING = "{bells.Ring: bells.ring_bell}"


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a configuration with handlers and a callback, and returns its folder."""

    def write_config(handlers="{}", callback="Bell", run=""):
        (tmp_path / "bells.py").write_text(MODULE)
        text = CONFIG.replace("HANDLERS", handlers).replace("CALLBACK", callback).replace("run:\n", f"run:\n{run}")
        (tmp_path / "bells.yaml").write_text(text)
        return tmp_path

    return write_config


def message(callback, label):
    return (
        f"bells.yaml:11: {callback}: {label} requests the effect Ring, which has no handler: write a function "
        "handle_ring(effect, state, event), and name it in YAML, run.handlers: {bells.Ring: bells.handle_ring}, or in "
        "Python, interpreter=directory.interpreter.with_handlers(bells.Ring, handle_ring)"
    )


def test_a_handler_gets_the_directory_and_the_services_in_use(write):
    folder = write(RING, run="  tensorboard: true\n")
    invoke("train", "bells.yaml", cwd=folder)
    run = only_run(folder / "out/bells")
    assert (run / "bell.txt").read_text() == "ding 1 ['tensorboard']\nding 2 ['tensorboard']\n"
    invoke("eval", run, cwd=folder)
    (bell,) = run.glob("eval/*/bell.txt")
    assert bell.read_text() == "ding 7 ['tensorboard']\n"
    assert json.loads((run / f"eval/{bell.parent.name}.json").read_text()) == {}
    assert (run / "bell.txt").read_text().count("\n") == 2


def test_a_setting_takes_precedence_and_keywords_of_other_names_stay_required(write):
    folder = write("{bells.Ring: {kind: bells.ring_bell, sound: dong}}")
    invoke("train", "bells.yaml", cwd=folder)
    run = only_run(folder / "out/bells")
    assert (run / "bell.txt").read_text() == "dong 1 []\ndong 2 []\n"
    folder = write("{bells.Ring: {kind: bells.hear, directory: theirs}}")
    invoke("train", "bells.yaml", "--smoke", cwd=folder)
    assert (folder / "heard.txt").read_text() == "theirs []\n"
    folder = write("{bells.Ring: bells.ring_loudly}")
    output = invoke("validate", "bells.yaml", cwd=folder, code=2)
    assert "'bells.ring_loudly' needs the setting volume: write {kind: bells.ring_loudly, volume: ...}" in output
    folder = write("{bells.Ring: {kind: bells.ring_loudly, volume: 11}}")
    assert "is valid" in invoke("validate", "bells.yaml", cwd=folder)


@pytest.mark.parametrize("argv", [("validate",), ("train",), ("train", "--smoke")], ids=["validate", "train", "smoke"])
@pytest.mark.parametrize("name", ["Bell", "ringing", "Silent", "late"])
def test_an_effect_without_a_handler_is_refused_before_anything_is_written(write, argv, name):
    folder = write(callback=name)
    before = contents(folder)
    output = invoke(argv[0], "bells.yaml", *argv[1:], cwd=folder, code=2)
    assert output == f"Error: {message('callbacks[1]', name)}\n"
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["Bell", "ringing"])
def test_a_plan_refuses_a_declared_effect_without_a_handler(write, name):
    output = invoke("plan", "bells.yaml", cwd=write(callback=name), code=2)
    assert output == f"Error: {message('callbacks[1]', name)}\n"


@pytest.mark.parametrize("name", ["Bell", "Silent"])
def test_an_effect_without_a_handler_is_refused_by_resume_and_a_declared_one_by_eval(write, name):
    folder = write(RING, callback=name)
    invoke("train", "bells.yaml", cwd=folder)
    run = only_run(folder / "out/bells")
    text = (run / "config.yaml").read_text()
    assert text.count("    bells.Ring: bells.ring_bell\n") == 1
    (run / "config.yaml").write_text(text.replace("    bells.Ring: bells.ring_bell\n", "    {}\n"))
    before = contents(run)
    for argv in (("train", "--resume", run), ("eval", run))[: 1 + (name == "Bell")]:
        output = invoke(*argv, cwd=folder, code=2)
        assert f"{name} requests the effect Ring, which has no handler" in output
    assert contents(run) == before


@pytest.mark.parametrize("name", ["Silent", "late"])
def test_a_plan_warns_of_an_effect_that_is_not_declared(write, name):
    folder = write(callback=name)
    assert f"Warning: {message('callbacks[1]', name)}\n" in invoke("plan", "bells.yaml", cwd=folder)
    folder = write(RING, callback=name)
    assert invoke("validate", "bells.yaml", cwd=folder) == "bells.yaml is valid: 2 callbacks, 4 updates\n"
    assert "no handler" not in invoke("plan", "bells.yaml", cwd=folder)


def test_training_calls_no_callback_before_it_starts_if_all_effects_have_handlers(write):
    folder = write(RING, callback="counted")
    noether("train", "bells.yaml", cwd=folder)  # in a process without the effects of other tests
    assert (folder / "calls.txt").read_text().splitlines() == ["1", "2", "3", "4"]


def test_a_callback_that_fails_without_training_is_not_refused(write):
    folder = write(callback="failing")
    assert invoke("validate", "bells.yaml", cwd=folder) == "bells.yaml is valid: 2 callbacks, 4 updates\n"
