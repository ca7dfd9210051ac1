"""`noether eval`: evaluates a checkpoint of a run."""

import errno
import json
import os
import shutil

import pytest
from command import SMALL, contents, invoke, lines, only_run

from noether.effects import evaluation_logs


@pytest.mark.parametrize(
    ("arguments", "tag"),
    [
        ((), "E2_U76_S2410"),
        (("--checkpoint", "E1_U38_S1205"), "E1_U38_S1205"),
        (("--checkpoint", "best_model.val.accuracy"), "E2_U76_S2410"),
    ],
)
def test_eval_equals_the_measurements_in_training(finished_run, tmp_path, arguments, tag):
    before = contents(finished_run)
    output = invoke("eval", finished_run.relative_to(tmp_path), *arguments, cwd=tmp_path)
    file = finished_run.relative_to(tmp_path) / f"eval/{tag}.json"
    measured = json.loads((tmp_path / file).read_text())
    update = int(tag.split("_")[1].removeprefix("U"))
    logged = next(
        line["metrics"] for line in lines(finished_run) if line["event"] == "after_epoch" and line["update"] == update
    )
    assert set(measured) == {"loss/val/cross_entropy", "loss/val/total", "val/accuracy"}
    assert measured == {key: logged[key] for key in measured}
    assert output.splitlines()[-1] == f"written to {file}"
    assert tag in output
    assert [f"{value:.6g}" in output and key in output for key, value in measured.items()] == [True] * 3
    assert contents(finished_run).keys() - before.keys() == {(tmp_path / file).relative_to(finished_run)}


def test_a_second_eval_overwrites_nothing(finished_run, tmp_path):
    first = finished_run / "eval/E1_U38_S1205.json"
    first.parent.mkdir()
    first.write_text("{}")
    output = invoke("eval", finished_run, "--checkpoint", "E1", "--data", "val", cwd=tmp_path)
    output += invoke("eval", finished_run, "--checkpoint", "U38", cwd=tmp_path)
    files = ["E1_U38_S1205.2.json", "E1_U38_S1205.json", "E1_U38_S1205.val.json"]
    assert sorted(path.name for path in first.parent.iterdir()) == files
    assert (first.read_text(), output.count("written to")) == ("{}", 2)
    metrics = [json.loads((first.parent / name).read_text()) for name in files[::2]]
    assert metrics[0] == metrics[1]
    assert metrics[0]["val/accuracy"] > 0


def test_eval_of_a_run_that_cannot_be_written_prints_the_metrics_and_warns(finished_run, tmp_path, monkeypatch):
    run = finished_run.relative_to(tmp_path)
    printed = invoke("eval", run, cwd=tmp_path).splitlines()[:-1]
    shutil.rmtree(finished_run / "eval")

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(run / "eval"))

    with monkeypatch.context() as patched:
        patched.setattr(evaluation_logs, "make_directories", refuse)
        output = invoke("eval", run, cwd=tmp_path).splitlines()
    file = run / "eval/E2_U76_S2410.json"
    warning = f"Warning: the metrics above cannot be written to {file}"
    assert (output[:-1], output[-1]) == (printed, f"{warning}: Read-only file system")
    (finished_run / "eval").write_text("a file takes the place of the folder")
    output = invoke("eval", run, cwd=tmp_path).splitlines()
    assert (output[:-1], output[-1]) == (printed, f"{warning}: Not a directory")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("latst", "; did you mean 'latest'?"), ("E1_U38_S1206", "; did you mean 'E1_U38_S1205'?"), ("?", "")],
)
def test_eval_names_the_existing_checkpoints(finished_run, tmp_path, name, nearest):
    before = contents(tmp_path)
    run = finished_run.relative_to(tmp_path)
    output = invoke("eval", run, "--checkpoint", name, cwd=tmp_path, code=2)
    known = output.partition("there are: ")[2].removesuffix(f"{nearest}\n")
    tags = {"E1_U38_S1205", "E2_U76_S2410"}
    assert set(known.split(", ")) == {"latest", "last", "best_model.val.accuracy"} | tags
    assert output == (
        f"Error: --checkpoint {name}: no checkpoint {name!r} in {run}/checkpoints; there are: {known}{nearest}\n"
    )
    assert contents(tmp_path) == before


def test_eval_refuses_a_directory_without_a_run(tmp_path):
    message = "is not the directory of a run: it has no config.yaml; give one like runs/NAME/RUN_ID"
    assert invoke("eval", "nowhere", cwd=tmp_path, code=2) == f"Error: nowhere: {message}\n"
    assert invoke("eval", ".", cwd=tmp_path, code=2) == f"Error: .: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_eval_refuses_a_damaged_checkpoint(finished_run, tmp_path):
    path = finished_run.relative_to(tmp_path) / "checkpoints/E1_U38_S1205/weights.safetensors"
    content = bytearray((tmp_path / path).read_bytes())
    content[-1] ^= 1
    (tmp_path / path).write_bytes(content)
    output = invoke("eval", path.parents[2], "--checkpoint", "E1_U38_S1205", cwd=tmp_path, code=1)
    assert output == f"Error: {path} is damaged: its content is not what was written\n"
    assert not (finished_run / "eval").exists()


def test_eval_needs_a_data_iterator(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    invoke("train", "small.yaml", "--set", "callbacks=[]", "--set", "trainer.max_updates=1", "--set", "run.output=new",
           "--set", "trainer.evaluate=null", cwd=tmp_path)  # fmt: skip
    run = only_run(tmp_path / "new/small").relative_to(tmp_path)
    output = invoke("eval", run, cwd=tmp_path, code=2)
    assert output == (
        f"Error: {run}/config.yaml:{_line(tmp_path / run, 'callbacks:')}: callbacks: no callback evaluates data; "
        "add trainer.evaluate: {val: [loss], every_n_epochs: 1}, or give --data NAME\n"
    )


def _line(run, text):
    return next(n for n, line in enumerate((run / "config.yaml").read_text().splitlines(), 1) if line.startswith(text))
