"""`noether train`: the files of a run, and the settings that change it."""

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest
from command import (
    ENVIRONMENT,
    MODULE,
    PAPER,
    PATIENCE_S,
    ROOT,
    SMALL,
    contents,
    invoke,
    lines,
    noether,
    only_run,
    pointer,
    set_options,
    start,
    weights,
)

from noether.config import load
from noether.effects import CheckpointStore
from noether.testing import same


@pytest.fixture(scope="module")
def run(trained_small):
    return only_run(trained_small[0] / "out/small")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "paper.py").write_text(MODULE)
    (tmp_path / "paper.yaml").write_text(PAPER)
    return tmp_path


def test_the_directory_of_a_run(run):
    tags = ["E1_U38_S1205", "E2_U76_S2410"]
    parts = ["MANIFEST.json", "optimizer.safetensors", "state.json", "state.safetensors", "weights.safetensors"]
    assert sorted(map(str, contents(run))) == sorted([
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        *(f"checkpoints/{name}" for name in (".ended", "latest", "last", "best_model.val.accuracy")),
        *(f"checkpoints/{tag}/{part}" for tag in tags for part in parts),
    ])  # fmt: skip


def test_the_last_checkpoint_is_of_the_ended_run(run):
    assert pointer(run, "last") == pointer(run, "latest") == "E2_U76_S2410"
    manifest = json.loads((run / "checkpoints/E2_U76_S2410/MANIFEST.json").read_text())
    assert (manifest["event"], manifest["segment"], manifest["parent"]) == ("AfterEpoch", 1, None)
    store = CheckpointStore(run / "checkpoints", run.name)
    assert [store.load(each).ended for each in store.manifests()] == [False, True]


def test_the_configuration_is_kept_as_resolved(run, trained_small):
    assert load(run / "config.yaml") == load(trained_small[0] / "small.yaml")
    assert load(run / "config.yaml").optimizer.kind.settings["betas"] == (0.9, 0.999)
    assert "nonfinite: apply" in (run / "config.yaml").read_text()


