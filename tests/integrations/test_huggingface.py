"""The same callbacks in the Trainer of transformers: the same effects and weights, and every resume is exact."""

import json

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from law_examples import slow_except
from reference import (
    LR,
    STILL,
    EventCollector,
    Model,
    Recorder,
    batches,
    callbacks,
    open_silent,
    points,
    reference_run,
    run,
    weights,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from noether import AfterAccumulationStep, AfterUpdate, LogScalars, compose, open_run
from noether.core.callbacks import (
    CheckpointCallback,
    FixedUpdateEarlyStopping,
    GradNormCallback,
    HistogramCallback,
    LrCallback,
    OnlineLossCallback,
)
from noether.integrations.huggingface import NoetherCallback, NoetherTrainer, to_checkpoint
from noether.testing import assert_same

SIZE = 2
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
END = "E3_U9_S30"
POINTS = points(10)
MICRO = batches(POINTS, SIZE)


def criterion(outputs, batch):
    return {"total": nn.functional.cross_entropy(outputs, batch[1])}


class Classifier(Model):
    """The reference's model, as transformers expects one: it takes labels, and returns its loss."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier()


def collate(samples):
    return {"x": torch.stack([x for x, _ in samples]), "labels": torch.stack([y for _, y in samples])}


def arguments(path, **settings):
    given = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(path), **{**given, **settings})


class Cut(TrainerCallback):
    """Ends the loop after some updates, as if the process had been stopped; with a checkpoint of transformers."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            control.should_training_stop = control.should_save = True


def train_hf(path, *more, reducer=None, resume=None, directory=None, kind=NoetherTrainer, samples=POINTS, **settings):
    """Train with transformers; return the recorder, the callback and the trainer."""
    network = classifier()
    recorder = Recorder(directory.interpreter) if directory else Recorder()
    callback = NoetherCallback(
        reducer or callbacks(), run=run(network, criterion), interpreter=recorder, directory=directory, clock=STILL
    )
    trainer = kind(
        network,
        arguments(path, **settings),
        train_dataset=samples,
        eval_dataset=POINTS[:3],
        data_collator=collate,
        optimizers=(torch.optim.Adam(network.parameters(), lr=LR), None),
        callbacks=[callback, *more],
    )
    trainer.train(resume_from_checkpoint=resume(trainer) if callable(resume) else resume)
    return recorder, callback, trainer


def linear(update):
    """The schedule that transformers has by default, over nine updates."""
    return LR * max(0.0, (9 - update) / 9)


def train_own(**settings):
    return reference_run(MICRO, steps=2, lr=linear, network=classifier(), criterion=criterion, epoch=3, **settings)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    return train_hf(tmp_path_factory.mktemp("uncut"))


def test_events_and_weights_equal_those_of_the_trainer(uncut):
    recorder, callback, trainer = uncut
    expected, state = train_own()
    assert recorder.lines[-1][1] == END
    assert state.hyperparams["lr_scale"] < 1  # a callback lowered it, and no scheduler wrote over it
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(trainer.model), weights(state))
    memories = dict(callback.session.state.callback_states)
    del memories["lr_scheduler"]  # the trainer's, for checkpoints of noether
    assert_same(memories, dict(state.callback_states))


@pytest.mark.parametrize("after", slow_except((3,), [1, 3, 5]))
def test_resumes_from_a_checkpoint_of_transformers(after, uncut, tmp_path):
    before, *_ = train_hf(tmp_path, Cut(after))
    assert_same(before.lines, uncut[0].lines[: len(before.lines)])
    assert before.lines[-1][0] != "AfterTraining"
    recorder, callback, trainer = train_hf(tmp_path, resume=True)
    begun = recorder.lines[0][1]
    assert begun.split("_")[1] == f"U{after}"
    assert_same(recorder.history, uncut[0].after(begun))
    assert_same(weights(trainer.model), weights(uncut[2].model))
    assert_same(callback.session.state.callback_states, uncut[1].session.state.callback_states)
    assert_same(callback.session.state.metrics, uncut[1].session.state.metrics)


@pytest.mark.parametrize("after", slow_except((3,), [3, 5]))
def test_resumes_from_a_checkpoint_of_noether(after, uncut, tmp_path):
    with open_silent(tmp_path / "run") as directory:
        train_hf(tmp_path, Cut(after), directory=directory)
    with open_silent(tmp_path / "run") as directory:
        recorder, callback, trainer = train_hf(
            tmp_path / "again", directory=directory, resume=lambda trainer: to_checkpoint(directory.load(), trainer)
        )
    begun = recorder.lines[0][1]
    assert begun.split("_")[1] == f"U{after}"
    assert_same(recorder.history, uncut[0].after(begun))
    assert_same(weights(trainer.model), weights(uncut[2].model))
    assert_same(callback.session.state.callback_states, uncut[1].session.state.callback_states)


