"""Every callback at once in a real run: on a terminal, in a pipe, interrupted and resumed, evaluated with averages."""

import json
import os
import pty
import re
import shutil
import subprocess
from textwrap import indent

import pytest
from command import ENVIRONMENT, SMALL, command, contents, invoke, lines, noether, only_run, pointer, weights
from safetensors.torch import load_file

from noether.config.descriptions import describe
from noether.core.callbacks.registry import SHIPPED
from noether.testing import same

CALLBACKS = """\
callbacks:
  - {kind: noether.core.callbacks.NanGuardCallback, every_n_epochs: 1, tolerance: 3, action: rollback}
  - {kind: noether.core.callbacks.EMACallback, every_n_epochs: 1, target_factors: [0.9, 0.5], save_weights: false}
  - {kind: noether.core.callbacks.ParamCountCallback}
  - {kind: noether.core.callbacks.DatasetStatsCallback}
  - {kind: noether.core.callbacks.HyperparamsCallback}
  - {kind: noether.core.callbacks.EtaCallback, every_n_updates: 20}
  - {kind: noether.core.callbacks.ProgressCallback, every_n_updates: 20}
  - {kind: noether.core.callbacks.LrCallback, every_n_epochs: 1}
  - {kind: noether.core.callbacks.PeakMemoryCallback, every_n_epochs: 1}
  - {kind: noether.core.callbacks.TrainTimeCallback, every_n_epochs: 1}
  - {kind: noether.core.callbacks.GradNormCallback, every_n_epochs: 1}
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_epochs: 1}
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 10, verbose: false, batch_size: 4}
  - {kind: noether.core.callbacks.OfflineLossCallback, every_n_epochs: 1, dataset_key: val, weights: ema=0.5}
  - {kind: noether.core.callbacks.MetricCallback, every_n_epochs: 1,
     dataset_key: val, metric: accuracy, weights: ema=0.9}
  - {kind: noether.core.callbacks.BestMetricCallback, every_n_epochs: 1, source_metric_key: val/accuracy/ema=0.9}
  - {kind: noether.core.callbacks.BestCheckpointCallback, every_n_epochs: 1, metric_key: val/accuracy, tolerances: [1]}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_optim: true}
  - {kind: noether.core.callbacks.ReduceLROnPlateauCallback, every_n_epochs: 1, metric_key: val/accuracy, tolerance: 1}
  - {kind: noether.core.callbacks.MetricEarlyStopping, every_n_epochs: 1, metric_key: val/accuracy, tolerance: 9}
  - {kind: noether.core.callbacks.FixedUpdateEarlyStopping, stop_at_sample: 3000}
"""
# `trainer.evaluate` adds the first; the second needs a model that returns a dict.
ELSEWHERE = {"EvaluateCallback", "TrackOutputsCallback"}
# A callback without an entry above joins the run with the YAML of its documentation.
OTHERS = [name for name in SHIPPED if f".{name}," not in CALLBACKS and f".{name}}}" not in CALLBACKS]
CALLBACKS += "".join(indent(f"{describe(name).yaml}\n", "  ") for name in OTHERS if name not in ELSEWHERE)
EVERYTHING = SMALL.partition("callbacks:\n")[0].replace("max_epochs: 2", "max_epochs: 9") + CALLBACKS
WARNED = (
    "Warning: all.yaml:44: callbacks[16].tolerances: k ends here at k firings in a row without improvement, as early "
    "stopping does, and at k + 1 in the class-based framework: if [1] was written for that, write [2]\n"
    "Warning: all.yaml:39: callbacks[12].batch_size: has no meaning for OnlineLossCallback and is left out: "
    "it iterates no dataset\n"
)
END = "E2_U95_S3018"


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """Folder and process of a finished run with every callback, its output in a pipe; no test writes to it."""
    folder = tmp_path_factory.mktemp("everything")
    (folder / "all.yaml").write_text(EVERYTHING)
    return folder, noether("train", "all.yaml", cwd=folder)


def test_output_in_a_pipe_is_plain_lines(everything):
    _, done = everything
    assert done.stderr == WARNED  # once
    assert not re.search(r"[\x1b\r]", done.stdout)
    eta = [line for line in done.stdout.splitlines() if " end in " in line]
    assert [line.split()[0] for line in eta] == ["E0_U20_S640", "E1_U40_S1269", "E1_U60_S1909", "E2_U80_S2538"]
    assert all(" ms/update " in line and " next in 0:" in line for line in eta)
    assert f"{END:<18} stopping: stop_at_sample: 3000 is reached" in done.stdout.splitlines()
    assert f"ended at {END}: stop_at_sample: 3000 is reached; the run is in" in done.stdout


