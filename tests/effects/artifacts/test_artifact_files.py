"""Artifacts are written once per content, before the line that names them, and rewound where a run resumes."""

import hashlib
import io
import json
import weakref
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from faults import KINDS, Faults, Killed, PowerLoss, can_meet
from log_files import at, read
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from small_run import open_small_run, state_after

from noether import (
    AfterUpdate,
    AtEval,
    LogFigure,
    LogFile,
    LogHistogram,
    LogImages,
    LogScalars,
    LogTable,
    LogText,
    SaveCheckpoint,
    TrainState,
)
from noether.core.tensors.tree import freeze
from noether.effects.branches import branch_run
from noether.effects.disk.calls import Disk
from noether.effects.evaluation_logs import EvaluationLogs
from noether.effects.interpreter import merge_effects

UPDATE = AfterUpdate(samples=4)
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"


def draw(height=1.0):
    figure = Figure(figsize=(1, 1), dpi=50)
    figure.subplots().plot([0, height])
    return figure


def write(folder, *effects):
    """Write artifacts at one update; return their entries by key and their contents."""
    with open_small_run(folder) as directory:
        directory.interpreter(effects, at(1), UPDATE)
    entries = {key: entry for line in read(folder / "metrics.jsonl") for key, entry in line["artifacts"].items()}
    return entries, {key: (folder / entry["file"]).read_bytes() for key, entry in entries.items()}


