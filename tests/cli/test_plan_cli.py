"""`noether plan` through the real command line: its output, its warnings and bad input."""

import json
import shutil
from pathlib import Path

import pytest
from command import ROOT, SMALL, contents, invoke, noether, start


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def plan_json(folder, *argv, config="small.yaml"):
    """Return the output of `--json`; check that the warnings are on the standard error, too."""
    output = invoke("plan", config, "--json", *argv, cwd=folder).replace("saving\n", "")  # SAVER prints this
    plan, end = json.JSONDecoder(parse_constant=pytest.fail).raw_decode(output)
    assert output[end:].strip().splitlines() == [f"Warning: {warning}" for warning in plan.get("warnings", [])]
    return plan


def test_the_whole_plan_in_a_separate_process(small):
    before = contents(small)
    done = noether("plan", "small.yaml", cwd=small)
    assert done.stderr == ""
    facts, table, timeline, ending = done.stdout.split("\n\n")
    assert facts == "small.yaml: 2 epochs, 76 updates, 2,410 samples; 1,638 parameters"
    rows = [line.split() for line in table.splitlines()]
    assert " ".join(rows[0]) == "callback first last firings written kept of each in all evaluations samples"
    assert rows[1] == ["ProgressCallback/U10", "U10", "U70", "7"]
    assert rows[3] == ["EvaluateCallback/E1/val", "E1", "E2", "2", "2", "592"]
    assert rows[5][:6] == ["CheckpointCallback/E1", "E1", "end", "3", "2", "2"]
    assert rows[6][:8] == ["BestCheckpointCallback/E1/val/accuracy", "E1", "E2", "2", "<=", "2", "<=", "1"]
    assert rows[7][:5] == ["together", "2", "2", "to", "3"]
    assert [line.split()[0] for line in timeline.splitlines()[:6]] == [row[0] for row in rows[1:7]]
    assert [line.split() for line in timeline.splitlines()[6:]] == [["E0", "E1", "E2"], ["U0", "U38", "U76"]]
    assert ending.startswith(
        "checkpoints: 39.6 kB to 59.4 kB at the end, 99 kB at most at any time, excluding metadata "
    )
    assert contents(small) == before


def test_json_has_stable_keys(small):
    plan = plan_json(small)
    assert list(plan) == ["config", "end", "updates_per_epoch", "samples_per_epoch", "effective_batch_size", "ranks",
                          "params", "callbacks", "checkpoints", "evaluations", "disk", "warnings", "notes"]  # fmt: skip
    assert plan["end"] == {"epoch": 2, "update": 76, "sample": 2410, "iteration": "E2_U76_S2410"}
    assert plan["evaluations"] == {"count": 2, "samples": 592}
    assert plan["disk"]["path"] == str(small)
    assert plan["disk"]["free_bytes"] > 0
    checkpoint = plan["callbacks"][4]
    assert {name: checkpoint[name] for name in ("name", "path", "when", "firings")} == {
        "name": "CheckpointCallback/E1", "path": "callbacks[3]", "when": "E1", "firings": 3}  # fmt: skip
    assert checkpoint["last"] == {
        "event": "AfterTraining", "epoch": 2, "update": 76, "sample": 2410, "iteration": "E2_U76_S2410"}  # fmt: skip
    assert checkpoint["checkpoints"]["written"] == {"at_least": 2, "at_most": 2}  # epoch 2 is the end
    (each,) = checkpoint["checkpoints"]["each_bytes"]
    assert checkpoint["checkpoints"]["written_bytes"] == {"at_least": 2 * each, "at_most": 2 * each}
    assert plan["callbacks"][2]["evaluations"] == {"dataset": "val", "weights": None, "count": 2, "samples": 592}


def test_what_fires_at_a_point(small):
    assert [line.split() for line in invoke("plan", "small.yaml", "--at", "U10", cwd=small).splitlines()] == [
        ["at", "event", "callback"],
        ["U10", "AfterUpdate", "ProgressCallback/U10"],
        ["U10", "AfterUpdate", "OnlineLossCallback/U5"],
    ]
    assert invoke("plan", "small.yaml", "--at", "U7", cwd=small) == "nothing fires at U7\n"
    fires = plan_json(small, "--at", "E2")["fires"]
    assert [(each["name"], each["at"]["event"]) for each in fires] == [
        ("EvaluateCallback/E1/val", "AfterEpoch"),
        ("BestMetricCallback/E1/val/accuracy", "AfterEpoch"),
        ("CheckpointCallback/E1", "AfterEpoch"),
        ("BestCheckpointCallback/E1/val/accuracy", "AfterEpoch"),
        ("CheckpointCallback/E1", "AfterTraining"),
    ]
    assert plan_json(small, "--at", "S160") == {**plan_json(small, "--at", "U5"), "at": "S160"}


