"""`noether replay`: callbacks decide in the replay of a recorded run as they would in training."""

import json
import shutil
from functools import partial

import pytest
from command import PAPER, ROOT, SMALL, WITH_METRIC, invoke, lines, only_run, set_options, start, wait_until

from noether import AfterTraining, TrainState
from noether.config import load
from noether.config.loading import replace_callbacks
from noether.config.serialization import resolve_config
from noether.core import event as events
from noether.core.effect import LogScalars, SaveCheckpoint
from noether.core.tensors.tree import leaves
from noether.effects import CheckpointStore, open_run
from noether.effects.disk.calls import DISK
from noether.effects.disk.json_numbers import to_plain
from noether.effects.interpreter import merge_effects
from noether.effects.logs.events import read_events
from noether.effects.logs.metrics import event_name
from noether.planning.replay import initial_state, replay
from noether.testing import same
from noether.training.configured_callbacks import build_callbacks

RECORD = ("--set", "trainer.record=events")


def replay_run(run, callbacks=None):
    config = load(run / "config.yaml")
    if callbacks is not None:
        config = replace_callbacks(config, callbacks)
    recorded = partial(read_events, run / "events.jsonl", DISK)
    state, fixed = initial_state(recorded(), resolve_config(config))
    members = [placed.callback for placed in build_callbacks(config, state, fixed)]
    return replay(members, recorded, resolve_config(config))


def logged_lines(found):
    """Return the lines that a replay would have written to metrics.jsonl."""
    for step in found.steps:
        for effect in merge_effects([effect for _, effect in step.effects]):
            if isinstance(effect, LogScalars):
                values = {key: to_plain(value) for key, value in effect.values.items()}
                yield {"event": event_name(step.event), "update": step.state.iteration.update, "metrics": values}


def metric_lines(run, without=()):
    """Return the lines of metrics.jsonl without the keys in `without`."""
    for line in lines(run):
        values = {key: value for key, value in line["metrics"].items() if key not in without}
        if values:
            yield {"event": line["event"], "update": line["update"], "metrics": values}


def saves(found):
    """Return iteration, event and pointers of each requested checkpoint."""
    requests = [
        (step, effect) for step in found.steps for _, effect in step.effects if isinstance(effect, SaveCheckpoint)
    ]
    return [(str(step.state.iteration), event_name(step.event), effect.pointers) for step, effect in requests]


def check_exact(run):
    found = replay_run(run)
    assert found.skipped == {}
    assert found.finished
    assert list(logged_lines(found)) == list(metric_lines(run, without={"peak_memory"}))
    store = CheckpointStore(run / "checkpoints", run.name)
    of_trainer = {each.tag for each in store.manifests() if set(each.retention) == {"end"}}  # no callback requests it
    existing = {(str(each.iteration), each.event) for each in store.manifests() if each.tag not in of_trainer}
    requested = {(at, event) for at, event, _ in saves(found)}
    assert {(at, event_name(getattr(events, event)())) for at, event in existing} <= requested
    for name, tag in store.pointers().items():
        if tag in of_trainer:
            continue
        last = [at for at, _, pointers in saves(found) if name in pointers][-1]
        assert str(store.find(tag).iteration) == last
    if "last" in store.pointers():
        end = store.load(store.find("last"))
        assert (found.state.stop, found.state.hyperparams) == (end.stop, end.hyperparams)
        assert (found.state.iteration, found.state.ended) == (end.iteration, True)
        assert same(known_memory(found.state.callback_states), known_memory(end.callback_states))
    return found


def known_memory(memories):
    """Return the memory of callbacks without averages of params, whose values a replay does not have."""
    found = dict(leaves(memories))
    return {path: leaf for path, leaf in found.items() if path[0] not in AVERAGES}


AVERAGES = ("weights/ema=0.99", "weights/ema=0.999")


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("digits", ["trainer.max_epochs=8"]),
        ("heat", ["trainer.max_epochs=2", *(f"data.{split}.size=16" for split in ("train", "val", "test"))]),
        ("seed", ["trainer.max_epochs=2"]),
    ],
)
def test_the_runs_own_callbacks_decide_as_in_training(tmp_path, config, settings):
    changes = [*settings, f"run.output={tmp_path}", "trainer.record=events"]
    invoke("train", ROOT / f"configs/{config}.yaml", *set_options(changes), cwd=tmp_path)
    check_exact(only_run(tmp_path / config))


def test_consumers_that_skip_a_missing_metric_decide_as_in_training(tmp_path):
    skipping = SMALL.replace("    metric_key: val/accuracy\n", "    metric_key: val/accuracy\n    missing: skip\n")
    (tmp_path / "small.yaml").write_text(skipping)
    changes = ["trainer.record=events", "trainer.max_epochs=5", "trainer.evaluate.every_n_epochs=2"]
    invoke("train", "small.yaml", *set_options(changes), cwd=tmp_path)
    found = check_exact(only_run(tmp_path / "out/small"))
    bests = [at for at, _, pointers in saves(found) if "best_model.val.accuracy" in pointers]
    assert bests
    assert all(at.startswith(("E2_", "E4_")) for at in bests)