def pixels_of(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_every_kind_is_a_file_named_by_its_content(tmp_path):
    (tmp_path / "mesh.OBJ").write_bytes(b"v 0 0 0")
    effects = [
        LogFigure("figure", draw(), caption="a line"),
        LogFigure("svg", SVG),
        LogImages("images", torch.rand(5, 8, 8), captions=("a", "b", "c", "d", "e")),
        LogHistogram("histogram", torch.tensor([0.0, 1.0, 1.0, float("nan"), float("-inf")]), bins=2),
        LogTable("table", ["a", "b"], [[1, None], [torch.tensor(0.5), np.float32(2)], [float("nan"), "x"]]),
        LogText("a report", key="text"),
        LogFile("file", tmp_path / "mesh.OBJ"),
    ]
    entries, contents = write(tmp_path / "run", *effects)
    assert list(entries) == ["figure", "svg", "images", "histogram", "table", "text", "file"]
    for key, entry in entries.items():
        digest = hashlib.sha256(contents[key]).hexdigest()
        suffix = {"figure": ".png", "images": ".png", "svg": ".svg", "text": ".txt", "file": ".obj"}.get(key, ".json")
        assert entry["file"] == f"artifacts/{digest[:2]}/{digest}{suffix}"
        assert entry["bytes"] == len(contents[key])
    assert [entry["kind"] for entry in entries.values()] == [
        "figure", "figure", "images", "histogram", "table", "text", "file",
    ]  # fmt: skip
    assert [entry["caption"] for entry in entries.values()] == ["a line", "", "a, b, c, d, e", "", "", "", ""]
    assert entries["file"]["name"] == "mesh.OBJ"
    assert pixels_of(contents["figure"]).shape == (50, 50, 4)
    histogram = json.loads(contents["histogram"])
    assert histogram == {"counts": [1, 2], "edges": [0.0, 0.5, 1.0], "nan": 1, "infinite": 1}
    assert json.loads(contents["table"])["rows"] == [[1, None], [0.5, 2.0], ["NaN", "x"]]
    assert (contents["svg"], contents["text"], contents["file"]) == (SVG, b"a report", b"v 0 0 0")


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_images_are_written_to_the_last_pixel(tmp_path, channels):
    shape = (3, 4, 6) if channels is None else (3, channels, 4, 6)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    as_floats = (images.double() / 255).numpy()
    entries, contents = write(tmp_path / "run", LogImages("a", images), LogImages("b", as_floats))
    assert entries["a"] == entries["b"]
    sheet = pixels_of(contents["a"])
    assert sheet.shape[:2] == (9, 13)  # two rows of two, with a gap of one pixel
    expected = images if channels is None else images.permute(0, 2, 3, 1).squeeze(-1)
    for number, (top, left) in enumerate([(0, 0), (0, 7), (5, 0)]):
        assert (sheet[top : top + 4, left : left + 6] == expected[number].numpy()).all()


def test_equal_content_is_written_once_and_equal_figures_are_equal_content(tmp_path):
    entries, _ = write(tmp_path / "run", LogFigure("a", draw()), LogFigure("b", draw()), LogFigure("c", draw(2.0)))
    assert entries["a"]["file"] == entries["b"]["file"] != entries["c"]["file"]
    assert len([path for path in (tmp_path / "run/artifacts").rglob("*") if path.is_file()]) == 2


def test_a_tensor_is_read_when_the_effect_is_run(tmp_path):
    values = torch.zeros(4)
    with open_small_run(tmp_path / "run") as directory:
        directory.interpreter([LogHistogram("h", values, bins=1)], at(1), UPDATE)
        values.fill_(9.0)  # as donation does
    (line,) = read(tmp_path / "run/metrics.jsonl")
    content = json.loads((tmp_path / "run" / line["artifacts"]["h"]["file"]).read_text())
    assert content["edges"] == [-0.5, 0.5]


def test_a_figure_of_pyplot_is_closed_and_no_figure_is_kept(tmp_path):
    with open_small_run(tmp_path / "run") as directory:
        figure, _ = plt.subplots(figsize=(1, 1))
        other = draw()
        kept = weakref.ref(other)
        directory.interpreter([LogFigure("a", figure), LogFigure("b", other)], at(1), UPDATE)
        assert plt.get_fignums() == []
        del other, figure
        import gc

        gc.collect()
        assert kept() is None


def test_what_cannot_be_written_is_named_once_and_the_rest_is_written(tmp_path, caplog):
    class Unwilling:
        def savefig(self, *_, **__):
            raise RuntimeError("no font")

    broken = [
        LogFigure("broken", Unwilling()),
        LogImages("dark", torch.full((1, 2, 2), -1.0)),
        LogHistogram("edges", counts=[1, 1], edges=[0, 2, 1]),
        LogFile("gone", tmp_path / "nothing.bin"),
    ]
    with open_small_run(tmp_path / "run") as directory:
        for update in (1, 2):
            directory.interpreter([*broken, LogText("fine", key="fine")], at(update), UPDATE)
    assert [list(line["artifacts"]) for line in read(tmp_path / "run/metrics.jsonl")] == [["fine"], ["fine"]]
    reasons = ["RuntimeError: no font", "these are from -1 to -1: scale them", "do not ascend", "nothing.bin"]
    for message, key, reason in zip(caplog.messages, ["broken", "dark", "edges", "gone"], reasons, strict=False):
        assert message.startswith(f"the artifact '{key}' failed and may have lost log entries; training continues: ")
        assert reason in message
    assert len(caplog.messages) == 8  # each once, and their number at the end


def test_artifacts_and_metrics_of_an_event_keep_their_order_and_a_later_one_replaces():
    first, other, last = LogText("1", key="a"), LogTable("b", ["x"], []), LogHistogram("a", [1.0])
    assert merge_effects([first, LogText("line"), other, last]) == (LogText("line"), other, last)
    assert merge_effects([LogText("line"), LogText("line")]) == (LogText("line"), LogText("line"))


def test_a_resume_rewinds_artifacts_and_finds_their_files(tmp_path):
    def run(directory, updates, text):
        for update in updates:
            effects = [LogText(f"{text} {update}", key="text"), LogScalars(freeze({"x": 1.0}))]
            directory.interpreter([*effects, SaveCheckpoint()] if update == 2 else effects, state_after(update), UPDATE)

    with open_small_run(tmp_path / "run") as directory:
        run(directory, range(1, 5), "first")
    with open_small_run(tmp_path / "run") as directory:
        assert directory.resume().iteration.update == 2
        run(directory, range(3, 4), "first")
    lines = read(tmp_path / "run/metrics.jsonl")
    assert [(line["update"], *line.get("artifacts", {})) for line in lines] == [
        (1, "text"), (1,), (2, "text"), (2,), (3, "text"), (3,),
    ]  # fmt: skip
    assert len(list((tmp_path / "run/artifacts").rglob("*.txt"))) == 4  # that of update 4 stays


def test_a_branch_has_the_artifacts_that_its_lines_name(tmp_path):
    with open_small_run(tmp_path / "run") as directory:
        (tmp_path / "run/config.yaml").write_text("{}\n")
        for update in (1, 2):
            effects = [LogText(str(update), key="text"), SaveCheckpoint(pointers=("latest",))]
            directory.interpreter(effects, state_after(update), UPDATE)
        manifest = directory.checkpoints.find("E0_U1_S4")
        state = directory.checkpoints.load(manifest)
    branch_run(tmp_path / "run", tmp_path / "branch", manifest, state)
    (line,) = read(tmp_path / "branch/metrics.jsonl")
    assert (tmp_path / "branch" / line["artifacts"]["text"]["file"]).read_text() == "1"
    assert len(list((tmp_path / "branch/artifacts").rglob("*.txt"))) == 1


def named_files(folder):
    """Return the entries of the whole lines of a run; assert that each file is there, whole and right."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line)["artifacts"] for line in lines if line.endswith(b"\n") and b"artifacts" in line]
    for entry in (entry for each in entries for entry in each.values()):
        content = (folder / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["file"].rpartition("/")[2].partition(".")[0]
    return entries


def log_two(folder, disk, arm=lambda: None):
    with open_small_run(folder, disk) as directory:
        arm()
        for update in (1, 2):
            directory.interpreter([LogText(f"text {update}", key="a")], at(update), UPDATE)


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_leaves_a_line_that_names_a_missing_file(tmp_path, kind):
    faults = Faults()
    log_two(tmp_path / "whole", Disk(faults), faults.arm)
    names = list(faults.names)
    assert "rename" in names
    for number, name in enumerate(names):
        if not can_meet(name, kind):
            continue
        folder, faults = tmp_path / str(number), Faults()
        with suppress(Killed, OSError):  # the second on a disk that stays broken: the run cannot be closed
            log_two(folder, Disk(faults), lambda faults=faults, number=number: faults.arm(number, kind))
        faults.armed = False
        named_files(folder)


def test_no_loss_of_power_leaves_a_line_that_names_a_missing_file(tmp_path):
    named, random = 0, Random(0)  # noqa: S311  # no secret

    def check():
        nonlocal named
        for _ in range(3):
            left = power.survivors(random)
            lines = (left.get(Path("run/metrics.jsonl")) or b"").splitlines(keepends=True)
            for line in lines:
                if line.startswith(b"{") and line.endswith(b"\n") and b"\0" not in line:  # it was not cut off
                    (entry,) = json.loads(line)["artifacts"].values()
                    digest = hashlib.sha256(left[Path("run") / entry["file"]]).hexdigest()
                    assert digest == Path(entry["file"]).stem
                    named += 1

    power = PowerLoss(tmp_path, check)
    log_two(tmp_path / "run", Disk(power))
    assert named > 0


def test_an_evaluation_writes_beside_its_metrics(tmp_path):
    for _ in range(2):
        logs = EvaluationLogs(tmp_path, "E1")
        logs.interpreter([LogText("report", key="text"), LogScalars({"val/x": 0.5})], TrainState(), AtEval())
        logs.write()
        logs.close()
    for name in ("E1", "E1.2"):
        entry = json.loads((tmp_path / f"eval/{name}/artifacts.json").read_text())["text"]
        assert (tmp_path / f"eval/{name}" / entry["file"]).read_text() == "report"
        assert json.loads((tmp_path / f"eval/{name}.json").read_text()) == {"val/x": 0.5}
    assert not (tmp_path / "artifacts").exists()