def test_what_fires_between_two_points(small):
    fires = plan_json(small, "--between", "E1", "U60")["fires"]
    assert [(each["name"], each["firings"], each["first"]["update"], each["last"]["update"]) for each in fires] == [
        ("ProgressCallback/U10", 3, 40, 60),
        ("OnlineLossCallback/U5", 5, 40, 60),
    ]
    output = invoke("plan", "small.yaml", "--between", "E1", "U60", cwd=small)
    assert output.splitlines()[2].split() == ["OnlineLossCallback/U5", "U40", "U60", "5"]
    output = invoke("plan", "small.yaml", "--between", "U1", "U4", cwd=small)
    assert output == "nothing fires after U1 and up to U4\n"
    everything = plan_json(small, "--between", "U0", "E2")["fires"]
    assert sum(each["firings"] for each in everything) == sum(each["firings"] for each in plan_json(small)["callbacks"])


def test_a_picture(small):
    pytest.importorskip("matplotlib")
    output = invoke("plan", "small.yaml", "--png", "plan.png", cwd=small)
    assert output == invoke("plan", "small.yaml", cwd=small)
    first = (small / "plan.png").read_bytes()
    assert first.startswith(b"\x89PNG\r\n")
    invoke("plan", "small.yaml", "--png", "plan.png", "--set", "callbacks.0.every_n_updates=30", cwd=small)
    assert (small / "plan.png").read_bytes() != first


def test_a_terminal_without_unicode(small):
    process = start("plan", "small.yaml", cwd=small, PYTHONIOENCODING="ascii")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert output.isascii()
    assert "...|..." in output


@pytest.mark.parametrize("name", ["digits", "heat", "seed"])
def test_the_example_configurations(name, tmp_path):
    cache = [word for key in ("train", "val", "test") for word in ("--set", f"data.{key}.samples=64")]
    where = [word for key in ("train", "val", "test") for word in ("--set", f"data.{key}.cache=cache")]
    plan = plan_json(tmp_path, *(cache + where if name == "heat" else ()), config=ROOT / f"configs/{name}.yaml")
    assert all(each["firings"] for each in plan["callbacks"])
    unsaved = (
        "callbacks: no callback saves checkpoints, so a run that is killed starts again; add "
        "noether.core.callbacks.CheckpointCallback"
    )
    assert [warning.partition(": ")[2] for warning in plan["warnings"]] == [unsaved] * (name == "seed")


SAVING = SMALL[SMALL.index("  - kind: noether.core.callbacks.CheckpointCallback") :]
BEST = SAVING[SAVING.index("  - kind: noether.core.callbacks.BestCheckpointCallback") :]
END = "the run ends at E2_U76_S2410"
NOT_AT_END = ("trainer:\n", "trainer:\n  checkpoints: {at_end: false}\n")