@pytest.fixture(scope="module")
def recorded_folder(tmp_path_factory):
    """Folder of a recorded run of `SMALL` over six epochs; no test writes to it."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "small.yaml").write_text(SMALL)
    invoke("train", "small.yaml", *RECORD, "--set", "trainer.max_epochs=6", cwd=folder)
    return folder


OTHER = """\
callbacks:
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 5}
  - {kind: noether.core.callbacks.BestCheckpointCallback, every_n_epochs: 1, metric_key: val/accuracy, mode: lower}
  - kind: noether.core.callbacks.MetricEarlyStopping
    every_n_epochs: 1
    metric_key: val/accuracy
    mode: lower
    min_delta: 2
    tolerance: 2
"""


def test_other_callbacks_decide_as_if_trained_with(recorded_folder, tmp_path):
    """A run that is trained with the other callbacks decides the same."""
    (tmp_path / "other.yaml").write_text(OTHER)
    begin = SMALL[: SMALL.index("callbacks:")]
    (tmp_path / "trained.yaml").write_text(begin + OTHER)
    invoke("train", "trained.yaml", *RECORD, "--set", "trainer.max_epochs=6", cwd=tmp_path)
    trained = check_exact(only_run(tmp_path / "out/small"))
    found = replay_run(only_run(recorded_folder / "out/small"), tmp_path / "other.yaml")
    assert str(found.state.iteration).startswith("E3_")  # no accuracy improves by 2
    assert (found.state.stop, str(found.state.iteration)) == (trained.state.stop, str(trained.state.iteration))
    assert list(logged_lines(found)) == list(logged_lines(trained))
    assert saves(found) == saves(trained)
    output = invoke(
        "replay", only_run(recorded_folder / "out/small"), "--callbacks", tmp_path / "other.yaml", cwd=tmp_path
    )
    assert output.splitlines()[-1] == f"ended at {found.state.iteration}: {found.state.stop}"
    assert f"stops: {found.state.stop}" in output


def test_other_callbacks_consume_the_recorded_measurements(recorded_folder, tmp_path):
    """A file of consumers only: they read the measurements of the run's own data iterators."""
    (tmp_path / "patience.yaml").write_text(
        "callbacks:\n  - kind: noether.core.callbacks.MetricEarlyStopping\n    every_n_epochs: 1\n"
        "    metric_key: val/accuracy\n    mode: lower\n    min_delta: 2\n    tolerance: 1\n"
    )
    (tmp_path / "small.yaml").write_text(WITH_METRIC)
    invoke("train", "small.yaml", *RECORD, "--set", "trainer.max_epochs=3", cwd=tmp_path)
    output = invoke("replay", only_run(tmp_path / "out/small"), "--callbacks", "patience.yaml", cwd=tmp_path)
    assert output.splitlines()[-1].startswith("ended at E2_U76_S2410: val/accuracy has not been lower than")