def test_the_metrics_of_an_epoch_are_one_aligned_line(everything):
    _, done = everything
    lines = [
        line
        for epoch in (1, 2)
        for line in done.stdout.splitlines()
        if line.startswith(f"E{epoch}_") and "loss/val/cross_entropy " in line
    ]
    assert len(lines) == 2
    starts = [{key: line.index(f"{key} ") for key in line.split()[1::2]} for line in lines]
    common = starts[0].keys() & starts[1].keys()
    assert len(common) > 10
    assert "val/accuracy/ema=0.9" in common
    assert "loss/online/cross_entropy/U10" not in done.stdout  # verbose: false


def test_every_event_is_one_line_of_the_log(everything):
    run = only_run(everything[0] / "out/small")
    read = lines(run)
    assert len({(line["event"], line["update"], line["epoch"]) for line in read}) == len(read)
    last_epoch = next(line for line in reversed(read) if line["event"] == "after_epoch")["metrics"]
    assert {
        "memory/peak_bytes/E1", "train_time/forward_s/mean/E1", "train_time/data_s/max/E1", "optim/grad_norm/max/E1",
        "loss/val/cross_entropy/ema=0.5", "val/accuracy/ema=0.9", "val/accuracy/ema=0.9/best", "optim/lr",
    } <= set(last_epoch)  # fmt: skip
    assert any("loss/online/total/U10" in line["metrics"] for line in read)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["config"]["trainer"]["max_epochs"] == 9
    assert summary["params/trainable"] == 1638
    assert summary["train_time/forward_s/total"] > 0


def test_averages_are_saved_and_evaluated(everything, tmp_path):
    run = only_run(everything[0] / "out/small")
    assert pointer(run, "last.ema=0.9") == f"{END}.ema=0.9"
    kept = load_file(run / "checkpoints" / f"{END}.ema=0.9" / "weights.safetensors")
    state = load_file(run / "checkpoints" / pointer(run, "last") / "state.safetensors")
    for name, tensor in kept.items():
        section = "buffers" if "running" in name or "num_batches" in name else "params"
        assert same(tensor, state[f"callback_states.weights/ema=0.9.{section}.{name}"])
        assert same(tensor, weights(run, "last")[name]) == (section == "buffers")


@pytest.fixture
def run_copy(everything, tmp_path):
    """A copy of the finished run, in a separate working directory."""
    shutil.copytree(everything[0], tmp_path, dirs_exist_ok=True)
    return only_run(tmp_path / "out/small")


def test_eval_with_weights_measures_the_average(run_copy, tmp_path):
    before = contents(run_copy)
    run = run_copy.relative_to(tmp_path)
    output = invoke("eval", run, "--checkpoint", "E2_U76_S2410", "--weights", "ema=0.9", cwd=tmp_path)
    average = json.loads((run_copy / "eval/E2_U76_S2410.ema=0.9.json").read_text())
    epoch = next(line["metrics"] for line in lines(run_copy) if line["event"] == "after_epoch" and line["epoch"] == 2)
    assert average["val/accuracy"] == epoch["val/accuracy/ema=0.9"] == average["val/accuracy/ema=0.9"]
    invoke("eval", run, "--checkpoint", "E2_U76_S2410", cwd=tmp_path)
    plain = json.loads((run_copy / "eval/E2_U76_S2410.json").read_text())
    assert plain["val/accuracy"] == epoch["val/accuracy"]
    assert plain["loss/val/total"] != average["loss/val/total"]
    assert f"written to {run}/eval/E2_U76_S2410.ema=0.9.json" in output
    output = invoke("eval", run, "--checkpoint", "last.ema=0.9", cwd=tmp_path)
    assert "OfflineLossCallback/E1/val/ema=0.5 is skipped: the checkpoint does not contain its weights" in output
    measured = json.loads((run_copy / f"eval/{END}.ema=0.9.json").read_text())
    assert set(measured) == {"loss/val/cross_entropy", "loss/val/total", "val/accuracy", "val/accuracy/ema=0.9"}
    assert measured["val/accuracy"] == measured["val/accuracy/ema=0.9"]
    invoke("eval", run, "--checkpoint", "last", "--weights", "ema=0.9", cwd=tmp_path)
    same_average = json.loads((run_copy / f"eval/{pointer(run_copy, 'last')}.ema=0.9.json").read_text())
    assert {key: measured[key] for key in measured} == {key: same_average[key] for key in measured}
    after = contents(run_copy)
    assert {path: after[path] for path in before} == before