# Changes of SMALL, and the warning that they cause.
WARNED = {
    "an interval longer than the run": (
        [("every_n_updates: 10", "every_n_updates: 100")],
        (
            ":28: callbacks[0].every_n_updates: the run does not reach update 100, so ProgressCallback/U100 never "
            f"fires: {END}; write at most 76, or at_end: true"
        ),
    ),
    "an evaluation interval longer than the run": (
        [
            ("    every_n_epochs: 1\ncallbacks", "    every_n_updates: 99\ncallbacks"),
            ("    every_n_epochs: 1\n    metric_key", "    every_n_updates: 99\n    metric_key"),
            (BEST, BEST.replace("every_n_epochs: 1", "every_n_updates: 99")),
        ],
        (
            ":25: trainer.evaluate.every_n_updates: the run does not reach update 99, so EvaluateCallback/U99/val "
            f"never fires: {END}; write at most 76"
        ),
    ),
    "epochs of a run that ends before the first": (
        [("max_epochs: 2", "max_updates: 30"), ("every_n_updates: 5", "every_n_epochs: 1")],
        (
            ":30: callbacks[1].every_n_epochs: the run does not reach epoch 1, so OnlineLossCallback/E1 never fires: "
            "the run ends at E0_U30_S960; count in updates instead, or at_end: true"
        ),
    ),
    "checkpoints at the end only": (
        [("    every_n_epochs: 1\n    save_weights", "    every_n_epochs: 3\n    save_weights")],
        (
            ":35: callbacks[3].every_n_epochs: the run does not reach epoch 3, so CheckpointCallback/E3 fires only at "
            f"the end: {END}; write at most 2"
        ),
    ),
    "last weights saved only if a metric is good": (
        [(SAVING, BEST), NOT_AT_END],
        (
            ":35: callbacks[3]: a metric decides whether weights are saved, so the last ones may be lost; "
            "add noether.core.callbacks.CheckpointCallback"
        ),
    ),
    "last weights not saved": (
        [(SAVING, "  - kind: saver.save\n    every_n_updates: 30\n"), NOT_AT_END],
        (
            ":35: callbacks[3]: save saves last at E1_U60_S1909; the 16 updates up to the end at E2_U76_S2410 are "
            "lost; write at_end: true, or add noether.core.callbacks.CheckpointCallback"
        ),
    ),
    "only the initial weights saved": (
        [(SAVING, "  - kind: saver.begin\n"), NOT_AT_END],
        (
            ":35: callbacks[3]: begin saves last at E0_U0_S0; the 76 updates up to the end at E2_U76_S2410 are "
            "lost; write at_end: true, or add noether.core.callbacks.CheckpointCallback"
        ),
    ),
    "unknown model_names": (
        [(SAVING, SAVING + "  - kind: saver.haed\n    every_n_updates: 30\n")],
        ":41: callbacks[5].model_names: haed requests a checkpoint that cannot be saved: no weights below haed",
    ),
}
SAVER = '''\
from noether import BeforeTraining, SaveCheckpoint, on


@on(BeforeTraining)
def begin(state, event):
    """Save the initial state."""
    return state, (SaveCheckpoint(),)


def save(state, event):
    """Save and print."""
    print("saving")
    return state, (SaveCheckpoint(),)


def haed(state, event):
    """Save a module that the model does not have."""
    return state, (SaveCheckpoint(models=("haed",)),)
'''


@pytest.mark.parametrize(("changes", "message"), WARNED.values(), ids=WARNED)
def test_likely_mistakes_are_warned_of(small, changes, message):
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (small / "small.yaml").write_text(text)
    (small / "saver.py").write_text(SAVER)
    plan = plan_json(small)
    assert any(warning.startswith(f"small.yaml{message}") for warning in plan["warnings"]), plan["warnings"]


def test_output_of_callbacks_is_not_part_of_the_plan(small):
    text = SMALL.replace(BEST, BEST + "  - kind: saver.save\n    every_n_updates: 30\n")
    (small / "small.yaml").write_text(text)
    (small / "saver.py").write_text(SAVER)
    done = noether("plan", "small.yaml", "--json", cwd=small)
    assert json.loads(done.stdout)["callbacks"][-1]["name"] == "save"
    assert set(done.stderr.splitlines()) == {"saving"}


