"""`noether train --resume`: a resumed run equals the uncut run."""

import json
import shutil

import pytest
from command import (
    EXACT,
    SMALL,
    contents,
    invoke,
    last_files,
    lines,
    noether,
    only_run,
    pointer,
    set_options,
    timeless,
)


def relative(run, folder):
    return str(run.relative_to(folder))


def test_one_epoch_and_a_resumed_one_equal_two(finished_run, tmp_path):
    output = invoke("train", "small.yaml", "--set", "trainer.max_epochs=1", "--set", "run.output=half", cwd=tmp_path)
    halfway = only_run(tmp_path / "half/small")
    assert output.splitlines()[-1] == f"ended at E1_U38_S1205; the run is in {relative(halfway, tmp_path)}"
    assert last_files(halfway, *EXACT) != last_files(finished_run, *EXACT)
    output = invoke("train", "--resume", halfway, "--set", "trainer.max_epochs=2", cwd=tmp_path)
    assert output.splitlines()[0] == "resuming at E1_U38_S1205"
    assert output.splitlines()[-1] == f"ended at E2_U76_S2410; the run is in {halfway}"
    assert last_files(halfway, *EXACT) == last_files(finished_run, *EXACT)
    assert timeless(halfway) == timeless(finished_run)
    assert "max_epochs: 2" in (halfway / "config.yaml").read_text()
    summary, expected = (json.loads((each / "summary.json").read_text()) for each in (halfway, finished_run))
    for name in ("phases", "processes"):
        assert list(summary.pop(name)) == ["E0_U0_S0", "E1_U38_S1205"]
        assert list(expected.pop(name)) == ["E0_U0_S0"]
    assert summary == expected
    manifest = json.loads((halfway / "checkpoints" / pointer(halfway, "last") / "MANIFEST.json").read_text())
    assert (manifest["segment"], manifest["parent"]) == (2, "E1_U38_S1205")
    assert manifest["run_id"] == halfway.name


def test_a_finished_run_is_not_changed(finished_run, tmp_path):
    before = contents(finished_run)
    output = invoke("train", "--resume", relative(finished_run, tmp_path), cwd=tmp_path)
    run = relative(finished_run, tmp_path)
    fix = "set a later end (trainer.max_epochs is 2)"
    assert output == f"{run} already ended at E2_U76_S2410; to continue it, {fix}\n"
    assert contents(finished_run) == before


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
    output = invoke("train", "--resume", run, cwd=tmp_path)
    assert output == (
        f"{run} already {ending}; to continue it, give --continue, change the settings of "
        "MetricEarlyStopping/U1/loss/online/total/U1, or set a later end (trainer.max_epochs is 2)\n"
    )
    output = invoke("train", "--resume", run, "--continue", cwd=tmp_path)
    assert output.splitlines()[-1].startswith("ended at E0_U3_S96: loss/online/total/U1")


def test_a_run_without_a_checkpoint_starts_again(finished_run, tmp_path):
    expected, metrics = last_files(finished_run, *EXACT), timeless(finished_run)
    shutil.rmtree(finished_run / "checkpoints")
    for name in ("metrics.jsonl", "summary.json"):
        (finished_run / name).unlink()
    output = invoke("train", "--resume", relative(finished_run, tmp_path), cwd=tmp_path)
    run = relative(finished_run, tmp_path)
    assert output.splitlines()[0] == f"{run} has no checkpoint: training starts at update 0"
    assert last_files(finished_run, *EXACT) == expected
    assert timeless(finished_run) == metrics


