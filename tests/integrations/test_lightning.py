"""noether's callbacks in Lightning's trainer, beside noether's own trainer on the same batches."""

import json
from contextlib import suppress

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from reference import (
    LR,
    STILL,
    Recorder,
    batches,
    callbacks,
    model,
    open_silent,
    optimizer,
    points,
    reference_run,
    run,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader

from noether import AfterUpdate, Run, compose, on, open_run
from noether.core.callbacks import (
    CheckpointCallback,
    FixedUpdateEarlyStopping,
    GradNormCallback,
    HistogramCallback,
    OnlineLossCallback,
)
from noether.integrations.lightning import NoetherCallback
from noether.testing import assert_same

EPOCHS = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),  # as few as there are cores
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),  # some tests validate
]


class Module(LightningModule):
    def __init__(self, schedule=None):
        super().__init__()
        self.network = model()
        self._schedule = schedule

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        adam = optimizer(self.network)
        if self._schedule is None:
            return adam
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self._schedule)
        return [adam], [{"scheduler": schedule, "interval": "step"}]


class CutError(Exception):
    """Stands for the end of the process."""


class CutAt(Callback):
    def __init__(self, batch):
        self._batch = batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self._batch:
            raise CutError


def fit(module, data, *callbacks, root, val=None, ckpt_path=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    checkpointing = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    settings = {"enable_checkpointing": checkpointing, "max_epochs": EPOCHS, "default_root_dir": root, **settings}
    trainer = Trainer(callbacks=list(callbacks), **quiet, **settings)
    trainer.fit(module, data, val, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def make_callback(module, recorder, reducer=None, directory=None, **fields):
    return NoetherCallback(
        reducer or callbacks(),
        losses=lambda outputs: {"ce": outputs["loss"]},
        run=run(module, **fields),
        directory=directory,
        interpreter=recorder,
        clock=STILL,
    )


def loader(samples, **settings):
    return DataLoader(samples, batch_size=8, **settings)


@pytest.mark.parametrize(("count", "steps"), [(36, 1), (32, 2)])
def test_events_and_weights_equal_those_of_the_trainer(count, steps, tmp_path):
    samples = points(count)
    expected, state = reference_run(batches(samples, 8), steps=steps, epoch=EPOCHS)
    module, recorder = Module(), Recorder()
    noether = make_callback(module, recorder)
    fit(module, loader(samples), noether, root=tmp_path, val=loader(samples), accumulate_grad_batches=steps)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(module.network), weights(state))
    assert state.hyperparams["lr_scale"] < 1


def test_a_short_last_update_has_the_counts_of_the_trainer_and_the_size_of_lightning(tmp_path):
    quiet = compose(OnlineLossCallback(every_n_epochs=1))
    samples = points(36)
    expected, _ = reference_run(batches(samples, 8), steps=2, reducer=quiet, epoch=EPOCHS)
    modules, recorder = (Module(), Module()), Recorder()
    noether = make_callback(modules[0], recorder, reducer=quiet)
    fit(modules[0], loader(samples), noether, root=tmp_path, accumulate_grad_batches=2)
    fit(modules[1], loader(samples), root=tmp_path, accumulate_grad_batches=2)
    assert [line[:2] for line in recorder.lines] == [line[:2] for line in expected.lines]
    assert_same(weights(modules[0]), weights(modules[1]))


def test_losses_are_those_before_lightning_divides_them(tmp_path):
    heard = []
    hear = on(AfterUpdate)(lambda state, event: (heard.append(event), (state, ()))[1])

    class Two(Module):
        def training_step(self, batch, batch_idx):
            return {"loss": 0.0 * self(batch[0]).sum() + len(batch[0]), "size": len(batch[0])}

    fit(Two(), loader(points(20)), NoetherCallback(hear, interpreter=Recorder()), root=tmp_path, max_epochs=1,
        accumulate_grad_batches=4)  # fmt: skip
    (event,) = heard
    assert (event.samples, event.accumulated) == (20, (8, 8, 4))
    assert float(event.losses["total"]) == pytest.approx((8 * 8 + 8 * 8 + 4 * 4) / 20)
    assert [outputs["size"] for outputs in event.outputs] == [8, 8, 4]


def test_clipped_gradients_are_measured_before(tmp_path):
    samples = points(36)
    measured = []
    reducer = compose(GradNormCallback(every_n_updates=1), HistogramCallback(every_n_updates=1, of=("gradients",)))
    for clip in (None, 1e-3):
        module, recorder = Module(), Recorder()
        callback = make_callback(module, recorder, reducer=reducer)
        fit(module, loader(samples), callback, root=tmp_path, gradient_clip_val=clip, max_steps=1)
        measured.append(recorder.lines[1][2])
    assert_same(*measured)


@pytest.mark.parametrize("stop", [{"stop_at_epoch": 2}, {"stop_at_update": 7}, {"stop_at_update": 10}])
def test_a_stop_ends_lightning_where_it_ends_the_trainer(stop, tmp_path):
    samples = points(36)
    stopping = callbacks(FixedUpdateEarlyStopping(**stop))
    expected, state = reference_run(batches(samples, 8), reducer=stopping, epoch=EPOCHS)
    module, recorder = Module(), Recorder()
    fit(module, loader(samples), make_callback(module, recorder, reducer=stopping), root=tmp_path, val=loader(samples))
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(module.network), weights(state))