def test_checkpoints_larger_than_the_free_space_are_warned_of(small, monkeypatch):
    usage = shutil.disk_usage(small)._replace(free=50_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    (warning,) = plan_json(small)["warnings"]
    assert warning.startswith("small.yaml:3: run.output: checkpoints take up to ")
    assert warning.endswith(f", but {str(small)!r} has only 50 kB free; choose another folder, or save less: keep, "
                            "save_latest_optim, a longer interval")  # fmt: skip


NO_PNG = "the name must end in .png"
FIX = "give a point on one counter, like U1000, E2 or S512"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at", "X5"], f"--at X5: 'X5' is not a point of a run; {FIX}"),
        (["--at", "1000"], f"--at 1000: '1000' is not a point of a run; {FIX}"),
        (["--at", "U-1"], f"--at U-1: 'U-1' is not a point of a run; {FIX}"),
        (["--at", ""], f"--at : '' is not a point of a run; {FIX}"),
        (["--at", "U" + "9" * 5000], f"--at U{'9' * 5000}: 'U{'9' * 5000}' is not a point of a run; {FIX}"),
        (["--at", "E1_U38"], f"--at E1_U38: 'E1_U38' names several counters; {FIX}"),
        (["--at", "U0"], "--at U0: nothing fires before U1, the first update"),
        (["--at", "U77"], "--at U77: U77 is after the end of the run at E2_U76_S2410"),
        (["--at", "E3"], "--at E3: E3 is after the end of the run at E2_U76_S2410"),
        (["--at", "S2411"], "--at S2411: S2411 is after the end of the run at E2_U76_S2410"),
        (["--between", "E2", "E1"], "--between E2 E1: E2 is not before E1; give the earlier point first"),
        (["--between", "E1", "U38"], "--between E1 U38: E1 is not before U38; give the earlier point first"),
        (["--between", "E1", "E9"], "--between E1 E9: E9 is after the end of the run at E2_U76_S2410"),
        (["--between", "E1", "hi"], f"--between E1 hi: 'hi' is not a point of a run; {FIX}"),
        (["--between", "E1"], "Option '--between' requires 2 arguments."),
        (["--at", "U1", "--between", "E1", "E2"], "give either --at or --between"),
        (["--png", "nowhere/plan.png"], "--png nowhere/plan.png: the folder 'nowhere' does not exist; create it first"),
        (["--png", "."], "--png .: is a folder; give the path of a file"),
        (["--png", "plan.jpg"], f"--png plan.jpg: {NO_PNG}; write plan.png"),
    ],
)  # fmt: skip
def test_bad_arguments(small, arguments, message):
    before = contents(small)
    output = invoke("plan", "small.yaml", *arguments, cwd=small, code=2)
    assert output.splitlines()[-1] == f"Error: {message}"
    assert contents(small) == before


def test_a_picture_on_a_full_disk(small):
    pytest.importorskip("matplotlib")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no device that is always full")
    output = invoke("plan", "small.yaml", "--png", full, cwd=small, code=1)
    assert output.splitlines()[-1] == (
        "Error: --png /dev/full: the picture could not be written: No space left on device"
    )


def test_a_plan_without_callbacks(small):
    pytest.importorskip("matplotlib")
    emptied = ["--set", "callbacks=[]", "--set", "trainer.evaluate=null"]
    output = invoke("plan", "small.yaml", *emptied, "--png", "plan.png", cwd=small)
    (warning,) = (line for line in output.splitlines() if "Warning" in line)
    assert warning.startswith(
        "Warning: --set callbacks=[]: callbacks: no callback saves checkpoints, so a run that is "
    )
    assert (small / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_more_samples_than_a_checkpoint_can_count(small):
    output = invoke("plan", "small.yaml", "--set", f"trainer.max_epochs={10**21}", cwd=small, code=2)
    assert output == (
        f"Error: --set trainer.max_epochs={10**21}: trainer.max_epochs: {10**21} is more than a checkpoint can "
        f"count: {2**63 - 1:,} samples\n"
    )
    longest = (2**63 - 1) // 1205
    plan = plan_json(small, "--set", f"trainer.max_epochs={longest}", "--set", "callbacks.3.keep=5")
    assert plan["end"]["epoch"] == plan["callbacks"][3]["firings"] == longest
    assert plan["checkpoints"]["kept"] == {"at_least": 5, "at_most": 6}


def test_no_configuration(small):
    assert invoke("plan", cwd=small, code=2).splitlines()[-1] == "Error: Missing argument 'CONFIG'."
    output = invoke("plan", "smal.yaml", cwd=small, code=2)
    assert output == "Error: smal.yaml: no such file; did you mean 'small.yaml'?\n"
    output = invoke("plan", "small.yaml", "--set", "trainer.max_epohcs=3", cwd=small, code=2)
    assert output.startswith("Error: --set trainer.max_epohcs=3: trainer.max_epohcs: unknown setting; did you mean")


def test_a_picture_without_matplotlib(small, monkeypatch):
    monkeypatch.setattr("noether.cli.options.find_spec", lambda name: None)
    output = invoke("plan", "small.yaml", "--png", "plan.png", cwd=small, code=2)
    assert output.splitlines()[-1] == ("Error: --png: matplotlib is not installed; run: pip install 'noether[plot]'")
    assert not (small / "plan.png").exists()