def test_checkpoints_with_weights_only_are_not_resumed_from(finished_run, tmp_path):
    """The run resumes from the newest checkpoint with weights, optimizer and state."""
    expected = last_files(finished_run, *EXACT)
    save = "noether.core.callbacks.CheckpointCallback, every_n_updates: 10, save_latest_optim: false"
    changes = [f"callbacks.3={{kind: {save}, model_names: [head]}}", "run.output=new", "trainer.max_updates=40"]
    changes.append("trainer.checkpoints.at_end=false")
    invoke("train", "small.yaml", *set_options(changes), cwd=tmp_path)
    run = only_run(tmp_path / "new/small")
    newest = json.loads((run / "checkpoints" / pointer(run, "latest.head") / "MANIFEST.json").read_text())
    assert (newest["iteration"], newest["models"]) == ("E1_U40_S1269", ["head"])
    # The best checkpoint, at the end of the first epoch, is complete.
    changes = ["trainer.max_epochs=2", "callbacks.3.model_names=[]", "callbacks.3.save_optim=true"]
    output = invoke("train", "--resume", run, *set_options(changes), cwd=tmp_path)
    assert output.splitlines()[0] == "resuming at E1_U38_S1205"
    assert last_files(run, *EXACT) == expected


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
def test_forbidden_changes_are_refused_by_name(finished_run, tmp_path, changes, message):
    before = contents(tmp_path)
    refused = [change for change in changes if change.split("=")[0] in message]
    expected = "\n".join(
        f"--set {change}: {line} in a resumed run" for change, line in zip(refused, message.splitlines(), strict=True)
    )
    output = invoke("train", "--resume", relative(finished_run, tmp_path), *set_options(changes), cwd=tmp_path, code=2)
    assert output == f"Error: {expected}\n"
    assert contents(tmp_path) == before


def test_allowed_changes_of_a_resumed_run(finished_run, tmp_path):
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
    output = invoke("train", "--resume", relative(finished_run, tmp_path), *set_options(changes), cwd=tmp_path)
    moved = only_run(tmp_path / "elsewhere/small")
    assert output.splitlines()[-1] == f"ended at E2_U78_S2474; the run is in {relative(moved, tmp_path)}"
    assert [line["update"] for line in lines(moved) if "optim/lr" in line["metrics"]] == [77, 78]
    assert not finished_run.exists()


CHANGED = ("--set", "trainer.max_epochs=3", "--set", "callbacks.1.every_n_updates=10")


def test_unclaimed_memory_is_named(finished_run, tmp_path):
    before = contents(tmp_path)
    output = invoke("train", "--resume", relative(finished_run, tmp_path), *CHANGED, cwd=tmp_path, code=1)
    assert output == (
        "Error: the saved run contains memory of 'OnlineLossCallback/U5', which no callback claims; did you mean "
        "'OnlineLossCallback/U10'? Give a callback that id, or drop the memory with "
        "--drop-memory OnlineLossCallback/U5, in Python with drop_memory=['OnlineLossCallback/U5'] of noether.open_run "
        "or noether.train\n"
    )
    assert contents(tmp_path) == before


def test_drop_memory_drops_unclaimed_memory(finished_run, tmp_path):
    run = relative(finished_run, tmp_path)
    output = invoke("train", "--resume", run, *CHANGED, "--drop-memory", "OnlineLossCallback/U5", cwd=tmp_path)
    assert output.splitlines()[-1] == f"ended at E3_U114_S3615; the run is in {run}"
    state = json.loads((finished_run / "checkpoints" / pointer(finished_run, "last") / "state.json").read_text())
    assert "OnlineLossCallback/U10" in state["callback_states"]
    assert "OnlineLossCallback/U5" not in state["callback_states"]
    assert json.loads(json.dumps(lines(finished_run)[-1]))["epoch"] == 3


def test_drop_memory_refuses_unknown_names(finished_run, tmp_path):
    run = relative(finished_run, tmp_path)
    output = invoke("train", "--resume", run, "--drop-memory", "OnlineLossCallback/U6", cwd=tmp_path, code=2)
    names = ["ProgressCallback/U10", "OnlineLossCallback/U5", "BestMetricCallback/E1/val/accuracy"]
    names += ["BestCheckpointCallback/E1/val/accuracy"]
    assert output.splitlines()[-1] == (
        "Error: --drop-memory OnlineLossCallback/U6: the run has no such memory; it has " + ", ".join(map(repr, names))
    )


