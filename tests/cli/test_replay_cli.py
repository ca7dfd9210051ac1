"""`noether replay`: a recorded run tells its callbacks, or others, what it told them when it was trained."""

import json
import shutil
from functools import partial

import pytest
from command import PAPER, ROOT, SMALL, invoke, lines, only_run, start, until

from noether import AfterTraining, TrainState
from noether.config import load
from noether.config.loading import replace_callbacks
from noether.config.serialization import resolve_config
from noether.core import event as events
from noether.core.effect import LogScalars, SaveCheckpoint
from noether.core.tensors.tree import leaves
from noether.effects import CheckpointStore, open_run
from noether.effects.disk.calls import DISK
from noether.effects.disk.encoding import to_plain
from noether.effects.interpreter import merge_effects
from noether.effects.logs.events import read_events
from noether.effects.logs.jsonl import event_name
from noether.planning.replay import initial_state, replay
from noether.testing import same
from noether.training.configured_callbacks import build_callbacks

RECORD = ("--set", "trainer.record=events")


def replayed(run, callbacks=None):
    config = load(run / "config.yaml")
    if callbacks is not None:
        config = replace_callbacks(config, callbacks)
    recorded = partial(read_events, run / "events.jsonl", DISK)
    state, fixed = initial_state(recorded(), resolve_config(config))
    members = [placed.callback for placed in build_callbacks(config, state, fixed)]
    return replay(members, recorded, resolve_config(config))


def logged(found):
    """Return what a replay would have written to metrics.jsonl."""
    for step in found.steps:
        for effect in merge_effects([effect for _, effect in step.effects]):
            if isinstance(effect, LogScalars):
                values = {key: to_plain(value) for key, value in effect.values.items()}
                yield {"event": event_name(step.event), "update": step.state.iteration.update, "metrics": values}


def written(run, without=()):
    """Return what is in metrics.jsonl, but for what is measured of the process."""
    for line in lines(run):
        values = {key: value for key, value in line["metrics"].items() if key not in without}
        if values:
            yield {"event": line["event"], "update": line["update"], "metrics": values}


def saves(found):
    """Return where checkpoints were asked for, and the pointers to them."""
    asked = [(step, effect) for step in found.steps for _, effect in step.effects if isinstance(effect, SaveCheckpoint)]
    return [(str(step.state.iteration), event_name(step.event), effect.pointers) for step, effect in asked]


def check_exact(run):
    found = replayed(run)
    assert found.skipped == {}
    assert found.finished
    assert list(logged(found)) == list(written(run, without={"peak_memory"}))
    store = CheckpointStore(run / "checkpoints", run.name)
    kept = {(str(each.iteration), each.event) for each in store.manifests()}
    asked = {(at, event) for at, event, _ in saves(found)}
    assert {(at, event_name(getattr(events, event)())) for at, event in kept} <= asked
    for name, tag in store.pointers().items():
        last = [at for at, _, pointers in saves(found) if name in pointers][-1]
        assert str(store.find(tag).iteration) == last
    if "last" in store.pointers():
        end = store.load(store.find("last"))
        assert (found.state.stop, found.state.hyperparams) == (end.stop, end.hyperparams)
        assert (found.state.iteration, found.state.ended) == (end.iteration, True)
        assert same(scalars(found.state.callback_states), scalars(end.callback_states))
    return found


def scalars(memories):
    """Return what callbacks remember, but for tensors of the size of params, which a replay has no values of."""
    found = dict(leaves(memories))
    return {path: leaf for path, leaf in found.items() if path[0] not in HELD}


HELD = ("weights/ema=0.99", "weights/ema=0.999")


