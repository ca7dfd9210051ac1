"""The plan of a configuration equals its run; a plan reads, writes and computes little."""

import contextlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from noether.cli.commands.train import start
from noether.config import ConfigError, load
from noether.core.callback import declaration_of
from noether.core.event import AtEval
from noether.core.metric_keys import keys_overlap
from noether.core.run import Run
from noether.core.schedules.forecast import nth_firing
from noether.effects.checkpoints.writer import Writer
from noether.planning.plan import make_plan

ROOT = Path(__file__).parents[2]

MODULE = '''\
"""A user's callbacks that request checkpoints, and a model that may need values of tensors."""

import torch
from torch import nn

from noether import SaveCheckpoint, callback, compose, every_n_epochs, log, on, BeforeTraining
from noether.core.callbacks import CheckpointCallback, FixedUpdateEarlyStopping
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.metrics import current
from noether.core.tensors.tree import FrozenDict


class Points(torch.utils.data.Dataset):
    def __init__(self, length: int):
        self._inputs = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))

    def __len__(self):
        return len(self._inputs)

    def __getitem__(self, index):
        return self._inputs[index], (self._inputs[index].sum() > 0).long()


class Stream(torch.utils.data.IterableDataset):
    def __len__(self):
        return 30

    def __iter__(self):
        raise AssertionError("a plan must not read a stream")

    def state_dict(self):
        return {"at": torch.zeros(2)}

    def load_state_dict(self, place):
        pass


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AssertionError("must be refused before it is read")


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(2)


class Net(nn.Module):
    def __init__(self, width: int, valued: bool = False):
        super().__init__()
        if valued:
            [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.body(x))


def loss(outputs, batch):
    return {"entropy": nn.functional.cross_entropy(outputs, batch[1])}


def right(outputs, batch):
    return (outputs.argmax(dim=1) == batch[1]).float()


def named(state, event):
    """Saves under a custom tag."""
    return state, (SaveCheckpoint(tag=f"mine.{state.iteration}", optimizer=False, models=("head",)),)


@on(BeforeTraining)
def begin(state, event):
    return state, (SaveCheckpoint(tag="begin", retention=FrozenDict(begin=None)),)


def every_second(state, event):
    """Saves at every second epoch, without a schedule."""
    return state, (SaveCheckpoint(retention=FrozenDict(second=None)),) if state.iteration.epoch % 2 == 0 else ()


def every_tenth(state, event):
    """Saves at every tenth epoch."""
    return state, (SaveCheckpoint(retention=FrozenDict(tenth=None)),) if state.iteration.epoch % 10 == 0 else ()


def tagged(state, event):
    """Saves under tags that differ only by a count."""
    return state, (SaveCheckpoint(tag=f"epoch-{state.iteration.epoch:03d}", retention=FrozenDict(tagged=2)),)


@callback("promising", consumes=("val/right",))
@every_n_epochs(1)
def promising(state, event):
    """Saves where a metric is large."""
    return state, (SaveCheckpoint(),) if current(state, "val/right") > 0.9 else ()


@callback("poor", consumes=("val/right",))
@every_n_epochs(7)
def poor(state, event):
    """Saves where a metric is small."""
    return state, (SaveCheckpoint(),) if current(state, "val/right") < -1 else ()


def folds(state, event):
    """Saves under the same tags again and again; their numbers are not counts."""
    names = [f"fold{n}" for n in (1, 2, 3)]
    return state, tuple(SaveCheckpoint(tag=name, retention=FrozenDict({name: 1})) for name in names)


@every_n_epochs(1)
def gives_up(state, event):
    """Stops after three epochs."""
    return (state.request_stop("enough") if state.iteration.epoch == 3 else state), ()


def reads(state, event):
    """Reads the value of a parameter."""
    if state.params["head.weight"].sum().item() > 0:
        return state, (SaveCheckpoint(),)
    return state, ()


def forgets(state, event):
    """Returns no effects."""
    return state


both = compose(FixedUpdateEarlyStopping(stop_at_epoch=2), CheckpointCallback(every_n_updates=3, keep=1))


class SavesOutputs(PeriodicCallback):
    def periodic_callback(self, state, event, interval):
        return state, (SaveCheckpoint(tag=f"{state.iteration}_{event.outputs[0].shape[-1]}"),)


class Confusion(PeriodicCallback):
    dataset_key: str

    def periodic_callback(self, state, event, interval):
        total = sum(float(event.forward(state, batch)[1].shape[0]) for batch in event.data[self.dataset_key])
        return log(state, event, {"confusion": total})
'''