LOST = "no weights 'ema=0.5' are stored; stored: ema=0.9; did you mean 'ema=0.9'?"


@pytest.mark.parametrize(
    ("checkpoint", "name", "message"),
    [
        ("latest", "ema=0.99", "no weights 'ema=0.99' are stored; stored: ema=0.9, ema=0.5; did you mean 'ema=0.9'?"),
        (
            "last.ema=0.9",
            "ema=0.5",
            f"{LOST}; use --checkpoint last.ema=0.5 without --weights",
        ),
    ],
)
def test_weights_that_are_not_kept_are_refused(run_copy, tmp_path, checkpoint, name, message):
    run = run_copy.relative_to(tmp_path)
    output = invoke("eval", run, "--checkpoint", checkpoint, "--weights", name, cwd=tmp_path, code=2)
    assert output.splitlines()[-1] == f"Error: --weights {name}: {message}"


def test_a_run_resumed_in_the_middle_equals_the_uncut_run(everything, tmp_path):
    (tmp_path / "all.yaml").write_text(EVERYTHING)
    invoke("train", "all.yaml", "--set", "trainer.max_updates=50", cwd=tmp_path)
    run = only_run(tmp_path / "out/small").relative_to(tmp_path)
    invoke("train", "--resume", run, "--set", "trainer.max_epochs=9", cwd=tmp_path)
    uncut, resumed = only_run(everything[0] / "out/small"), tmp_path / run
    for file in ("weights.safetensors", "optimizer.safetensors", "state.safetensors"):
        ours, theirs = (load_file(each / "checkpoints" / pointer(each, "last") / file) for each in (resumed, uncut))
        assert same(ours, theirs), file