@pytest.mark.parametrize(
    ("config", "settings"),
    [("digits", ["trainer.max_epochs=8"]), ("heat", ["trainer.max_epochs=2"]), ("seed", ["trainer.max_epochs=2"])],
)
def test_its_own_callbacks_do_what_they_did(tmp_path, config, settings):
    words = [
        word for each in (*settings, f"run.output={tmp_path}", "trainer.record=events") for word in ("--set", each)
    ]
    invoke("train", ROOT / f"configs/{config}.yaml", *words, cwd=tmp_path)
    check_exact(only_run(tmp_path / config))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Folder of a recorded run of `SMALL` over six epochs; nobody writes to it."""
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


def test_other_callbacks_do_what_they_would_have_done(recorded, tmp_path):
    """They are also trained with: what they decide in the replay is what they decide there."""
    (tmp_path / "other.yaml").write_text(OTHER)
    begin = SMALL[: SMALL.index("callbacks:")]
    (tmp_path / "trained.yaml").write_text(begin + OTHER)
    invoke("train", "trained.yaml", *RECORD, "--set", "trainer.max_epochs=6", cwd=tmp_path)
    trained = check_exact(only_run(tmp_path / "out/small"))
    found = replayed(only_run(recorded / "out/small"), tmp_path / "other.yaml")
    assert str(found.state.iteration).startswith("E3_")  # no accuracy improves by 2
    assert (found.state.stop, str(found.state.iteration)) == (trained.state.stop, str(trained.state.iteration))
    assert list(logged(found)) == list(logged(trained))
    assert saves(found) == saves(trained)
    output = invoke("replay", only_run(recorded / "out/small"), "--callbacks", tmp_path / "other.yaml", cwd=tmp_path)
    assert output.splitlines()[-1] == f"ended at {found.state.iteration}: {found.state.stop}"
    assert f"stops: {found.state.stop}" in output


def test_what_the_others_consume_is_measured_as_it_was(recorded, tmp_path):
    """A file of consumers only: the run's own data iterators measure for them."""
    (tmp_path / "patience.yaml").write_text(
        "callbacks:\n  - kind: noether.core.callbacks.MetricEarlyStopping\n    every_n_epochs: 1\n"
        "    metric_key: val/accuracy\n    mode: lower\n    tolerance: 1\n"
    )
    text = SMALL.replace("  evaluate:\n    val: [loss, accuracy]\n    every_n_epochs: 1\n", "").replace(
        "callbacks:\n", "callbacks:\n  - kind: noether.core.callbacks.MetricCallback\n    every_n_epochs: 1\n"
        "    dataset_key: val\n    metric: accuracy\n",
    )  # fmt: skip
    (tmp_path / "small.yaml").write_text(text)
    invoke("train", "small.yaml", *RECORD, "--set", "trainer.max_epochs=3", cwd=tmp_path)
    output = invoke("replay", only_run(tmp_path / "out/small"), "--callbacks", "patience.yaml", cwd=tmp_path)
    assert output.splitlines()[-1].startswith("ended at E2_U76_S2410: val/accuracy has not been lower than")


def test_what_reads_params_is_left_out_by_name_with_what_reads_it(paper, tmp_path):
    text = PAPER.replace(
        "  - {kind: paper.say, every_n_epochs: 2}",
        "  - kind: noether.core.callbacks.BestMetricCallback\n    every_n_updates: 5\n"
        "    metric_key: weight_norm\n    mode: lower",
    )
    (paper / "norms.yaml").write_text(text)
    invoke("train", "norms.yaml", *RECORD, "--set", f"run.output={tmp_path}", cwd=paper)
    run = only_run(tmp_path / "paper")
    output = invoke("replay", run, "--log", cwd=paper)
    left = [line for line in output.splitlines() if line.startswith("skipped: ")]
    assert left[0] == "skipped: WeightNorm/U5, because it logs values of params"
    assert left[1].startswith("skipped: BestMetricCallback/U5/weight_norm, because ")
    assert len(left) == 2
    assert "loss/online/entropy/U1" in output
    assert "saves E3_U45_S180" in output


