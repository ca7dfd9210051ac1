"""Runs that move with another `run.output`, and what is given in place of a run directory."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import CALLBACKS, LOSS, SAVE, contents, make_config

from noether.config import ConfigError
from noether.effects import CheckpointError
from noether.effects.disk import moves
from noether.training.runs.train import train

pytestmark = pytest.mark.usefixtures("tiny_module")


def files(run):
    """Return the names of all files of a run but those of a lock."""
    return {path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("output", ["there", "out/deeper", Path("there").absolute])
def test_a_moved_run_continues(output):
    output = output() if callable(output) else output
    uncut = train(make_config(), output="uncut")
    run = train(make_config(max_epochs=2))
    before = files(run.directory)
    moved = train(resume=run.directory, output=output, overrides=["trainer.max_epochs=4"])
    assert moved.directory == Path(output) / "tiny" / run.directory.name
    assert not run.directory.exists()
    assert (files(moved.directory) >= before, moved.metrics) == (True, uncut.metrics)
    config = (moved.directory / "config.yaml").read_text()
    assert f"output: {output}\n" in config
    assert "max_epochs: 4" in config


def test_a_run_that_has_ended_moves_too(notes):
    run = train(make_config(max_epochs=2))
    notes()
    moved = train(resume=run.directory, output="there")
    assert notes()[0] == f"{run.directory} moved to {moved.directory}"
    assert moved.ending == run.ending
    assert not run.directory.exists()
    assert train(resume=moved.directory, overrides=["trainer.max_epochs=3"]).state.iteration.epoch == 3


def test_the_same_directory_in_other_words_is_no_move(notes):
    run = train(make_config(max_epochs=2))
    Path("link").symlink_to("out")
    for output in ("out", "./out", Path("out").absolute(), "link", "out/../out"):
        notes()
        again = train(resume=run.directory, output=output)
        assert again.directory == run.directory
        assert "already ended" in notes()[0]
    assert not run.directory.is_symlink()


def test_a_linked_run_directory_moves_itself():
    run = train(make_config(max_epochs=2))
    Path("link").symlink_to(run.directory)
    moved = train(resume="link", output="there")
    assert moved.directory == Path("there/tiny") / run.directory.name
    assert not run.directory.exists()
    assert not moved.directory.is_symlink()


def test_another_file_system(tmp_path, monkeypatch):
    """Neither a rename nor a hard link reaches another file system."""

    def refuse(path, target, *_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    run = train(make_config(max_epochs=2))
    before = files_below(run.directory / "checkpoints")
    moved = train(resume=run.directory, output=tmp_path / "other")
    assert before
    assert files_below(moved.directory / "checkpoints") == before


def files_below(folder):
    """Return the bytes of every file, by path relative to the folder."""
    return {path.relative_to(folder): content for path, content in contents(folder).items()}


def test_a_target_that_exists_or_lies_in_the_run_is_refused():
    run = train(make_config(max_epochs=2))
    target = Path("there/tiny") / run.directory.name
    target.mkdir(parents=True)
    before = contents("out")
    with pytest.raises(ConfigError, match="exists already, so the run cannot move there"):
        train(resume=run.directory, output="there")
    target.rmdir()
    target.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="exists already, so the run cannot move there"):
        train(resume=run.directory, output="there")
    with pytest.raises(ConfigError, match="lies in the run itself; give a folder outside of it"):
        train(resume=run.directory, output=run.directory / "artifacts")
    assert contents("out") == before


def test_a_refused_resume_does_not_move():
    run = train(make_config(max_epochs=2))
    before = contents(".")
    with pytest.raises(ConfigError, match="the run has no such memory"):
        train(resume=run.directory, output="there", drop_memory=["nothing"])
    assert contents(".") == before


def test_a_full_disk_leaves_the_run_where_it_is(monkeypatch):
    run = train(make_config(max_epochs=2))
    before = contents("out")

    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(moves, "write_new_file", fill)
        with pytest.raises(
            OSError, match=r"could not be moved to there/tiny/.*: No space left on device; no file of it is lost"
        ):
            train(resume=run.directory, output="there")
    assert contents("out") == before
    assert contents("there") == {}
    assert train(resume=run.directory, output="there", overrides=["trainer.max_epochs=3"]).state.iteration.epoch == 3


class Stop(BaseException):
    """Ends a move as a kill does: no code of the library catches it."""


@pytest.mark.parametrize("call", ["_copy_tree", "_remove_source", "remove_tree"])
@pytest.mark.parametrize("repeat", ["the same command", "the source", "the target"])
def test_a_killed_move_is_completed_or_undone(monkeypatch, call, repeat):
    run = train(make_config({"kind": f"{CALLBACKS}.FixedUpdateEarlyStopping", "stop_at_epoch": 1}))
    target = Path("there/tiny") / run.directory.name
    request = {"resume": run.directory, "output": "there", "overrides": ["callbacks.2.stop_at_epoch=3"]}

    def stop(*_):
        raise Stop

    with monkeypatch.context() as killed:
        killed.setattr(moves, call, stop)
        with pytest.raises(Stop):
            train(**request)
    if repeat == "the source" and run.directory.exists():
        request = {"resume": run.directory, "overrides": request["overrides"]}
    if repeat == "the target" and target.exists():
        request = {"resume": target, "overrides": request["overrides"]}
    again = train(**request)
    assert again.state.iteration.epoch == 3
    (left,) = [path for path in Path().glob("*/tiny/*") if path.is_dir()]
    assert left.absolute() == again.directory.absolute()
    assert (left == target) == (repeat != "the source" or call != "_copy_tree")
    assert not any(path.name == ".move.json" for path in files(left))


# What is given in place of a run directory


def test_a_wrong_run_directory_is_described():
    run = train(make_config(max_epochs=1)).directory
    older = shutil.copytree(run, run.with_name("20200101-000000"))
    assert older.exists()
    Path("empty").mkdir()
    Path("config.yaml").write_text("")  # of the user's, not of a run
    newest = f"the newest of the 2 runs in it is {run}"
    for path, message in {
        "nothing": "is not the directory of a run: it has no config.yaml; give one like runs/NAME/RUN_ID",
        "tiny.py": "is not the directory of a run: it has no config.yaml; give one like runs/NAME/RUN_ID",
        "empty": "is not the directory of a run: it has no config.yaml; give one like runs/NAME/RUN_ID",
        "out": newest,
        "out/tiny": newest,
        run / "config.yaml": f"lies in the directory of a run; give {run}",
        run / "checkpoints": f"lies in the directory of a run; give {run}",
    }.items():
        with pytest.raises(ConfigError) as error:
            train(resume=path)
        assert str(error.value).startswith(f"{path}: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert list(Path("empty").iterdir()) == []


# Checkpoints from which no run can resume


def saves_part(models):
    return {**SAVE, "save_optim": False, "save_latest_optim": False, "model_names": models}


EMA = {"kind": f"{CALLBACKS}.EMACallback", "every_n_epochs": 1, "target_factors": [0.9]}


@pytest.mark.parametrize(
    ("callback", "tag"),
    [(EMA, "E2_U4_S16.ema=0.9"), (saves_part([]), "E2_U4_S16"), (saves_part(["0"]), None)],
    ids=["ema", "weights", "part"],
)
def test_a_run_without_a_resumable_checkpoint_names_the_command_that_works(callback, tag):
    config = {**make_config(), "callbacks": [LOSS, callback]}
    config["model"] = {"kind": "tiny.make_model"}
    run = train(config).directory
    for path in (run / "checkpoints").iterdir():  # as if the run had been killed after its second epoch
        name = path.read_text().split()[0] if path.is_file() else path.name
        if not name.startswith(("E1_", "E2_")):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    before = contents("out")
    with pytest.raises(CheckpointError) as error:
        train(resume=run)
    command = f"noether train {run}/config.yaml"
    command += "" if tag is None else f" --set run.init_from={run}/checkpoints/{tag}"
    assert str(error.value).splitlines()[-1] == f"Start a new run: {command}"
    assert contents("out") == before
    _, _, path, *settings = command.split()
    assert train(path, overrides=settings[1:]).finished