def test_each_event_that_logs_has_one_line_of_metrics(run):
    written = lines(run)
    updates = [line for line in written if line["event"] == "after_update"]
    epochs = [line for line in written if line["event"] == "after_epoch"]
    assert len(updates) + len(epochs) == len(written)
    assert [(line["epoch"], line["update"]) for line in updates] == [(u // 38, u) for u in range(5, 76, 5)]
    assert [(line["epoch"], line["update"], line["sample"]) for line in epochs] == [(1, 38, 1205), (2, 76, 2410)]
    assert all(line.keys() == {"run", "event", "epoch", "update", "sample", "time_s", "metrics"} for line in written)
    assert all(
        set(line["metrics"]) == {f"loss/online/{loss}/U5" for loss in ("cross_entropy", "total")} for line in updates
    )
    assert set(epochs[0]["metrics"]) == {
        *(f"loss/val/{loss}" for loss in ("cross_entropy", "total")),
        *("val/accuracy", "val/accuracy/best", "val/accuracy/best_update"),
    }
    times = [line["time_s"] for line in written]
    assert times == sorted(times)


def test_the_run_learned(run):
    first, last = [line["metrics"] for line in lines(run) if line["event"] == "after_epoch"]
    assert last["loss/val/total"] < first["loss/val/total"] < 2.4
    assert last["val/accuracy"] > first["val/accuracy"] > 0.2


def test_the_summary(run):
    best = lines(run)[-1]["metrics"]["val/accuracy"]
    summary = json.loads((run / "summary.json").read_text())
    (phases,) = summary.pop("phases").values()
    assert phases["updates"] == 76
    (process,) = summary.pop("processes").values()
    assert process["samples"] == {"train": 1205, "val": 296}
    produces = summary.pop("produces")
    assert set(produces["trainer.evaluate.val"]) >= {"loss/val/*", "val/accuracy"}
    assert produces["callbacks.1"] == ["loss/online/*/U5"]
    assert "callbacks.0" not in produces
    assert summary == {
        "params/trainable": 1638,
        "params/frozen": 0,
        "params/features/trainable": 348,
        "params/features/frozen": 0,
        "params/head/trainable": 1290,
        "params/head/frozen": 0,
        "samples/train": 1205,
        "samples/val": 296,
        "val/accuracy/best": best,
        "val/accuracy/best_at": "E2_U76_S2410",
        "status": "finished",
        "ending": "ended at E2_U76_S2410",
    }


WITHOUT_TORCH = """\
import sys, noether
from noether.cli.main import main
sys.modules["torch"] = None  # importing it raises ImportError
path, report = sys.argv[1:]
run = noether.read_run(path)
best = run.best("val/accuracy").value
assert run.status == "finished" and run.pointers["latest"] == run.checkpoints[-1].tag and run.started_s is not None
for argv in (
    ["show", path], ["show", path, "--json"], ["show", path, path, "--sort", "val/accuracy"],
    ["query", path, "select max(value) from metrics where key = 'val/accuracy'", "--csv"],
    ["report", path, "--to", report], ["help", "trainer"], ["help"],
):
    main(argv, standalone_mode=False)
assert not [name for name in sys.modules if name.startswith(("torch.", "safetensors", "optree"))]
print(best)
"""


def test_a_run_is_read_shown_and_reported_without_torch(run, tmp_path):
    report = tmp_path / "report.html"
    argv = [sys.executable, "-c", WITHOUT_TORCH, run, report]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(lines(run)[-1]["metrics"]["val/accuracy"])
    row = [f'<td class="number">{count}</td>' for count in (15, 15, 15)]  # planned, due, logged
    assert "<td>every_n_updates: 5</td>" + "".join(row) in report.read_text()


def test_the_output(trained_small, run):
    output = trained_small[1].stdout.splitlines()
    assert trained_small[1].stderr == ""
    assert output[-1] == f"ended at E2_U76_S2410; the run is in {run.relative_to(trained_small[0])}"
    assert sum(" % " in line and "update 10/76" in line for line in output) == 1
    assert [line.split()[0] for line in output if "val/accuracy/best " in line] == ["E1_U38_S1205", "E2_U76_S2410"]


def test_set_changes_any_setting(folder):
    changes = ["trainer.max_updates=3", "model.width=2", "callbacks.1.every_n_updates=1", "run.output=elsewhere"]
    invoke("train", "small.yaml", *set_options(changes), cwd=folder)
    run = only_run(folder / "elsewhere/small")
    assert [line["update"] for line in lines(run)] == [1, 2, 3]
    assert weights(run)["features.0.weight"].shape == (2, 1, 3, 3)
    assert pointer(run, "last") == "E0_U3_S96"
    assert not (folder / "out").exists()


def test_two_runs_started_in_one_second_have_two_directories(folder, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260102-030405")
    for _ in range(2):
        invoke("train", "small.yaml", "--set", "trainer.max_updates=1", cwd=folder)
    runs = sorted(path.name for path in (folder / "out/small").iterdir())
    assert runs == ["20260102-030405", "20260102-030405-2"]
    manifests = [
        json.loads((folder / f"out/small/{name}/checkpoints/E0_U1_S32/MANIFEST.json").read_text()) for name in runs
    ]
    assert [manifest["run_id"] for manifest in manifests] == runs


def test_a_seed_determines_the_run(folder):
    for seed in (0, 0, 1):
        invoke("train", "small.yaml", "--set", "trainer.max_updates=3", "--set", f"run.seed={seed}", cwd=folder)
    first, again, other = (weights(run) for run in sorted((folder / "out/small").iterdir(), key=_start_order))
    assert same(first, again)
    assert not same(first, other)


def _start_order(run):
    stamp, _, number = run.name.removeprefix("20").replace("-", "", 1).partition("-")
    return stamp, int(number or 1)


def test_smoke_leaves_nothing_behind(folder, monkeypatch):
    before = contents(folder)
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    output = invoke("train", "small.yaml", "--smoke", cwd=folder)
    assert output.splitlines()[-1] == "small.yaml: one update, one evaluation and one save succeeded"
    assert [line.split()[0] for line in output.splitlines() if "val/accuracy" in line] == ["E0_U1_S32"]
    assert contents(folder) == before
    assert list((folder / "tmp").iterdir()) == []


def test_smoke_finds_errors_that_only_training_shows(folder):
    (folder / "paper.py").write_text(MODULE.replace('state.params["0.weight"]', 'state.params["nowhere"]'))
    with pytest.raises(KeyError, match="nowhere"):
        invoke("train", "paper.yaml", "--smoke", "--set", "callbacks.0.every_n_updates=1", cwd=folder)
    assert not (folder / "out").exists()


def test_evaluate_first(folder):
    invoke("train", "small.yaml", "--set", "trainer.max_updates=1", "--set", "trainer.evaluate_first=true", cwd=folder)
    first = lines(only_run(folder / "out/small"))[0]
    assert (first["event"], first["update"]) == ("at_eval", 0)
    assert {"loss/val/total", "val/accuracy"} <= set(first["metrics"])


def test_init_from_starts_with_the_weights_of_another_run(finished_run, tmp_path):
    source = finished_run / "checkpoints/best_model.val.accuracy"
    changes = [f"run.init_from={source}", "run.output=new", "trainer.max_updates=1", "trainer.evaluate_first=true"]
    changes += ["optimizer.lr=0", "optimizer.weight_decay=0"]
    invoke("train", "small.yaml", *set_options(changes), cwd=tmp_path)
    run = only_run(tmp_path / "new/small")
    measured = lines(finished_run)[-1]["metrics"]
    assert lines(run)[0]["metrics"] == {key: measured[key] for key in lines(run)[0]["metrics"]}
    ours, theirs = weights(run), weights(finished_run, "best_model.val.accuracy")
    assert all(same(ours[name], theirs[name]) for name in theirs if "num_batches" not in name and "running" not in name)
    assert ours["features.1.num_batches_tracked"] == theirs["features.1.num_batches_tracked"] + 1
    assert json.loads((run / "checkpoints/E0_U1_S32/state.json").read_text())["iteration"] == "E0_U1_S32"


@pytest.mark.parametrize(
    ("model", "why", "right"),
    [
        (
            "{kind: noether.examples.digits.ConvNet, width: 8}",
            "parameter 'features.0.weight' has shape (4, 1, 3, 3) in the checkpoint and (8, 1, 3, 3) in the model; ",
            'leave_out: ["features.0.*"',
        ),
        (
            "{kind: torch.nn.Linear, in_features: 8, out_features: 10}",
            "parameter 'bias' is not in the checkpoint",
            'leave_out: ["bias", "features.*", "head.*", "weight"]',
        ),
    ],
)
def test_init_from_refuses_weights_of_another_model(finished_run, tmp_path, model, why, right):
    source = finished_run / "checkpoints/last"
    changes = ["--set", f"run.init_from={source}", "--set", "run.output=new", "--set", f"model={model}"]
    output = invoke("train", "small.yaml", *changes, cwd=tmp_path, code=2)
    assert output.startswith(f"Error: --set run.init_from={source}: run.init_from: '{source}': ")
    assert why in output
    assert f"; to start without these, write init_from: {{path: {source}, {right}" in output
    assert not (tmp_path / "new").exists()


def test_nonfinite_raise_ends_the_run_with_a_message(folder):
    changes = ["--set", "trainer.nonfinite=raise", "--set", "trainer.loss=paper.broken_loss"]
    done = noether("train", "paper.yaml", *changes, cwd=folder, code=1)
    run = only_run(folder / "out/paper")
    assert done.stderr.splitlines() == [
        (
            "Error: update 1: loss 'entropy' is nan, loss 'total' is nan, the gradient of '0.weight' is not finite "
            "(and 5 more); nothing was applied. Lower the learning rate, clip gradients, or skip such updates with "
            "trainer.nonfinite: skip, in update 1"
        ),
        "no update was completed: a resumed run begins at update 0",
        f"the traceback is in {run.relative_to(folder) / 'traceback.txt'}",
        f"resume with: noether train --resume {run.relative_to(folder)}",
    ]


def test_nonfinite_skip_leaves_the_weights(folder):
    changes = ["trainer.nonfinite=skip", "trainer.loss=paper.broken_loss", "trainer.max_updates=2"]
    invoke("train", "paper.yaml", *set_options(changes), cwd=folder)
    run = only_run(folder / "out/paper")
    assert [line["metrics"]["loss/online/total/U1"] for line in lines(run)] == ["NaN", "NaN"]
    assert weights(run)["1.num_batches_tracked"] == 0


def test_the_installed_script_finds_modules_in_the_working_directory(folder):
    """Unlike `python -m`, the script does not find the working directory by itself."""
    script = Path(sysconfig.get_path("scripts")) / "noether"
    settings = ["--set", "trainer.max_epochs=2", "--set", "callbacks.1.every_n_epochs=1"]
    done = subprocess.run(
        [script, "train", "paper.yaml", *settings],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    run = only_run(folder / "out/paper")
    norms = [line["metrics"] for line in lines(run) if "weight_norm" in line["metrics"]]
    assert len(norms) == 6
    assert norms[0]["weight_norm"] > 0
    epochs = [line["metrics"] for line in lines(run) if line["event"] == "after_epoch"]
    assert len(epochs) == 2
    assert all({"loss/val/entropy", "loss/val/size", "val/agreement"} <= set(metrics) for metrics in epochs)
    assert [line.split() for line in done.stdout.splitlines() if "two epochs more" in line] == [
        ["E1_U15_S60", "two", "epochs", "more"],
        ["E2_U30_S120", "two", "epochs", "more"],
    ]
    assert (folder / "rings.txt").read_text() == "AfterEpoch 1: ding ding \nAfterEpoch 2: ding ding \n"
    invoke("eval", run, cwd=folder)
    assert (folder / "rings.txt").read_text().splitlines()[2:] == ["AtEval 2: ding "]


def test_an_effect_without_a_handler_is_refused_before_training(folder):
    output = invoke("train", "paper.yaml", "--set", "run.handlers={}", cwd=folder, code=2)
    (error,) = (line for line in output.splitlines() if line.startswith("Error: "))
    assert error.startswith(
        "Error: paper.yaml:18: callbacks[2]: Bell/E1 requests the effect Ring, which has no handler: write a function "
        "handle_ring(effect, state, event), and name it in YAML, run.handlers: {paper.Ring: paper.handle_ring}"
    )
    assert not (folder / "out").exists()


def test_the_digits_are_learned(tmp_path):
    noether("train", ROOT / "configs/digits.yaml", "--set", f"run.output={tmp_path}", cwd=tmp_path)
    run = only_run(tmp_path / "digits")
    assert json.loads((run / "summary.json").read_text())["val/accuracy/best"] >= 0.985
    assert max(line["metrics"].get("val/accuracy", 0) for line in lines(run)) >= 0.985


def test_a_closed_output_pipe_does_not_end_the_run(folder):
    """As in `noether train ... | head`, which closes the pipe after some lines."""
    with start("train", "small.yaml", cwd=folder) as process:
        assert process.stdout.readline().startswith("directory  out/small/")
        process.stdout.close()
        errors = process.stderr.read()
    assert errors.count("console failed and may have lost log entries; training continues") == 1
    assert "Error" not in errors.replace("BrokenPipeError", "")
    assert json.loads((only_run(folder / "out/small") / "summary.json").read_text())["ending"].startswith("ended at E2")