def test_lightning_continues_after_a_stop_until_its_minimum(tmp_path):
    module, recorder = Module(), Recorder()
    noether = make_callback(module, recorder, reducer=FixedUpdateEarlyStopping(stop_at_epoch=1))
    fit(module, loader(points(32)), noether, root=tmp_path, min_epochs=3)
    names = [(name, at) for name, at, _ in recorder.lines if name != "AfterUpdate"]
    assert names[1:] == [
        ("AfterEpoch", "E1_U4_S32"), ("AfterEpoch", "E2_U8_S64"), ("AfterEpoch", "E3_U12_S96"),
        ("AfterTraining", "E3_U12_S96"),
    ]  # fmt: skip


def test_mixed_precision_of_lightning(tmp_path):
    trained = []
    for watched in (True, False):
        module, recorder = Module(), Recorder()
        noether = make_callback(module, recorder, reducer=compose(OnlineLossCallback(every_n_epochs=1)))
        fit(module, loader(points(32)), *([noether] if watched else []), root=tmp_path, precision="bf16-mixed",
            gradient_clip_val=0.1)  # fmt: skip
        trained.append(weights(module))
    assert_same(*trained)


@pytest.mark.parametrize("updates", [7, 10])
def test_an_end_in_steps_is_one_in_updates(updates, tmp_path):
    samples = points(36)
    expected, state = reference_run(batches(samples, 8), update=updates)
    module, recorder = Module(), Recorder()
    fit(module, loader(samples), make_callback(module, recorder), root=tmp_path, max_steps=updates)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(module.network), weights(state))


def test_fewer_batches_are_shorter_epochs(tmp_path):
    samples = points(36)
    expected, state = reference_run(batches(samples, 8)[:3], epoch=EPOCHS)
    module, recorder = Module(), Recorder()
    fit(module, loader(samples), make_callback(module, recorder), root=tmp_path, limit_train_batches=3)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(module.network), weights(state))


def test_a_scale_survives_lightnings_schedulers(tmp_path):
    samples = points(36)
    expected, state = reference_run(batches(samples, 8), lr=lambda update: LR * (1 / (1 + update)), epoch=EPOCHS)
    module, recorder = Module(lambda update: 1 / (1 + update)), Recorder()
    fit(module, loader(samples), make_callback(module, recorder), root=tmp_path)
    assert state.hyperparams["lr_scale"] < 1
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(module.network), weights(state))


class Stateful:
    """A loader whose `state_dict` has its position, so that a resume continues there."""

    def __init__(self, batches):
        self._batches, self._read = batches, 0

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        for index in range(self._read % len(self), len(self)):
            self._read = index + 1
            yield self._batches[index]

    def state_dict(self):
        return {"read": self._read}

    def load_state_dict(self, state):
        self._read = state["read"]


