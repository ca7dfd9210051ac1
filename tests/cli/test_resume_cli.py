"""`noether train --resume`: a run that goes on equals the run that was never cut."""

import json
import shutil

import pytest
from command import SMALL, contents, invoke, lines, noether, only_run, pointer, saved, timeless

EXACT = ("weights.safetensors", "optimizer.safetensors")


def shown(run, folder):
    return str(run.relative_to(folder))


def test_one_epoch_and_one_more_are_two(finished, tmp_path):
    output = invoke("train", "small.yaml", "--set", "trainer.max_epochs=1", "--set", "run.output=half", cwd=tmp_path)
    halfway = only_run(tmp_path / "half/small")
    assert output.splitlines()[-1] == f"ended at E1_U38_S1205; the run is in {shown(halfway, tmp_path)}"
    assert saved(halfway, *EXACT) != saved(finished, *EXACT)
    output = invoke("train", "--resume", halfway, "--set", "trainer.max_epochs=2", cwd=tmp_path)
    assert output.splitlines()[0] == "resuming at E1_U38_S1205"
    assert output.splitlines()[-1] == f"ended at E2_U76_S2410; the run is in {halfway}"
    assert saved(halfway, *EXACT) == saved(finished, *EXACT)
    assert timeless(halfway) == timeless(finished)
    assert "max_epochs: 2" in (halfway / "config.yaml").read_text()
    summary = json.loads((halfway / "summary.json").read_text())
    assert summary == json.loads((finished / "summary.json").read_text())
    manifest = json.loads((halfway / "checkpoints" / pointer(halfway, "last") / "MANIFEST.json").read_text())
    assert (manifest["segment"], manifest["parent"]) == (2, "E1_U38_S1205.2")
    assert manifest["run_id"] == halfway.name


def test_a_finished_run_is_left_alone(finished, tmp_path):
    before = contents(finished)
    output = invoke("train", "--resume", shown(finished, tmp_path), cwd=tmp_path)
    run = shown(finished, tmp_path)
    assert output == f"{run} already ended at E2_U76_S2410; to continue it, set a later end\n"
    assert contents(finished) == before


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    watched = "metric_key: loss/online/total/U1, tolerance: 1, min_delta: 100"
    stop = f"{{kind: noether.core.callbacks.MetricEarlyStopping, every_n_updates: 1, {watched}}}"
    online = "{kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 1}"
    save = "{kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_weights: true, save_optim: true}"
    invoke(
        "train", "small.yaml", "--set", f"callbacks=[{online}, {stop}, {save}]", "--set", "run.output=new", cwd=tmp_path
    )
    run = only_run(tmp_path / "new/small")
    ending = json.loads((run / "summary.json").read_text())["ending"]
    assert ending.startswith("ended at E0_U2_S64: ")
    assert "loss/online/total/U1" in ending
    output = invoke("train", "--resume", run, "--set", "trainer.max_epochs=9", cwd=tmp_path)
    assert output == f"{run} already {ending}; to continue it, set a later end\n"


def test_a_run_without_a_checkpoint_begins_anew(finished, tmp_path):
    expected, metrics = saved(finished, *EXACT), timeless(finished)
    shutil.rmtree(finished / "checkpoints")
    output = invoke("train", "--resume", shown(finished, tmp_path), cwd=tmp_path)
    run = shown(finished, tmp_path)
    assert output.splitlines()[0] == f"{run} has no checkpoint: training starts at update 0"
    assert saved(finished, *EXACT) == expected
    assert timeless(finished) == metrics


