"""`noether eval`: a checkpoint measured again."""

import json

import pytest
from command import SMALL, contents, invoke, lines, only_run


@pytest.mark.parametrize(
    ("arguments", "tag"),
    [
        ((), "E2_U76_S2410.2"),
        (("--checkpoint", "E1_U38_S1205"), "E1_U38_S1205"),
        (("--checkpoint", "best_model.val.accuracy"), "E2_U76_S2410"),
    ],
)
def test_eval_agrees_with_what_training_measured(finished, tmp_path, arguments, tag):
    before = contents(finished)
    output = invoke("eval", finished.relative_to(tmp_path), *arguments, cwd=tmp_path)
    kept = finished.relative_to(tmp_path) / f"eval/{tag}.json"
    measured = json.loads((tmp_path / kept).read_text())
    update = int(tag.split("_")[1].removeprefix("U"))
    then = next(
        line["metrics"] for line in lines(finished) if line["event"] == "after_epoch" and line["update"] == update
    )
    assert set(measured) == {"loss/val/cross_entropy", "loss/val/total", "val/accuracy"}
    assert measured == {key: then[key] for key in measured}
    assert output.splitlines()[0] == f"written to {kept}"
    assert tag in output
    assert [f"{value:.6g}" in output and key in output for key, value in measured.items()] == [True] * 3
    assert contents(finished).keys() - before.keys() == {(tmp_path / kept).relative_to(finished)}


def test_eval_again_replaces_what_it_measured(finished, tmp_path):
    (finished / "eval").mkdir()
    (finished / "eval/E1_U38_S1205.json").write_text("{}")
    invoke("eval", finished, "--checkpoint", "E1_U38_S1205", cwd=tmp_path)
    assert json.loads((finished / "eval/E1_U38_S1205.json").read_text())["val/accuracy"] > 0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("latst", "; did you mean 'latest'?"), ("E1_U38_S1206", "; did you mean 'E1_U38_S1205'?"), ("?", "")],
)
def test_eval_names_the_checkpoints_there_are(finished, tmp_path, name, nearest):
    before = contents(tmp_path)
    run = finished.relative_to(tmp_path)
    output = invoke("eval", run, "--checkpoint", name, cwd=tmp_path, code=2)
    known = output.partition("there are: ")[2].removesuffix(f"{nearest}\n")
    tags = {"E1_U38_S1205", "E2_U76_S2410", "E2_U76_S2410.2"}
    assert set(known.split(", ")) == {"latest", "last", "best_model.val.accuracy"} | tags
    assert output == (
        f"Error: --checkpoint {name}: no checkpoint {name!r} in {run}/checkpoints; there are: {known}{nearest}\n"
    )
    assert contents(tmp_path) == before


def test_eval_refuses_what_is_not_a_run(tmp_path):
    right = "is not the directory of a run: it has no config.yaml; give one like runs/NAME/RUN_ID"
    assert invoke("eval", "nowhere", cwd=tmp_path, code=2) == f"Error: nowhere: {right}\n"
    assert invoke("eval", ".", cwd=tmp_path, code=2) == f"Error: .: {right}\n"
    assert list(tmp_path.iterdir()) == []


def test_eval_refuses_a_damaged_checkpoint(finished, tmp_path):
    path = finished.relative_to(tmp_path) / "checkpoints/E1_U38_S1205/weights.safetensors"
    content = bytearray((tmp_path / path).read_bytes())
    content[-1] ^= 1
    (tmp_path / path).write_bytes(content)
    output = invoke("eval", path.parents[2], "--checkpoint", "E1_U38_S1205", cwd=tmp_path, code=1)
    assert output == f"Error: {path} is damaged: its content is not what was written\n"
    assert not (finished / "eval").exists()


def test_eval_needs_something_to_measure(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    invoke("train", "small.yaml", "--set", "callbacks=[]", "--set", "trainer.max_updates=1", "--set", "run.output=new",
           "--set", "trainer.evaluate=null", cwd=tmp_path)  # fmt: skip
    run = only_run(tmp_path / "new/small").relative_to(tmp_path)
    output = invoke("eval", run, cwd=tmp_path, code=2)
    assert output == (
        f"Error: {run}/config.yaml:{_line(tmp_path / run, 'callbacks:')}: callbacks: no callback evaluates data; "
        "add trainer.evaluate: {val: [loss], every_n_epochs: 1}\n"
    )


def _line(run, text):
    return next(n for n, line in enumerate((run / "config.yaml").read_text().splitlines(), 1) if line.startswith(text))