SAVING = """\
run: {name: saving, output: out}
model: {kind: mine.Net, width: 4}
data:
  train: {kind: mine.Points, length: 30}
  val: {kind: mine.Points, length: 7}
optimizer: {kind: torch.optim.AdamW, lr: 0.05}
trainer:
  max_epochs: 7
  effective_batch_size: 4
  loss: mine.loss
  evaluate: {val: [loss, mine.right], every_n_epochs: 1}
  evaluate_first: true
callbacks:
  - {kind: mine.begin}
  - {kind: noether.core.callbacks.EMACallback, every_n_epochs: 2, target_factors: [0.9, 0.5], save_latest_weights: true}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 2, keep: 2}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_samples: 50, id: often, save_optim: true, keep: 3}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_updates: 9, id: head, save_latest_optim: false,
     model_names: [head]}
  - {kind: mine.named, every_n_updates: 10, at_end: true}
  - {kind: noether.core.callbacks.BestCheckpointCallback, every_n_epochs: 1, metric_key: val/right, mode: higher,
     tolerances: [1, 2]}
  - {kind: noether.core.callbacks.LrCallback, every_n_samples: 40}
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 3, at_end: true}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the module in it; the import is undone afterwards."""
    (tmp_path / "mine.py").write_text(MODULE)
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("mine", None)


def tensor_bytes(checkpoint):
    """Return the bytes of the tensors of a checkpoint, without numbers that are measured in training."""
    files = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    measured = [name for name in files.get("state.safetensors", {}) if not name.startswith("callback_states.weights/")]
    assert all(files["state.safetensors"].pop(name).ndim == 0 for name in measured)
    return sum(tensor.numel() * tensor.element_size() for each in files.values() for tensor in each.values())


class Disk:
    """The checkpoints on the disk, recorded after each commit and each removal."""

    def __init__(self, monkeypatch):
        self.written, self.kept, self.peak = [], {}, 0
        commit, prune = Writer.commit, Writer.prune

        def commit_and_record(writer, manifest):
            commit(writer, manifest)
            self.kept[manifest.tag] = tensor_bytes(writer._directory / manifest.tag)  # noqa: SLF001  # where it lies
            self.written.append(self.kept[manifest.tag])
            self.peak = max(self.peak, sum(self.kept.values()))

        def prune_and_record(writer, tags):
            tags = list(tags)
            prune(writer, tags)
            for tag in tags:
                del self.kept[tag]

        monkeypatch.setattr(Writer, "commit", commit_and_record)
        monkeypatch.setattr(Writer, "prune", prune_and_record)


def train(config, settings, monkeypatch):
    """Train a configuration; return the run directory and the record of its disk."""
    disk = Disk(monkeypatch)
    with contextlib.redirect_stdout(None):
        assert start(Path(config), settings, ()) == 0
    (directory,) = Path(load(config, settings).run.output).glob("*/*")
    assert {path.name for path in (directory / "checkpoints").glob("*/")} == set(disk.kept)
    return directory, disk