def test_a_run_that_was_killed_and_went_on_is_one_record(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    process = start("train", "small.yaml", *RECORD, "--set", "trainer.max_epochs=20", cwd=tmp_path)
    until(
        lambda: any(len(path.read_bytes().splitlines()) > 60 for path in tmp_path.glob("out/*/*/events.jsonl")), process
    )
    process.kill()
    process.communicate()
    run = only_run(tmp_path / "out/small")
    invoke("train", "--resume", run, cwd=tmp_path)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [each["update"] for each in events if each["event"] == "after_update"] == [*range(1, 20 * 38 + 1)]
    begun = [each["readings"].get("resumed", False) for each in events if each["event"] == "before_training"]
    assert begun == [False, True]
    check_exact(run)


def test_a_run_that_was_made_longer_is_one_record(recorded, tmp_path):
    shutil.copytree(recorded / "out", tmp_path / "out")
    run = only_run(tmp_path / "out/small")
    invoke("train", "--resume", run, "--set", "trainer.max_epochs=7", cwd=recorded)
    found = check_exact(run)
    assert found.state.iteration.epoch == 7


def test_a_point_of_the_run_shows_state_and_effects(recorded):
    run = only_run(recorded / "out/small")
    output = invoke("replay", run, "--at", "U10", cwd=recorded)
    assert output.count("AfterUpdate E0_U10_S320") == 1
    assert "loss/online/total/U5" in output
    assert "ProgressCallback/U10 returns LogText(" in output
    output = invoke("replay", run, "--at", "E2", cwd=recorded)
    assert [line for line in output.splitlines() if "AfterEpoch E2" in line]
    assert "AfterUpdate" not in output
    assert "returns SaveCheckpoint(" in output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--at", "U1000"), 1, "Error: --at U1000: the run has no event there; it ended at E6_U228_S7230"),
        (("--at", "7"), 2, "--at: '7' is not an iteration like"),
        (("--callbacks", "none.yaml"), 2, "none.yaml"),
        (("--callbacks", "bad.yaml"), 2, "bad.yaml:2: callbacks[0].every_n_epochs: 0 is not a whole number"),
        (("--callbacks", "late.yaml"), 2, "late.yaml:3: callbacks[0]: BestMetricCallback/E1/val/f1 consumes 'val/f1'"),
    ],
)
def test_bad_words_are_messages(recorded, words, code, message):
    (recorded / "bad.yaml").write_text("callbacks:\n  - {kind: noether.core.callbacks.LrCallback, every_n_epochs: 0}\n")
    (recorded / "late.yaml").write_text(
        "# consumes what nobody produces\ncallbacks:\n"
        "  - {kind: noether.core.callbacks.BestMetricCallback, every_n_epochs: 1, metric_key: val/f1}\n"
    )
    output = invoke("replay", only_run(recorded / "out/small"), *words, cwd=recorded, code=code)
    assert message in output


def test_a_directory_without_a_record_says_how_to_make_one(finished, tmp_path):
    output = invoke("replay", finished, cwd=tmp_path, code=1)
    assert output == (
        f"Error: {finished} has no events.jsonl: nothing was recorded; "
        "train with `trainer.record: events`, or --set trainer.record=events\n"
    )
    assert "is not the directory of a run" in invoke("replay", tmp_path, cwd=tmp_path, code=2)


def test_damage_is_named_and_a_torn_end_is_none(recorded, tmp_path):
    shutil.copytree(recorded / "out", tmp_path / "out")
    run = only_run(tmp_path / "out/small")
    events = run / "events.jsonl"
    whole = events.read_text().splitlines(keepends=True)
    events.write_text("".join(whole[:100]) + whole[100][:20])
    assert "the record ends at E2_U97_S3082, before the end of the run" in invoke("replay", run, cwd=recorded)
    events.write_text("".join([*whole[:50], "hello\n", *whole[51:]]))
    assert invoke("replay", run, cwd=recorded, code=1) == f"Error: {events}:51: not a recorded event: 'hello\\n'\n"
    events.write_text("".join([*whole[:50], *whole[51:]]))
    assert "the record continues at" in invoke("replay", run, cwd=recorded, code=1)
    events.write_text("")
    assert invoke("replay", run, cwd=recorded, code=1) == "Error: the record does not contain the start of the run\n"


def test_what_is_not_finite_is_recorded_as_it_is(paper, tmp_path):
    settings = ("trainer.loss=paper.broken_loss", f"run.output={tmp_path}", "trainer.max_epochs=1")
    text = PAPER.replace("OnlineLossCallback, every_n_updates: 1}", "OnlineLossCallback, every_n_updates: 1, nan: log}")
    text = text.replace("  - {kind: paper.WeightNorm, every_n_updates: 5, power: 2}\n", "")
    (paper / "broken.yaml").write_text(text)
    invoke("train", "broken.yaml", *RECORD, *(word for each in settings for word in ("--set", each)), cwd=paper)
    run = only_run(tmp_path / "paper")
    output = invoke("replay", run, "--log", cwd=paper)
    assert output.count("loss/online/entropy/U1 nan") == 15
    for line in (run / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_record_that_fails_stops_nothing(tmp_path, caplog):
    """Where there is a directory in its place, not a line can be written."""
    with open_run(tmp_path / "run") as run:
        (tmp_path / "run/events.jsonl").mkdir()
        told = run.recording(lambda *_: None, lambda *_: {"event": "x"})
        for _ in range(3):
            told((), TrainState(), AfterTraining())
    assert caplog.text.count("events.jsonl failed, and what it was given is lost") == 1
    assert "events.jsonl failed 3 times in all" in caplog.text