def read_all(descriptor):
    """Return what is written to a pseudo terminal until its other end is closed."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # on Linux, the other end is closed
            part = b""
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


def run_on_terminal(*argv, cwd, **environment):
    """Run the real command line on a pseudo terminal of 150 columns, and return what it wrote there."""
    ours, theirs = pty.openpty()
    settings = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "150", "LINES": "40", **environment}
    for name in {"CI", "SLURM_JOB_ID"} - environment.keys():
        settings.pop(name, None)
    process = subprocess.Popen(command(*argv), cwd=cwd, env=settings, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = read_all(ours)
    os.close(ours)
    assert process.wait() == 0, written
    return written


def test_on_a_terminal_the_progress_bar_is_live_and_then_removed(tmp_path):
    (tmp_path / "all.yaml").write_text(EVERYTHING)
    written = run_on_terminal("train", "all.yaml", cwd=tmp_path)
    margins = re.findall(r"\x1b\[(?:1;\d+)?r", written)
    assert re.search(r"1;\d+r", "".join(margins))  # rows are kept
    assert margins[-1] == "\x1b[r"  # and given back
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    # A short run may end before the display has a rate; effects/console/test_live_region.py asserts rates and times.
    assert re.search(r"run .*\d+% .*update \d+/342 +epoch \d/9 +sample \d+/10845", plain)
    assert re.search(r"epoch \d .*\d+/38", plain)
    assert re.search(r"next .*\d+/20", plain)
    assert " end in " not in plain
    assert f"─ ended at {END}" in plain
    commands = re.sub(r" \\\r?\n +", " ", plain)  # long ones are continued on the next line
    assert commands.rstrip().splitlines()[-1].startswith("continue  noether train --resume ")
    assert "loss/val/cross_entropy/ema=0.5" in plain


@pytest.mark.slow  # effects/console/test_console.py asserts both of the same display
@pytest.mark.parametrize("variable", ["CI", "SLURM_JOB_ID"])
def test_without_a_viewer_nothing_is_redrawn(tmp_path, variable):
    (tmp_path / "all.yaml").write_text(EVERYTHING)
    smaller = ("--set", "callbacks.20.stop_at_sample=700")
    written = run_on_terminal("train", "all.yaml", *smaller, cwd=tmp_path, **{variable: "1"})
    assert "\x1b[r" not in written
    assert " end in " in written


TRACK = "noether.core.callbacks.TrackOutputsCallback"
LOSS = "noether.core.callbacks.OfflineLossCallback"
PLACE = "bad.yaml:24: callbacks[0]"
NO_PRODUCER = "which no callback produces; produced before it: nothing"
MODULES = "the model has features, features.0, features.1, features.3, features.4, head, head.1"
EMA = "noether.core.callbacks.EMACallback"
SAVES = "noether.core.callbacks.CheckpointCallback"


@pytest.mark.parametrize(
    ("entry", "message", "code"),
    [
        (
            f"{{kind: {TRACK}, every_n_updates: 1, keys: [drift]}}",
            "TrackOutputsCallback/U1/drift: the model returns a Tensor; to track outputs, return a dict",
            1,
        ),
        (
            f"{{kind: {LOSS}, every_n_epochs: 1, dataset_key: val, output_patterns_to_log: [drift]}}",
            "output_patterns_to_log needs a model that returns a dict; it returns Tensor",
            1,
        ),
        (
            f"{{kind: {LOSS}, every_n_epochs: 1, dataset_key: val, weights: ema=0.9}}",
            f"{PLACE}: OfflineLossCallback/E1/val/ema=0.9 consumes 'weights/ema=0.9', {NO_PRODUCER}",
            2,
        ),
        (
            f"{{kind: {EMA}, every_n_epochs: 1, target_factors: [0.9], model_paths: [heed]}}",
            f"{PLACE}.model_paths[0]: 'heed' names no sub-module with parameters; {MODULES}; did you mean 'head'?",
            2,
        ),
        (
            f"{{kind: {SAVES}, every_n_epochs: 1, model_names: [head, heed]}}",
            f"{PLACE}.model_names[1]: no weights below 'heed'; {MODULES}; did you mean 'head'?",
            2,
        ),
        (
            f"{{kind: {EMA}, every_n_epochs: 1, target_factors: [0.9, 1]}}",
            f"{PLACE}.target_factors[1]: 1.0 is not a number between 0 and 1, both excluded",
            2,
        ),
    ],
)
def test_an_unusable_setting_of_a_callback_is_a_message(tmp_path, entry, message, code):
    text = SMALL.partition("callbacks:\n")[0].partition("  evaluate:\n")[0] + f"callbacks:\n  - {entry}\n"
    (tmp_path / "bad.yaml").write_text(text.replace("max_epochs: 2", "max_epochs: 1"))
    output = invoke("train", "bad.yaml", cwd=tmp_path, code=code)
    (error,) = (line for line in output.splitlines() if line.startswith("Error: "))
    assert error.startswith(f"Error: {message}") if code == 1 else error == f"Error: {message}"
    assert output.splitlines()[-1].startswith("resume with: " if code == 1 else "Error: ")
    assert (tmp_path / "out").exists() == (code == 1)


def test_a_run_with_saved_weights_only_cannot_be_resumed_and_keeps_its_log(tmp_path):
    save = "noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_latest_optim: false"
    text = SMALL.partition("callbacks:\n")[0] + f"callbacks:\n  - {{kind: {save}}}\n"
    (tmp_path / "small.yaml").write_text(text)
    changes = ["--set", "trainer.max_updates=40", "--set", "trainer.checkpoints.at_end=false"]
    invoke("train", "small.yaml", *changes, cwd=tmp_path)
    run = only_run(tmp_path / "out/small").relative_to(tmp_path)
    before = contents(tmp_path)
    output = invoke("train", "--resume", run, "--set", "trainer.max_epochs=2", cwd=tmp_path, code=1)
    reason = "does not hold weights, optimizer and state of the whole model"
    assert output == (
        f"Error: the run cannot resume from any of the 2 checkpoints in {tmp_path / run}/checkpoints:\n"
        f"  {tmp_path / run}/checkpoints/E1_U38_S1205 {reason}\n"
        f"  {tmp_path / run}/checkpoints/E1_U40_S1269 {reason}\n"
        f"Start a new run: noether train {run}/config.yaml --set run.init_from={run}/checkpoints/E1_U40_S1269\n"
    )
    assert contents(tmp_path) == before


def test_default_checkpoints_can_be_resumed(tmp_path):
    save = "noether.core.callbacks.CheckpointCallback, every_n_epochs: 1"
    text = SMALL.partition("callbacks:\n")[0] + f"callbacks:\n  - {{kind: {save}}}\n"
    (tmp_path / "small.yaml").write_text(text)
    invoke("train", "small.yaml", "--set", "trainer.max_updates=40", cwd=tmp_path)
    run = only_run(tmp_path / "out/small").relative_to(tmp_path)
    output = invoke("train", "--resume", run, "--set", "trainer.max_epochs=2", cwd=tmp_path)
    assert "resuming at E1_U40_S1269" in output
    kept = {path.name for path in (tmp_path / run / "checkpoints").iterdir() if path.is_dir()}
    assert {name for name in kept if ".latest" not in name} == {
        "E1_U38_S1205",
        "E1_U40_S1269",
        "E2_U76_S2410",
    }