AT_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
AT_VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize(("saving", "cut", "validates"), [
    ({"every_n_train_steps": 7}, 8, False), ({"every_n_train_steps": 7}, 8, True),
    ({"every_n_train_steps": 4}, 5, False),
    (AT_END, 11, False), (AT_END, 12, True), (AT_VALIDATION, 11, True),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # who resumes saves no more here
@pytest.mark.parametrize("steps", [1, 2])
def test_lightnings_own_checkpoints_resume_the_callbacks(saving, cut, validates, steps, tmp_path):
    samples = points(32)
    micro = batches(samples, 8)
    expected, state = reference_run(micro, steps=steps, epoch=EPOCHS)
    fields = {"samples_per_epoch": 32, "effective_batch_size": 8 * steps}
    if steps == 2 and "every_n_train_steps" in saving:
        saving, cut = {"every_n_train_steps": saving["every_n_train_steps"] // 2}, 8
    settings = {"root": tmp_path, "val": loader(samples) if validates else None, "accumulate_grad_batches": steps}
    module = Module()
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **saving)
    with pytest.raises(CutError):
        fit(module, Stateful(micro), make_callback(module, Recorder(), **fields), saver, CutAt(cut), **settings)
    path = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    module, recorder = Module(), Recorder()
    fit(module, Stateful(micro), make_callback(module, recorder, **fields), ckpt_path=path, **settings)
    assert recorder.lines[0][1] != "E0_U0_S0"
    assert_same(recorder.history, expected.after(recorder.lines[0][1]))
    assert_same(weights(module.network), weights(state))


@pytest.mark.parametrize(("steps", "schedule"), [(1, None), (2, None), (1, lambda update: 1 / (1 + update))])
def test_noethers_checkpoints_resume_lightning_and_callbacks(steps, schedule, tmp_path):
    samples = points(32)
    rate = schedule or (lambda update: 1.0)
    expected, state = reference_run(batches(samples, 8), steps=steps, epoch=EPOCHS, lr=lambda update: LR * rate(update))
    settings = {"root": tmp_path, "val": loader(samples), "accumulate_grad_batches": steps}
    for cut in (8, None, None):
        module = Module(schedule)
        with open_silent(tmp_path / "run") as directory:
            recorder = Recorder(directory.interpreter)
            noether = make_callback(module, recorder, directory=directory)
            if cut:
                with pytest.raises(CutError):
                    fit(module, loader(samples), noether, CutAt(cut), **settings)
            else:
                trainer = fit(module, loader(samples), noether, **settings)
                assert (trainer.current_epoch, trainer.global_step) == (EPOCHS, state.iteration.update)
                assert_same(recorder.history, expected.after(recorder.lines[0][1]))
                assert_same(weights(module.network), weights(state))
    assert [name for name, *_ in recorder.lines] == ["BeforeTraining"]  # it had ended


class OnPlateau(Module):
    def configure_optimizers(self):
        adam = optimizer(self.network)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(adam)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


@pytest.mark.parametrize(("kind", "cut", "message"), [
    (Module, 7, "E1_U7_S56, inside of an epoch that Lightning would read from its first batch"),
    (OnPlateau, 8, r"E2_U8_S64, but a noether checkpoint contains .*, not \['ReduceLROnPlateau'\]"),
])  # fmt: skip
def test_what_a_noether_checkpoint_cannot_resume_is_refused(kind, cut, message, tmp_path):
    for error, recorder in ((CutError, None), (ValueError, message)):
        module = kind()
        with open_silent(tmp_path / "run") as directory:
            noether = make_callback(module, directory.interpreter, directory=directory)
            with pytest.raises(error, match=recorder):
                fit(module, loader(points(32)), noether, CutAt(cut), root=tmp_path, val=loader(points(32)))


def test_a_refusal_drops_no_line_of_the_log(tmp_path):
    with open_silent(tmp_path / "run") as directory:
        module = Module()
        noether = make_callback(module, directory.interpreter, directory=directory)
        fit(module, loader(points(32)), noether, root=tmp_path, max_epochs=2)
        early = noether.state_dict()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    early["state"]["iteration"] = early["state"]["epoch_start"] = "E1_U4_S32"
    with open_silent(tmp_path / "run") as directory:
        module = Module()
        noether = make_callback(module, directory.interpreter, directory=directory)
        noether.load_state_dict(early)
        with pytest.raises(ValueError, match=r"starts at step 0, but the callbacks are at E1_U4_S32"):
            fit(module, loader(points(32)), noether, root=tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_callbacks_and_trainer_have_to_be_of_one_run(tmp_path):
    module, recorder = Module(), Recorder()
    noether = make_callback(module, recorder, reducer=OnlineLossCallback(every_n_epochs=1))
    fit(module, loader(points(32)), noether, root=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"starts at step 0, but the callbacks are at E1_U4_S32"):
        fit(module, loader(points(32)), noether, root=tmp_path)


def test_a_second_fit_continues_the_run(tmp_path):
    module, recorder = Module(), Recorder()
    noether = make_callback(module, recorder, reducer=OnlineLossCallback(every_n_epochs=1))
    trainer = fit(module, loader(points(32)), noether, root=tmp_path, max_epochs=1)
    trainer.fit(module, loader(points(32)))  # nothing is left to do
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(points(32)))
    names = [(name, at) for name, at, _ in recorder.lines if name != "AfterUpdate"]
    assert names == [
        ("BeforeTraining", "E0_U0_S0"), ("AfterEpoch", "E1_U4_S32"), ("AfterTraining", "E1_U4_S32"),
        ("BeforeTraining", "E1_U4_S32"), ("AfterEpoch", "E2_U8_S64"), ("AfterTraining", "E2_U8_S64"),
    ]  # fmt: skip


class Manual(Module):
    def __init__(self, steps=1):
        super().__init__()
        self.automatic_optimization = False
        self._steps = steps

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        adam = self.optimizers()
        adam.zero_grad()
        self.manual_backward(loss)
        for _ in range(self._steps):
            adam.step()
        return loss


def test_manual_optimization_makes_an_update_per_step(tmp_path):
    samples = points(36)
    expected, state = reference_run(batches(samples, 8), epoch=EPOCHS)
    module, recorder = Manual(), Recorder()
    fields = {"updates_per_epoch": 5, "samples_per_epoch": 36, "effective_batch_size": 8}
    fit(module, loader(samples), make_callback(module, recorder, **fields), root=tmp_path)
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(module.network), weights(state))
    module = Manual(steps=2)
    with pytest.raises(ValueError, match="made 2 steps in one training_step"):
        fit(module, loader(samples), make_callback(module, Recorder(), **fields), root=tmp_path)


def test_a_manual_step_has_to_return_its_loss(tmp_path):
    class Silent(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    with pytest.raises(TypeError, match="the step returned nothing, and callbacks need its loss"):
        fit(Silent(), loader(points(8)), NoetherCallback(compose(), interpreter=Recorder()), root=tmp_path)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_that_is_left_out_is_a_skipped_update(tmp_path):
    heard = []
    hear = on(AfterUpdate)(lambda state, event: (heard.append((event.skipped, event.samples)), (state, ()))[1])

    class Picky(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx != 1 else None

    fit(Picky(), loader(points(20)), NoetherCallback(hear, interpreter=Recorder()), root=tmp_path, max_epochs=1)
    assert heard == [(False, 8), (True, 8), (False, 4)]


def test_callbacks_do_not_disturb_what_lightning_draws(tmp_path):
    def trained(*, watched):
        torch.manual_seed(5)
        module = Module()
        module.network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
        data = {"val": DataLoader(points(20, seed=2), batch_size=4, shuffle=True)}
        quiet = compose(
            *(each for each in callbacks(tolerance=99).members if not type(each).__name__.startswith("Reduce"))
        )
        noether = NoetherCallback(quiet, run=run(module).replace(data=data), interpreter=Recorder(), clock=STILL)
        fit(module, loader(points(36), shuffle=True), *([noether] if watched else []), root=tmp_path)
        return weights(module)

    assert_same(trained(watched=True), trained(watched=False))


def test_an_exception_releases_the_optimizer(tmp_path):
    module = Module()
    noether = make_callback(module, Recorder())
    with pytest.raises(CutError):
        fit(module, loader(points(36)), noether, CutAt(3), root=tmp_path)
    steps = noether.session.steps
    noether.session._optimizer._optimizer.step()  # noqa: SLF001  # without a trainer
    assert noether.session.steps == steps


def test_a_session_without_an_interpreter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pass directory=noether\.open_run"):
        fit(Module(), loader(points(8)), NoetherCallback(compose(), run=Run()), root=tmp_path)


class Reloaded(Module):
    """Another number of batches in each epoch."""

    def train_dataloader(self):
        return DataLoader(points(32), batch_size=(4, 5, 3)[self.current_epoch])


def fit_reloaded(path, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Reloaded()
    save = CheckpointCallback(every_n_epochs=1, save_weights=True, save_optim=True)
    with open_silent(path) as directory:
        noether = NoetherCallback(save, directory=directory, clock=STILL)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = Trainer(
            callbacks=[noether], enable_model_summary=False, reload_dataloaders_every_n_epochs=1, **quiet, **settings
        )
        trainer.fit(module)
    return module, trainer, noether.session


def test_epochs_of_reloaded_loaders_may_differ_and_resume_exactly(tmp_path, caplog):
    whole, trainer, session = fit_reloaded(tmp_path / "whole", max_epochs=3)
    assert trainer.global_step == 8 + 7 + 11
    assert str(session.state.iteration) == "E3_U26_S96"
    lines = [record.getMessage() for record in caplog.records if "the session ignores" in record.getMessage()]
    assert ["epoch 1 had 7 updates, not updates_per_epoch=8" in line for line in lines] == [True]
    for epochs in (1, 2, 3):
        resumed, trainer, session = fit_reloaded(tmp_path / "cut", max_epochs=epochs)
        assert session.state.iteration.epoch == epochs
    assert trainer.global_step == 26
    assert_same(weights(resumed), weights(whole))


def test_the_accumulation_may_change_between_epochs():
    module = Module()
    noether = NoetherCallback([], interpreter=lambda *_: None)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    changes = GradientAccumulationScheduler({0: 1, 1: 4})
    trainer = Trainer(max_epochs=3, callbacks=[changes, noether], enable_model_summary=False, **off)
    trainer.fit(module, DataLoader(points(32), batch_size=4))
    assert trainer.global_step == noether.session.state.iteration.update == 8 + 2 + 2
    assert noether.session.state.iteration.epoch == 3


@pytest.mark.parametrize(
    ("error", "status", "ending"),
    [
        (ValueError("mine"), "failed", "failed at E0_U1_S4: ValueError: mine"),
        (None, "finished", None),
        ("stop", "stopped", "ended at E0_U2_S8: Lightning stopped it, because trainer.should_stop is set"),
    ],
    ids=["error", "end", "stop"],
)
def test_a_run_says_how_fit_ended_and_shows_its_panels_once(tmp_path, capsys, error, status, ending):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1 and isinstance(error, ValueError):
                raise error
            self.trainer.should_stop = batch_idx == 1 and error == "stop"
            return super().training_step(batch, batch_idx)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with suppress(ValueError), open_run(tmp_path / "run") as directory:
        saving = CheckpointCallback(every_n_epochs=1) if error == "stop" else OnlineLossCallback(every_n_epochs=1)
        callback = NoetherCallback(saving, directory=directory)
        trainer = Trainer(max_epochs=1, callbacks=[callback], enable_checkpointing=False, **quiet)
        trainer.fit(Failing(), DataLoader(points(12), batch_size=4))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["ending"]) == (status, ending)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("model ")] == ["Failing,"]
    assert [line.partition("  ")[2].strip() for line in lines if line.startswith("ending ")] == [
        ending or "ended at E1_U3_S12"
    ]
    (times,) = summary["phases"].values()
    assert times["updates"] == {"finished": 3, "failed": 1, "stopped": 2}[status]


def test_a_run_that_early_stopping_of_lightning_ends_says_why(tmp_path):
    class Logging(Module):
        def training_step(self, batch, batch_idx):
            self.log("same", 1.0)
            return super().training_step(batch, batch_idx)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    stopping = EarlyStopping("same", patience=1, check_on_train_epoch_end=True)
    with open_run(tmp_path / "run") as directory:
        callback = NoetherCallback(CheckpointCallback(every_n_epochs=1), directory=directory)
        trainer = Trainer(max_epochs=9, callbacks=[callback, stopping], enable_checkpointing=False, **quiet)
        trainer.fit(Logging(), DataLoader(points(8), batch_size=4))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["ending"].startswith("ended at E2_U4_S16: EarlyStopping of Lightning: Monitored metric same ")