def test_callbacks_that_read_params_are_skipped_with_their_consumers(paper, tmp_path):
    text = PAPER.replace(
        "  - {kind: paper.say, every_n_epochs: 2}",
        "  - kind: noether.core.callbacks.BestMetricCallback\n    every_n_updates: 5\n"
        "    metric_key: weight_norm\n    mode: lower",
    )
    (paper / "norms.yaml").write_text(text)
    invoke("train", "norms.yaml", *RECORD, "--set", f"run.output={tmp_path}", cwd=paper)
    run = only_run(tmp_path / "paper")
    output = invoke("replay", run, "--log", cwd=paper)
    skipped = [line for line in output.splitlines() if line.startswith("skipped: ")]
    assert skipped[0] == "skipped: WeightNorm/U5, because it logs values of params"
    assert skipped[1].startswith("skipped: BestMetricCallback/U5/weight_norm, because ")
    assert len(skipped) == 2
    assert "loss/online/entropy/U1" in output
    assert "saves E3_U45_S180" in output


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_record(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    process = start("train", "small.yaml", *RECORD, "--set", "trainer.max_epochs=20", cwd=tmp_path)
    wait_until(
        lambda: any(len(path.read_bytes().splitlines()) > 60 for path in tmp_path.glob("out/*/*/events.jsonl")), process
    )
    process.kill()
    process.communicate()
    run = only_run(tmp_path / "out/small")
    invoke("train", "--resume", run, cwd=tmp_path)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [each["update"] for each in events if each["event"] == "after_update"] == [*range(1, 20 * 38 + 1)]
    resumed = [each["readings"].get("resumed", False) for each in events if each["event"] == "before_training"]
    assert resumed == [False, True]
    check_exact(run)


def test_a_run_with_a_later_end_is_one_record(recorded_folder, tmp_path):
    shutil.copytree(recorded_folder / "out", tmp_path / "out")
    run = only_run(tmp_path / "out/small")
    invoke("train", "--resume", run, "--set", "trainer.max_epochs=7", cwd=recorded_folder)
    found = check_exact(run)
    assert found.state.iteration.epoch == 7


def test_a_point_of_the_run_shows_state_and_effects(recorded_folder):
    run = only_run(recorded_folder / "out/small")
    output = invoke("replay", run, "--at", "U10", cwd=recorded_folder)
    assert output.count("AfterUpdate E0_U10_S320") == 1
    assert "loss/online/total/U5" in output
    assert "ProgressCallback/U10 returns LogText(" in output
    output = invoke("replay", run, "--at", "E2", cwd=recorded_folder)
    assert [line for line in output.splitlines() if "AfterEpoch E2" in line]
    assert "AfterUpdate" not in output
    assert "returns SaveCheckpoint(" in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--at", "U1000"), 1, "Error: --at U1000: the run has no event there; it ended at E6_U228_S7230"),
        (("--at", "7"), 2, "--at: '7' is not an iteration like"),
        (("--callbacks", "none.yaml"), 2, "none.yaml"),
        (("--callbacks", "bad.yaml"), 2, "bad.yaml:2: callbacks[0].every_n_epochs: 0 is not a whole number"),
        (("--callbacks", "late.yaml"), 2, "late.yaml:3: callbacks[0]: BestMetricCallback/E1/val/f1 consumes 'val/f1'"),
    ],
)
def test_bad_arguments(recorded_folder, arguments, code, message):
    (recorded_folder / "bad.yaml").write_text(
        "callbacks:\n  - {kind: noether.core.callbacks.LrCallback, every_n_epochs: 0}\n"
    )
    (recorded_folder / "late.yaml").write_text(
        "# consumes a metric without a producer\ncallbacks:\n"
        "  - {kind: noether.core.callbacks.BestMetricCallback, every_n_epochs: 1, metric_key: val/f1}\n"
    )
    output = invoke("replay", only_run(recorded_folder / "out/small"), *arguments, cwd=recorded_folder, code=code)
    assert message in output


def test_a_directory_without_a_record_says_how_to_make_one(finished_run, tmp_path):
    output = invoke("replay", finished_run, cwd=tmp_path, code=1)
    assert output == (
        f"Error: {finished_run} has no events.jsonl: nothing was recorded; "
        "train with `trainer.record: events`, or --set trainer.record=events\n"
    )
    assert "is not the directory of a run" in invoke("replay", tmp_path, cwd=tmp_path, code=2)


def test_damage_is_named_and_a_partial_last_line_is_ignored(recorded_folder, tmp_path):
    shutil.copytree(recorded_folder / "out", tmp_path / "out")
    run = only_run(tmp_path / "out/small")
    events = run / "events.jsonl"
    complete = events.read_text().splitlines(keepends=True)
    events.write_text("".join(complete[:100]) + complete[100][:20])
    assert "the record ends at E2_U97_S3082, before the end of the run" in invoke("replay", run, cwd=recorded_folder)
    events.write_text("".join([*complete[:50], "hello\n", *complete[51:]]))
    assert (
        invoke("replay", run, cwd=recorded_folder, code=1) == f"Error: {events}:51: not a recorded event: 'hello\\n'\n"
    )
    events.write_text("".join([*complete[:50], *complete[51:]]))
    assert "the record continues at" in invoke("replay", run, cwd=recorded_folder, code=1)
    events.write_text("")
    assert (
        invoke("replay", run, cwd=recorded_folder, code=1)
        == "Error: the record does not contain the start of the run\n"
    )


def test_nonfinite_values_are_recorded_as_they_are(paper, tmp_path):
    settings = ("trainer.loss=paper.broken_loss", f"run.output={tmp_path}", "trainer.max_epochs=1")
    text = PAPER.replace("OnlineLossCallback, every_n_updates: 1}", "OnlineLossCallback, every_n_updates: 1, nan: log}")
    text = text.replace("  - {kind: paper.WeightNorm, every_n_updates: 5, power: 2}\n", "")
    (paper / "broken.yaml").write_text(text)
    invoke("train", "broken.yaml", *RECORD, *set_options(settings), cwd=paper)
    run = only_run(tmp_path / "paper")
    output = invoke("replay", run, "--log", cwd=paper)
    assert output.count("loss/online/entropy/U1 nan") == 15
    for line in (run / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_failing_record_does_not_stop_training(tmp_path, caplog):
    """A directory in place of the file makes every write fail."""
    with open_run(tmp_path / "run") as directory:
        (tmp_path / "run/events.jsonl").mkdir()
        interpret = directory.recording_interpreter(lambda *_: None, lambda *_: {"event": "x"})
        for _ in range(3):
            interpret((), TrainState(), AfterTraining())
    assert caplog.text.count("events.jsonl failed and may have lost log entries") == 1
    assert "events.jsonl failed 3 times in total" in caplog.text