def test_weights_alone_are_no_checkpoint_to_resume(finished, tmp_path):
    """The newest whole one is taken."""
    expected = saved(finished, *EXACT)
    save = "noether.core.callbacks.CheckpointCallback, every_n_updates: 10, save_latest_optim: false"
    changes = [f"callbacks.3={{kind: {save}, model_names: [head]}}", "run.output=new", "trainer.max_updates=40"]
    invoke("train", "small.yaml", *(word for change in changes for word in ("--set", change)), cwd=tmp_path)
    run = only_run(tmp_path / "new/small")
    newest = json.loads((run / "checkpoints" / pointer(run, "latest") / "MANIFEST.json").read_text())
    assert (newest["iteration"], newest["models"]) == ("E1_U40_S1269", ["head"])
    # The best checkpoint, at the end of the first epoch, is whole.
    changes = ["trainer.max_epochs=2", "callbacks.3.model_names=[]", "callbacks.3.save_optim=true"]
    output = invoke("train", "--resume", run, *(word for change in changes for word in ("--set", change)), cwd=tmp_path)
    assert output.splitlines()[0] == "resuming at E1_U38_S1205"
    assert saved(run, *EXACT) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["trainer.effective_batch_size=16"], "trainer.effective_batch_size: 32 cannot become 16"),
        (["model.width=8"], "model.width: 4 cannot become 8"),
        (["run.seed=1"], "run.seed: 0 cannot become 1"),
        (["run.name=x"], "run.name: 'small' cannot become 'x'"),
        (["optimizer.weight_decay=0.5"], "optimizer.weight_decay: nothing cannot become 0.5"),
        (["data.train.shift=0"], "data.train.shift: 1 cannot become 0"),
        (["trainer.nonfinite=skip"], "trainer.nonfinite: 'apply' cannot become 'skip'"),
        (["optimizer.betas=[0.8, 0.9]"], "optimizer.betas: [0.9, 0.999] cannot become [0.8, 0.9]"),
        (
            ["model.width=8", "trainer.max_epochs=3", "optimizer.lr=1"],
            "model.width: 4 cannot become 8\noptimizer.lr: 0.002 cannot become 1.0",
        ),
    ],
)
def test_a_change_that_matters_is_refused_by_name(finished, tmp_path, changes, message):
    before = contents(tmp_path)
    refused = [change for change in changes if change.split("=")[0] in message]
    expected = "\n".join(
        f"--set {change}: {line} in a resumed run" for change, line in zip(refused, message.splitlines(), strict=True)
    )
    sets = [word for change in changes for word in ("--set", change)]
    output = invoke("train", "--resume", shown(finished, tmp_path), *sets, cwd=tmp_path, code=2)
    assert output == f"Error: {expected}\n"
    assert contents(tmp_path) == before


def test_what_may_change_in_a_run(finished, tmp_path):
    online = "{kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 5}"
    more = "{kind: noether.core.callbacks.LrCallback, every_n_updates: 1}"
    best = "{kind: noether.core.callbacks.BestMetricCallback, every_n_epochs: 1, metric_key: val/accuracy}"
    save = "{kind: noether.core.callbacks.BestCheckpointCallback, every_n_epochs: 1, metric_key: val/accuracy}"
    progress = "{kind: noether.core.callbacks.ProgressCallback, every_n_updates: 10}"
    changes = [
        f"callbacks=[{progress}, {more}, {online}, {best}, {save}]",
        "trainer.max_updates=78",
        "trainer.device=auto",
        "trainer.num_workers=1",
        "run.output=elsewhere",
    ]
    sets = [word for change in changes for word in ("--set", change)]
    output = invoke("train", "--resume", shown(finished, tmp_path), *sets, cwd=tmp_path)
    moved = only_run(tmp_path / "elsewhere/small")
    assert output.splitlines()[-1] == f"ended at E2_U78_S2474; the run is in {shown(moved, tmp_path)}"
    assert [line["update"] for line in lines(moved) if "optim/lr" in line["metrics"]] == [77, 78]
    assert not finished.exists()


CHANGED = ("--set", "trainer.max_epochs=3", "--set", "callbacks.1.every_n_updates=10")


def test_memory_that_nobody_claims_is_named(finished, tmp_path):
    before = contents(tmp_path)
    output = invoke("train", "--resume", shown(finished, tmp_path), *CHANGED, cwd=tmp_path, code=1)
    assert output == (
        "Error: the saved run holds the memory of 'OnlineLossCallback/U5', which no callback claims; did you mean "
        "'OnlineLossCallback/U10'? Give a callback that id, or accept the loss with "
        "--drop-memory OnlineLossCallback/U5\n"
    )
    assert contents(tmp_path) == before