def test_a_resumed_run_ignores_init_from(finished_run, tmp_path):
    source = finished_run / "checkpoints/last"
    changes = [f"run.init_from={source}", "run.output=new", "trainer.max_updates=1"]
    invoke("train", "small.yaml", *set_options(changes), cwd=tmp_path)
    shutil.rmtree(finished_run)
    run = only_run(tmp_path / "new/small")
    output = invoke("train", "--resume", run, "--set", "trainer.max_updates=2", cwd=tmp_path)
    assert output.splitlines()[-1] == f"ended at E0_U2_S64; the run is in {run}"
    invoke("eval", run, cwd=tmp_path)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    output = invoke("train", "--resume", run, cwd=tmp_path, code=2)
    assert f"run.init_from: '{source}': no checkpoint 'last' in {source.parent}; there are: none; give" in output


def test_a_damaged_checkpoint_is_named_and_skipped(finished_run, tmp_path):
    path = finished_run / "checkpoints/E2_U76_S2410/optimizer.safetensors"
    path.unlink()
    done = noether("train", "--resume", relative(finished_run, tmp_path), cwd=tmp_path)
    assert done.stderr == f"{path} is missing; resuming from E1_U38_S1205 without it\n"
    assert done.stdout.splitlines()[0] == "resuming at E1_U38_S1205"
    assert pointer(finished_run, "latest") == "E2_U76_S2410.2"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again(finished_run, tmp_path):
    checkpoints = finished_run / "checkpoints"
    for path in checkpoints.glob("*/state.json"):
        path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    before = contents(tmp_path)
    output = invoke("train", "--resume", relative(finished_run, tmp_path), cwd=tmp_path, code=1)
    first, *reasons = output.splitlines()
    assert first == f"Error: the run cannot resume from any of the {len(reasons)} checkpoints in {checkpoints}:"
    assert reasons[0].startswith(f"  {checkpoints}/E2_U76_S2410/state.json is damaged: ")
    assert contents(tmp_path) == before


def test_a_refused_resume_changes_nothing(finished_run, tmp_path):
    with (finished_run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "after_update", "epoch": 9, "update": 99, "sample": 999, "time_s": 0, "metrics": {}}\n')
    before = contents(finished_run)
    invoke(
        "train", "--resume", finished_run, "--set", "trainer.max_epochs=3", "--drop-memory", "x", cwd=tmp_path, code=2
    )
    assert contents(finished_run) == before


def test_a_changed_output_moves_the_run(finished_run, tmp_path):
    arguments = ("--set", "run.output=there", "--set", "trainer.max_epochs=3")
    output = invoke("train", "--resume", relative(finished_run, tmp_path), *arguments, cwd=tmp_path)
    moved = only_run(tmp_path / "there/small")
    assert moved.name == finished_run.name
    assert f"{relative(finished_run, tmp_path)} moved to {relative(moved, tmp_path)}" in output.splitlines()
    assert not finished_run.exists()
    assert pointer(moved, "last").startswith("E3_")
    assert "output: there" in (moved / "config.yaml").read_text()


def test_a_new_run_starts_at_an_older_checkpoint(finished_run, tmp_path):
    run, before = relative(finished_run, tmp_path), contents(finished_run)
    output = invoke("train", "--resume", run, "--checkpoint", "E1", cwd=tmp_path, code=2)
    assert output.startswith("Error: --checkpoint E1: the run would lose what it did after E1_U38_S1205: give --into ")
    output = invoke("train", "--resume", run, "--checkpoint", "E1", "--into", "out/small/branch", cwd=tmp_path)
    assert output.splitlines()[0] == f"out/small/branch starts at E1_U38_S1205 of {run}"
    assert output.splitlines()[-1] == "ended at E2_U76_S2410; the run is in out/small/branch"
    assert contents(finished_run) == before
    branch = tmp_path / "out/small/branch"
    assert last_files(branch, *EXACT) == last_files(finished_run, *EXACT)
    assert timeless(branch) == timeless(finished_run)
    for option in ("--checkpoint", "--into"):
        assert f"{option} needs --resume" in invoke("train", "small.yaml", option, "x", cwd=tmp_path, code=2)