def logged_events(directory, patterns):
    """Return the events at which a metric that matches one of the patterns was logged."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        ("".join(map(str.capitalize, line["event"].split("_"))), line["epoch"], line["update"], line["sample"])
        for line in lines
        if any(keys_overlap(pattern, key) for pattern in patterns for key in line["metrics"])
    ]


def check_firings(plan, directory):
    """Check that the callbacks logged at exactly the planned events; return the number of checked callbacks."""
    checked = 0
    for each in plan.callbacks:
        patterns = declaration_of(each.callback).produces or ()
        patterns = [p for p in patterns if not p.startswith(("weights/", "checkpoints/", "lossdiff/"))]
        if not patterns:
            continue
        planned = [nth_firing(each.occasions, n, plan.run) for n in range(1, each.firings.count + 1)]
        real = logged_events(directory, patterns)
        assert [(p.event.__name__, p.iteration.epoch, p.iteration.update, p.iteration.sample) for p in planned] == real
        checked += 1
    return checked


def check_saves(plan, disk):
    """Check that the written and kept checkpoints are within the bounds of the forecast."""
    forecast = plan.checkpoints
    for bounds, real in ((forecast.written, len(disk.written)), (forecast.written_bytes, sum(disk.written)),
                         (forecast.kept, len(disk.kept)), (forecast.kept_bytes, sum(disk.kept.values()))):  # fmt: skip
        assert bounds.at_least <= real <= bounds.at_most
    assert disk.peak <= forecast.peak_bytes


def check_exactly(plan, disk):
    """Check that the written and kept checkpoints equal the forecast."""
    forecast = plan.checkpoints
    assert (forecast.written, forecast.written_bytes) == ((len(disk.written),) * 2, (sum(disk.written),) * 2)
    assert (forecast.kept, forecast.kept_bytes) == ((len(disk.kept),) * 2, (sum(disk.kept.values()),) * 2)
    assert disk.peak <= forecast.peak_bytes


def ending_of(directory):
    return json.loads((directory / "summary.json").read_text())["ending"]


# Short enough to train here; early stopping needs more epochs than there are, whatever the metrics are.
SHORT = {
    "digits": ["trainer.max_epochs=6", "model.width=4", "trainer.effective_batch_size=128", "callbacks.8.tolerance=6"],
    "heat": ["trainer.max_epochs=11", "model.width=2", "model.modes=2", "model.layers=1",
             *(f"data.{key}.{name}" for key in ("train", "val", "test") for name in ("size=8", "samples=16"))],
    "seed": ["trainer.max_epochs=3", "model.width=4"],
}  # fmt: skip


def test_every_example_configuration_is_tested():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_the_plan_equals_the_run(name, folder, monkeypatch):
    config = ROOT / f"configs/{name}.yaml"
    settings = [*SHORT[name], *(["data.train.cache=.", "data.val.cache=.", "data.test.cache=."] * (name == "heat"))]
    directory, disk = train(config, settings, monkeypatch)
    plan = make_plan(load(config, settings))
    assert ending_of(directory) == f"ended at {plan.run.final}"
    assert check_firings(plan, directory) >= 3
    check_saves(plan, disk)


def test_the_plan_is_valid_up_to_an_early_stop(folder, monkeypatch):
    config = ROOT / "configs/digits.yaml"
    settings = ["trainer.max_epochs=9", "model.width=4", "trainer.effective_batch_size=256", "callbacks.8.min_delta=1",
                "callbacks.8.tolerance=3", "callbacks.6.every_n_epochs=2"]  # fmt: skip
    directory, disk = train(config, settings, monkeypatch)
    assert ending_of(directory).startswith("ended at E4_U")
    assert any("may stop the run early" in note for note in make_plan(load(config, settings)).notes)
    plan = make_plan(load(config, [*settings, "trainer.max_epochs=4"]))
    assert check_firings(plan, directory) >= 3
    check_saves(plan, disk)


def test_the_plan_of_all_savers_together(folder, monkeypatch):
    Path("saving.yaml").write_text(SAVING)
    directory, disk = train("saving.yaml", [], monkeypatch)
    plan = make_plan(load("saving.yaml"))
    assert check_firings(plan, directory) == 3
    check_saves(plan, disk)
    assert sum(each.checkpoints is not None for each in plan.callbacks) == 7
    (first, *_) = (each for each in plan.callbacks if each.evaluations)
    assert first.occasions.once == (AtEval,)
    assert (first.evaluations.count, first.evaluations.samples) == (8, 8 * 7)


def test_without_metrics_the_plan_is_exact(folder, monkeypatch):
    lines = [line for line in SAVING.splitlines() if "BestCheckpoint" not in line and "tolerances" not in line]
    Path("saving.yaml").write_text("\n".join(lines))
    _, disk = train("saving.yaml", [], monkeypatch)
    check_exactly(make_plan(load("saving.yaml")), disk)


def write_and_plan(callbacks, *, more="", ends="max_epochs: 7"):
    """Write a configuration with these callbacks to only.yaml, and return its plan."""
    text = SAVING[: SAVING.index("callbacks:")].replace("max_epochs: 7", ends).replace("width: 4", f"width: 4{more}")
    Path("only.yaml").write_text("\n".join([text + "callbacks:", *(f"  - {{{each}}}" for each in callbacks), ""]))
    return make_plan(load("only.yaml"))


SAVER = "kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_optim: true"


def test_occasional_saves_are_bounded(folder):
    plan = write_and_plan(["kind: mine.every_second, every_n_epochs: 1", SAVER])
    assert plan.callbacks[0].checkpoints.written == (0, 7)
    assert plan.notes == ()


def test_saves_at_every_tenth_firing_are_bounded(folder):
    plan = write_and_plan(["kind: mine.every_tenth, every_n_epochs: 1", SAVER], ends="max_epochs: 99")
    assert plan.callbacks[0].checkpoints.written == (0, 99)


def test_saves_that_depend_on_a_metric_are_bounded(folder):
    plan = write_and_plan(["kind: mine.promising", "kind: mine.poor", SAVER])
    assert [each.checkpoints.written for each in plan.callbacks[1:3]] == [(0, 7), (0, 1)]


def test_tags_with_counts_are_forecast_exactly(folder, monkeypatch):
    plan = write_and_plan(["kind: mine.tagged, every_n_epochs: 1, at_end: true", SAVER])
    _, disk = train("only.yaml", [], monkeypatch)
    assert plan.callbacks[0].checkpoints.kept == (2, 2)
    check_exactly(plan, disk)


def test_tags_with_other_numbers_are_forecast_exactly(folder, monkeypatch):
    plan = write_and_plan(["kind: mine.folds, every_n_updates: 1", SAVER], ends="max_updates: 9")
    _, disk = train("only.yaml", [], monkeypatch)
    assert plan.callbacks[0].checkpoints.written == (27, 27)
    check_exactly(plan, disk)


def test_callbacks_that_were_not_tried_at_every_firing_are_named(folder):
    callbacks = ["kind: mine.tagged, every_n_epochs: 1", "kind: mine.named, every_n_epochs: 2", SAVER]
    assert write_and_plan(callbacks, ends="max_epochs: 13").notes == ()
    (note,) = write_and_plan(callbacks, ends="max_epochs: 14").notes
    assert note == (
        "tagged: only the first 12 firings and the last were tried; "
        "checkpoints that are requested only in between are not counted"
    )


def test_a_callback_that_reads_outputs_is_probed(folder, monkeypatch):
    plan = write_and_plan(["kind: mine.SavesOutputs, every_n_updates: 9", SAVER])
    _, disk = train("only.yaml", [], monkeypatch)
    assert plan.notes == ()
    assert plan.callbacks[0].checkpoints.written == (6, 6)
    check_exactly(plan, disk)


def test_callbacks_that_may_stop_the_run_are_named(folder):
    guard = "kind: noether.core.callbacks.NanGuardCallback, every_n_epochs: 1, tolerance: 2"
    notes = write_and_plan(["kind: mine.gives_up", guard, SAVER]).notes
    assert notes == tuple(
        f"{name} may stop the run early; the plan is valid up to that point"
        for name in ("gives_up", "NanGuardCallback/E1")
    )
    assert write_and_plan(["kind: mine.gives_up", SAVER], ends="max_epochs: 3").notes == ()  # the end of the run


def test_a_callback_that_reads_values_of_params_is_named(folder):
    plan = write_and_plan(["kind: mine.reads, every_n_epochs: 1", SAVER])
    (note,) = plan.notes
    assert note.startswith(
        "checkpoints of reads are not counted: it cannot be called before training: RuntimeError: Tensor.item()"
    )
    assert plan.checkpoints.written == (7, 7)


def test_a_callback_that_returns_no_pair_is_named(folder):
    (note,) = write_and_plan(["kind: mine.forgets, every_n_epochs: 1", SAVER]).notes
    assert note.startswith(
        "checkpoints of forgets are not counted: it cannot be called before training: TypeError: cannot unpack"
    )


def test_a_callback_that_iterates_data_is_probed_with_one_sample(folder):
    plan = write_and_plan(["kind: mine.Confusion, every_n_epochs: 2, dataset_key: val", SAVER])
    assert plan.notes == ()
    assert plan.callbacks[0].evaluations.samples == 3 * 7


def test_a_model_that_needs_values_is_built_on_the_cpu(folder):
    plan = write_and_plan([SAVER], more=", valued: true")
    (note,) = plan.notes
    assert note.startswith("mine.Net was built on the CPU: it needs values of tensors (RuntimeError")
    assert plan.checkpoints == write_and_plan([SAVER], more="").checkpoints


@pytest.mark.parametrize(
    "optimizer", ["Adafactor, lr: 0.1", "AdamW, lr: 0.1, fused: true", "SGD, lr: 0.1, momentum: 0.9"]
)
def test_the_optimizers_memory_is_counted(optimizer, folder, monkeypatch):
    text = SAVING.replace("AdamW, lr: 0.05", optimizer)
    Path("only.yaml").write_text(text[: text.index("callbacks:")] + f"callbacks: [{{{SAVER}}}]\n")
    _, disk = train("only.yaml", ["trainer.max_epochs=1"], monkeypatch)
    assert make_plan(load("only.yaml")).checkpoints.each_bytes == (disk.written[0],)


def test_the_plan_ends_at_a_fixed_stop(folder, monkeypatch):
    callbacks = [SAVER, "kind: noether.core.callbacks.FixedUpdateEarlyStopping, stop_at_sample: 50",
                 "kind: noether.core.callbacks.FixedUpdateEarlyStopping, stop_at_epoch: 3",
                 "kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 3"]  # fmt: skip
    plan = write_and_plan(callbacks)
    directory, disk = train("only.yaml", [], monkeypatch)
    assert ending_of(directory) == f"ended at {plan.run.final}: stop_at_sample: 50 is reached"
    check_firings(plan, directory)
    check_saves(plan, disk)
    assert [each.firings.count for each in plan.callbacks[1:3]] == [1, 0]
    (warning,) = plan.warnings
    assert str(warning).endswith(
        "the run does not reach epoch 3, so FixedUpdateEarlyStopping/stop_at_epoch=3 never fires: "
        "the run ends at E1_U13_S50; write at most 1"
    )


@pytest.mark.parametrize("section", ["schedule", "weight_decay_schedule"])
def test_a_schedule_that_the_run_does_not_complete_is_reported(folder, section):
    write_and_plan([SAVER])
    end = make_plan(load("only.yaml")).run.final.update
    for length, count in ((end, 0), (end + 1, 1)):
        schedule = f"optimizer.{section}={{kind: cosine, length: {length}}}"
        warnings = [str(each) for each in make_plan(load("only.yaml", [schedule])).warnings]
        ending = f"the run ends after {end} updates, before the schedule reaches its end"
        assert [each.endswith(f"optimizer.{section}.length: {ending}") for each in warnings] == [True] * count


def test_the_plan_ends_at_a_fixed_stop_inside_a_composed_callback(folder, monkeypatch):
    plan = write_and_plan(["kind: mine.both", SAVER])
    directory, disk = train("only.yaml", [], monkeypatch)
    assert ending_of(directory) == f"ended at {plan.run.final}: stop_at_epoch: 2 is reached"
    assert [each.path for each in plan.callbacks[:2]] == [("callbacks", 0)] * 2
    check_exactly(plan, disk)


def test_a_stream_is_not_read(folder):
    plan = write_and_plan([SAVER])
    text = Path("only.yaml").read_text().replace("kind: mine.Points, length: 30", "kind: mine.Stream")
    Path("only.yaml").write_text(text)
    streamed = make_plan(load("only.yaml"))
    assert streamed.run.final == plan.run.final
    assert streamed.checkpoints.each_bytes == (plan.checkpoints.each_bytes[0] + 8,)  # its position


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("val: {kind: mine.Endless}", "only.yaml:5: data.val: Endless has no __len__, the number of its samples"),
        ("model: {kind: mine.Lazy}", "only.yaml:2: model: Attempted to use an uninitialized parameter"),
    ],
)
def test_configurations_that_cannot_be_trained_are_refused(kind, message, folder):
    write_and_plan([SAVER])
    old = {"val": "val: {kind: mine.Points, length: 7}", "model": "model: {kind: mine.Net, width: 4}"}[
        kind.split(":")[0]
    ]
    Path("only.yaml").write_text(Path("only.yaml").read_text().replace(old, kind))
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_plan(load("only.yaml"))


def test_a_plan_writes_nothing(folder):
    Path("saving.yaml").write_text(SAVING)
    before = set(folder.rglob("*"))
    make_plan(load("saving.yaml"))
    assert {path for path in set(folder.rglob("*")) - before if "__pycache__" not in path.parts} == set()


@pytest.mark.parametrize("name", SHORT)
def test_a_billion_epochs_are_planned_like_ten(name, folder, monkeypatch):
    config = ROOT / f"configs/{name}.yaml"
    settings = (
        ["data.train.cache=.", "data.val.cache=.", "data.test.cache=.", "data.train.samples=32"]
        if name == "heat"
        else []
    )
    calls = itertools.count()
    monkeypatch.setattr(Run, "iteration_after", _counting(calls))

    def count_calls(epochs):
        before = next(calls)
        plan = make_plan(load(config, [*settings, f"trainer.max_epochs={epochs}"]))
        assert plan.run.final.epoch == epochs
        return next(calls) - before

    # Bisection takes one more step when the run is twice as long.
    assert count_calls(10**9) <= (10**9).bit_length() * count_calls(10)


def test_intervals_that_rarely_meet_are_planned_without_walking_the_run(folder, monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(Run, "iteration_after", _counting(calls))
    callbacks = [
        "kind: noether.core.callbacks.CheckpointCallback, every_n_updates: 997, id: updates",
        "kind: noether.core.callbacks.CheckpointCallback, every_n_samples: 9973, id: samples",
    ]

    def count_calls(epochs):
        before = next(calls)
        assert write_and_plan(callbacks, ends=f"max_epochs: {epochs}").checkpoints.written.at_least > epochs // 200
        return next(calls) - before

    # Bisection takes one more step when the run is twice as long; walking the run would take 10,000 times as many.
    assert count_calls(10**9) <= 3 * count_calls(10**5)


def test_keeping_a_million_is_planned_like_keeping_two(folder, monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(Run, "iteration_after", _counting(calls))

    def count_calls(keep):
        before = next(calls)
        forecast = write_and_plan([f"{SAVER}, keep: {keep}"], ends=f"max_epochs: {10**9}").checkpoints
        assert (forecast.written, forecast.kept) == ((10**9,) * 2, (keep,) * 2)
        assert forecast.kept_bytes == (keep * forecast.each_bytes[0],) * 2
        return next(calls) - before

    assert count_calls(10**6) <= 1.1 * count_calls(2)


def _counting(calls):
    function = Run.iteration_after

    def count_and_call(run, update):
        next(calls)
        return function(run, update)

    return count_and_call