def test_early_stopping_stops_the_trainer_and_it_stays_stopped(tmp_path):
    reducer = callbacks(FixedUpdateEarlyStopping(stop_at_update=4))
    expected, state = train_own(reducer=reducer)
    recorder, _, trainer = train_hf(tmp_path, reducer=reducer, save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 4
    assert_same(recorder.lines, expected.lines)
    again, _, trainer = train_hf(tmp_path, reducer=reducer, resume=True)
    assert [line[0] for line in again.lines] == ["BeforeTraining", "AfterTraining"]
    assert_same(weights(trainer.model), weights(state))


def test_a_run_that_a_callback_of_transformers_ends_is_stopped_by_it(tmp_path):
    with open_run(tmp_path / "run") as directory:
        train_hf(tmp_path / "hf", Cut(2), directory=directory, reducer=CheckpointCallback(every_n_updates=1))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["ending"].startswith("ended at E0_U2_S")
    assert summary["ending"].endswith(": a callback of transformers set control.should_training_stop")


def test_a_trainer_that_does_not_report_its_losses_is_refused(tmp_path):
    with pytest.raises(TypeError, match="use NoetherTrainer"):
        train_hf(tmp_path, kind=Trainer)


def test_a_run_at_another_update_is_refused(tmp_path):
    with open_silent(tmp_path / "run") as directory:
        train_hf(tmp_path, Cut(2), directory=directory)
    with (
        open_silent(tmp_path / "run") as directory,
        pytest.raises(ValueError, match=r"is at E0_U2_S8, and .* update 0"),
    ):
        train_hf(tmp_path, directory=directory)


def test_a_checkpoint_without_memory_is_refused(tmp_path):
    train_hf(tmp_path, Cut(2))
    (tmp_path / "checkpoint-2" / "noether.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="written without NoetherCallback"):
        train_hf(tmp_path, resume=True)


def test_every_micro_batch_has_an_event_with_its_losses_and_outputs(tmp_path):
    expected, collector = EventCollector(), EventCollector()
    train_own(reducer=compose(expected))
    train_hf(tmp_path, reducer=compose(collector))
    for kind, names in (
        (AfterAccumulationStep, ("losses", "outputs", "samples", "accumulation_step", "accumulation_steps")),
        (AfterUpdate, ("losses", "outputs", "samples", "accumulated", "lr", "weight_decay", "finite", "skipped")),
    ):
        found, wanted = collector.of(kind), expected.of(kind)
        assert len(found) == len(wanted) > 0
        for one, other in zip(found, wanted, strict=True):
            seen = {name: getattr(one, name) for name in names}
            if "outputs" in seen:  # beside the loss, transformers has one thing: the predictions
                assert_same(seen, {name: getattr(other, name) for name in names})


def test_an_evaluation_by_the_trainer_changes_nothing(uncut, tmp_path):
    recorder, _, trainer = train_hf(tmp_path, eval_strategy="steps", eval_steps=2)
    assert any("eval_loss" in line for line in trainer.state.log_history)
    assert_same(recorder.lines, uncut[0].lines)
    assert_same(weights(trainer.model), weights(uncut[2].model))


def test_gradients_are_measured_before_they_are_clipped(tmp_path):
    collector = EventCollector()
    readers = GradNormCallback(every_n_updates=1), HistogramCallback(every_n_updates=1, of=("gradients",))
    train_hf(tmp_path / "clipped", reducer=compose(*readers, collector), max_grad_norm=1e-3)
    norms = [float(event.grad_norm) for event in collector.of(AfterUpdate)]
    assert min(norms) > 1e-3
    gradients = [list(event.gradients.values()) for event in collector.of(AfterUpdate)]
    assert [float(torch.nn.utils.get_total_norm(each)) for each in gradients] == pytest.approx(norms)


def test_a_run_of_some_updates_ends_inside_of_an_epoch(tmp_path):
    expected, _ = train_own_updates(5)
    recorder, *_ = train_hf(tmp_path, num_train_epochs=7, max_steps=5, lr_scheduler_type="constant")
    assert_same(recorder.lines, expected.lines)
    assert [line[:2] for line in recorder.lines[-2:]] == [("AfterUpdate", "E1_U5_S18"), ("AfterTraining", "E1_U5_S18")]


def train_own_updates(count):
    return reference_run(MICRO, steps=2, network=classifier(), criterion=criterion, update=count)


def test_losses_of_unequal_micro_batches_are_those_that_transformers_differentiates(tmp_path):
    collector = EventCollector()
    *_, trainer = train_hf(
        tmp_path,
        reducer=compose(collector),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        logging_strategy="steps",
        logging_steps=1,
    )
    first = collector.of(AfterUpdate)[0]
    assert first.accumulated == (4, 4, 2)
    means = [event.losses["total"] for event in collector.of(AfterAccumulationStep)[:3]]
    assert float(first.losses["total"]) == pytest.approx(float(sum(means) / 3))
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [float(event.losses["total"]) for event in collector.of(AfterUpdate)] == pytest.approx(logged)


def language_model(dropout):
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **dict.fromkeys(DROPOUTS, dropout))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)  # its input and output embeddings are one parameter