def test_drop_memory_accepts_the_loss(finished, tmp_path):
    run = shown(finished, tmp_path)
    output = invoke("train", "--resume", run, *CHANGED, "--drop-memory", "OnlineLossCallback/U5", cwd=tmp_path)
    assert output.splitlines()[-1] == f"ended at E3_U114_S3615; the run is in {run}"
    state = json.loads((finished / "checkpoints" / pointer(finished, "last") / "state.json").read_text())
    assert "OnlineLossCallback/U10" in state["callback_states"]
    assert "OnlineLossCallback/U5" not in state["callback_states"]
    assert json.loads(json.dumps(lines(finished)[-1]))["epoch"] == 3


def test_drop_memory_of_what_is_not_there(finished, tmp_path):
    run = shown(finished, tmp_path)
    output = invoke("train", "--resume", run, "--drop-memory", "OnlineLossCallback/U6", cwd=tmp_path, code=2)
    names = ["ProgressCallback/U10", "OnlineLossCallback/U5", "BestMetricCallback/E1/val/accuracy"]
    names += ["BestCheckpointCallback/E1/val/accuracy"]
    assert output.splitlines()[-1] == (
        "Error: --drop-memory OnlineLossCallback/U6: the run has no such memory; it has " + ", ".join(map(repr, names))
    )


def test_a_run_goes_on_without_what_it_was_initialized_from(finished, tmp_path):
    source = finished / "checkpoints/last"
    changes = [f"run.init_from={source}", "run.output=new", "trainer.max_updates=1"]
    invoke("train", "small.yaml", *(word for change in changes for word in ("--set", change)), cwd=tmp_path)
    shutil.rmtree(finished)
    run = only_run(tmp_path / "new/small")
    output = invoke("train", "--resume", run, "--set", "trainer.max_updates=2", cwd=tmp_path)
    assert output.splitlines()[-1] == f"ended at E0_U2_S64; the run is in {run}"
    invoke("eval", run, cwd=tmp_path)
    shutil.rmtree(run / "checkpoints")
    output = invoke("train", "--resume", run, cwd=tmp_path, code=2)
    assert f"run.init_from: '{source}': no checkpoint 'last' in {source.parent}; there are: none; give" in output


def test_a_damaged_checkpoint_is_named_and_passed_over(finished, tmp_path):
    path = finished / "checkpoints/E2_U76_S2410.2/optimizer.safetensors"
    path.unlink()
    done = noether("train", "--resume", shown(finished, tmp_path), cwd=tmp_path)
    assert done.stderr == f"{shown(path, tmp_path)} is missing; resuming from E2_U76_S2410 without it\n"
    assert done.stdout.splitlines()[0] == "resuming at E2_U76_S2410"
    assert pointer(finished, "latest") == "E2_U76_S2410.3"


def test_a_run_of_which_every_checkpoint_is_damaged_does_not_begin_anew(finished, tmp_path):
    checkpoints = finished / "checkpoints"
    for path in checkpoints.glob("*/state.json"):
        path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    before = contents(tmp_path)
    output = invoke("train", "--resume", shown(finished, tmp_path), cwd=tmp_path, code=1)
    first, *reasons = output.splitlines()
    assert first == (
        f"Error: the run cannot resume from any of the {len(reasons)} checkpoints in {shown(checkpoints, tmp_path)}:"
    )
    assert reasons[0].startswith(f"  {shown(checkpoints, tmp_path)}/E2_U76_S2410.2/state.json is damaged: ")
    assert contents(tmp_path) == before


def test_a_refused_resume_changes_nothing(finished, tmp_path):
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"event": "after_update", "epoch": 9, "update": 99, "sample": 999, "time_s": 0, "metrics": {}}\n')
    before = contents(finished)
    invoke("train", "--resume", finished, "--set", "trainer.max_epochs=3", "--drop-memory", "x", cwd=tmp_path, code=2)
    assert contents(finished) == before


def test_a_changed_output_moves_the_run(finished, tmp_path):
    arguments = ("--set", "run.output=there", "--set", "trainer.max_epochs=3")
    output = invoke("train", "--resume", shown(finished, tmp_path), *arguments, cwd=tmp_path)
    moved = only_run(tmp_path / "there/small")
    assert moved.name == finished.name
    assert f"{shown(finished, tmp_path)} moved to {shown(moved, tmp_path)}" in output.splitlines()
    assert not finished.exists()
    assert pointer(moved, "last").startswith("E3_")
    assert "output: there" in (moved / "config.yaml").read_text()