def sentences():
    drawn = torch.randint(0, 11, (10, 6), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row.where(torch.arange(6) < 2 + i % 5, -100)} for i, row in enumerate(drawn)]


def train_language_model(path, *more, resume=None, directory=None, dropout=0.1, **settings):
    """Return the recorder and the trainer, which makes an optimizer with two parameter groups."""
    recorder = Recorder(directory.interpreter) if directory else Recorder()
    save = CheckpointCallback(every_n_updates=1, save_weights=True, save_optim=True)
    reducer = compose(OnlineLossCallback(every_n_updates=1), LrCallback(every_n_updates=1), save)
    callback = NoetherCallback(reducer, interpreter=recorder, directory=directory, clock=STILL)
    logged = {"logging_strategy": "steps", "logging_steps": 1, "train_sampling_strategy": "random"}
    trainer = NoetherTrainer(
        language_model(dropout),
        arguments(path, **logged, weight_decay=0.1, **settings),
        train_dataset=sentences(),
        callbacks=[callback, *more],
    )
    trainer.train(resume_from_checkpoint=resume(trainer) if callable(resume) else resume)
    return recorder, trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_weighted_by_tokens_or_smoothed_are_those_that_transformers_logs(smoothing, tmp_path):
    recorder, trainer = train_language_model(tmp_path, label_smoothing_factor=smoothing)
    logged = [e.values for _, _, effects in recorder.lines for e in effects if isinstance(e, LogScalars)]
    losses = [float(values["loss/online/total/U1"]) for values in logged if "loss/online/total/U1" in values]
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert losses == pytest.approx([line["loss"] for line in history])
    assert len(losses) == 9
    rates = [values for values in logged if "optim/lr/0" in values]
    assert [values["optim/lr/1"] for values in rates] == [line["learning_rate"] for line in history]
    assert {(values["optim/wd/0"], values["optim/wd/1"]) for values in rates} == {(0.1, 0.0)}


def test_dropout_and_shuffling_resume_from_a_checkpoint_of_transformers(tmp_path):
    expected, whole = train_language_model(tmp_path / "uncut")
    before, _ = train_language_model(tmp_path, Cut(4))
    after, resumed = train_language_model(tmp_path, resume=True)
    assert_same([*before.lines, *after.history], expected.lines)
    assert_same(weights(resumed.model), weights(whole.model))


def test_a_trainers_own_optimizer_and_tied_weights_resume_from_a_checkpoint_of_noether(tmp_path):
    expected, whole = train_language_model(tmp_path / "uncut", dropout=0.0)
    with open_silent(tmp_path / "run") as directory:
        train_language_model(tmp_path / "cut", Cut(4), dropout=0.0, directory=directory)
    with open_silent(tmp_path / "run") as directory:
        recorder, resumed = train_language_model(
            tmp_path / "again",
            dropout=0.0,
            directory=directory,
            resume=lambda trainer: to_checkpoint(directory.load(), trainer),
        )
    assert recorder.lines[0][1].split("_")[1] == "U4"
    assert_same(recorder.history, expected.after(recorder.lines[0][1]))
    assert_same(weights(resumed.model), weights(whole.model))


def train_on_two_processes(path):
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  # inherited, because this process is a fork
    GradientState._reset_state()  # noqa: SLF001  # likewise
    collector, online = EventCollector(), OnlineLossCallback(every_n_updates=1)
    *_, trainer = train_hf(
        path, reducer=compose(online, collector), samples=points(8), logging_strategy="steps", logging_steps=1
    )
    updates = collector.of(AfterUpdate)
    assert [event.samples for event in updates] == [8] * 3
    assert updates[0].run.rank == trainer.args.process_index
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]  # the mean over both
    if trainer.is_world_process_zero():
        assert [float(event.losses["total"]) for event in updates] == pytest.approx(logged)
    losses = torch.tensor([event.losses["total"] for event in updates])
    assert_same(*trainer.accelerator.gather(losses).chunk(2))


# Newer versions of Python warn of every fork of a process with threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_samples_are_summed_and_losses_averaged_over_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate warns where it has to choose
    debug_launcher(train_on_two_processes, (tmp_path,), num_processes=2)
