"""The same callbacks in `fit` of Keras 3 on torch: the same effects and weights, and every resume is exact."""

import json
import os
from contextlib import suppress

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import pytest
import torch
from reference import (
    STILL,
    VAL,
    EventCollector,
    Recorder,
    batches,
    callbacks,
    open_silent,
    points,
    reference_run,
    weights,
)

from noether import AfterAccumulationStep, AfterUpdate, Run, TrainingIteration, compose, on, open_run
from noether.core.callbacks import (
    CheckpointCallback,
    FixedUpdateEarlyStopping,
    GradNormCallback,
    HistogramCallback,
    LrCallback,
    OfflineLossCallback,
    OnlineLossCallback,
)
from noether.core.callbacks.base import CallbackBase
from noether.effects.console.live.other_bars import has_other_bar
from noether.integrations.keras.callback import NoetherCallback
from noether.integrations.keras.module import KerasModule
from noether.integrations.keras.optimizer import KerasOptimizer
from noether.testing import assert_same

# Variables of Keras have an `__array__` without `copy`; saving a model calls it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

SIZE = 2
EPOCHS = 3
LR = float(torch.tensor(0.05))  # as Keras holds it, in 32 bits
POINTS = points(10)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(optimizer=None, **settings):
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4),
        keras.layers.BatchNormalization(),
        keras.layers.Activation("tanh"),
        keras.layers.Dense(2, kernel_regularizer=settings.pop("regularizer", None)),
    ]
    model = keras.Sequential(layers, name="classifier")
    model.compile(optimizer=optimizer or keras.optimizers.Adam(LR), loss=LOSS, **settings)
    return model


def sgd(steps=1):
    # Without momentum: that of Keras accumulates gradients times the learning rate, that of torch only gradients.
    return keras.optimizers.SGD(LR, gradient_accumulation_steps=None if steps == 1 else steps)


def criterion(outputs, batch):
    return {"total": LOSS(batch[1], outputs)}


class Cut(keras.callbacks.Callback):
    """Ends `fit` after some updates, as if the process had been stopped."""

    def __init__(self, after, callback):
        super().__init__()
        self.after, self.callback = after, callback

    def on_train_batch_end(self, batch, logs=None):
        if self.callback.session.state.iteration.update == self.after:
            self.model.stop_training = True


def stack(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def fit_keras(
    model, *, samples=POINTS, reducer=None, directory=None, cut=None, callback=None, epochs=EPOCHS, **settings
):
    """Call `fit`; return the recorder and the callback."""
    recorder = Recorder(directory.interpreter) if directory else Recorder()
    callback = callback or NoetherCallback(
        reducer or callbacks(),
        run=Run(data={"val": VAL}, samples_per_epoch=len(samples), effective_batch_size=SIZE),
        interpreter=recorder,
        directory=directory,
        clock=STILL,
        **settings,
    )
    more = [] if cut is None else [Cut(cut, callback)]
    x, y = stack(samples)
    model.fit(x, y, batch_size=SIZE, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback, *more])
    return recorder, callback


@pytest.fixture(scope="module")
def uncut():
    model = classifier()
    recorder, callback = fit_keras(model)
    return recorder, callback, weights(KerasModule(model))


def train_own(samples=POINTS, **settings):
    module = KerasModule(classifier(sgd()))
    return reference_run(
        batches(samples, SIZE),
        network=module,
        criterion=criterion,
        kind=torch.optim.SGD,
        lr=lambda update: LR,
        decay=None,
        epoch=EPOCHS,
        **settings,
    )


def test_events_and_weights_equal_those_of_the_trainer():
    model = classifier(sgd())
    recorder, callback = fit_keras(model)
    expected, state = train_own()
    assert state.hyperparams["lr_scale"] < 1
    # Before training the size of a checkpoint is logged, and Keras' optimizer has variables that torch's has not.
    assert recorder.lines[0][:2] == expected.lines[0][:2]
    assert_same(recorder.history, expected.history)
    assert_same(weights(KerasModule(model)), weights(state))
    assert_same(callback.session.state.callback_states, state.callback_states)


def test_a_callback_that_reads_gradients_is_refused():
    histograms = HistogramCallback(every_n_updates=1, of=("gradients",))
    for name, reader in {"grad_norm": GradNormCallback(every_n_updates=1), "gradients": histograms}.items():
        with pytest.raises(ValueError, match=f"reads {name}, which this loop does not measure: drop the callback"):
            fit_keras(classifier(), reducer=reader)


def test_accumulation_equals_that_of_the_trainer():
    model = classifier(sgd(steps=2))
    recorder, callback = fit_keras(model, samples=points(8), reducer=reducer_of_updates())
    expected, state = train_own(points(8), steps=2, reducer=reducer_of_updates())
    assert str(callback.session.state.iteration) == "E3_U6_S24"
    assert_same(recorder.lines, expected.lines)
    assert_same(weights(KerasModule(model)), weights(state))


def reducer_of_updates():
    return compose(OnlineLossCallback(every_n_updates=1), LrCallback(every_n_updates=1))


def test_gradients_are_carried_over_the_end_of_an_epoch_as_keras_does(caplog):
    _, callback = fit_keras(classifier(sgd(steps=2)), reducer=reducer_of_updates())
    assert callback.session.state.iteration.epoch == 3
    assert callback.session.state.iteration.update == 3 * 5 // 2
    assert callback.session.pending_micro_batches == 1
    assert "epoch 0 ended inside of an update" in caplog.text


class Shrinking(keras.utils.PyDataset):
    """Batches whose number changes after each epoch."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths, self.epoch = lengths, 0

    def __len__(self):
        return self.lengths[min(self.epoch, len(self.lengths) - 1)]

    def __getitem__(self, index):
        x, y = stack(POINTS[:SIZE])
        return x, y

    def on_epoch_end(self):
        self.epoch += 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # of Keras, for an epoch that is shorter
def test_a_dataset_whose_length_changes_trains_as_without_callbacks(caplog):
    updates = []
    noether = NoetherCallback(reducer_of_updates(), interpreter=lambda *_: None)
    for beside in ([], [noether]):
        model = classifier(sgd())
        model.fit(Shrinking([4, 4, 3, 6, 2]), epochs=3, verbose=0, callbacks=beside)
        updates.append(int(model.optimizer.iterations))
    assert updates[0] == updates[1] == noether.session.state.iteration.update
    assert noether.session.state.iteration.epoch == 3
    assert sum("the session ignores" in record.getMessage() for record in caplog.records) <= 1


def test_an_optimizer_within_an_update_is_refused():
    model = classifier(sgd(steps=2))
    model.fit(*stack(POINTS), batch_size=SIZE, verbose=0)
    with pytest.raises(ValueError, match="gradients of 1 of 2 batches"):
        fit_keras(model, samples=POINTS[:8])


@pytest.mark.parametrize("epochs", [1, 2])
def test_resumes_at_the_end_of_an_epoch(epochs, uncut, tmp_path):
    with open_silent(tmp_path) as directory:
        fit_keras(classifier(), directory=directory, cut=5 * epochs)
    model = classifier()
    with open_silent(tmp_path) as directory:
        recorder, callback = fit_keras(model, directory=directory)
    assert recorder.lines[0][:2] == ("BeforeTraining", f"E{epochs}_U{5 * epochs}_S{10 * epochs}")
    assert_resumed(recorder, callback, model, uncut)


def assert_resumed(recorder, callback, model, uncut):
    expected, whole, trained = uncut
    assert_same(recorder.history, expected.after(recorder.lines[0][1]))
    assert_same(weights(KerasModule(model)), trained)
    assert_same(callback.session.state.callback_states, whole.session.state.callback_states)


def model_with_dropout():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(2)])
    model.compile(optimizer=keras.optimizers.SGD(LR, momentum=0.9), loss=LOSS)
    return model


def test_dropout_of_keras_resumes(tmp_path):
    whole, model = model_with_dropout(), model_with_dropout()
    expected, _ = fit_keras(whole)
    with open_silent(tmp_path) as directory:
        fit_keras(model_with_dropout(), directory=directory, cut=5)
    with open_silent(tmp_path) as directory:
        recorder, _ = fit_keras(model, directory=directory)
    assert_same(recorder.history, expected.after(recorder.lines[0][1]))
    assert_same(weights(KerasModule(model)), weights(KerasModule(whole)))


def test_resumes_in_the_middle_of_an_epoch_with_the_batches_that_are_left(uncut, tmp_path):
    with open_silent(tmp_path) as directory:
        fit_keras(classifier(), directory=directory, cut=7)
    model = classifier()
    with open_silent(tmp_path) as directory:
        recorder = Recorder(directory.interpreter)
        shape = {"end": TrainingIteration(epoch=EPOCHS), "updates_per_epoch": 5}
        run = Run(data={"val": VAL}, samples_per_epoch=10, effective_batch_size=SIZE, **shape)
        callback = NoetherCallback(callbacks(), run=run, interpreter=recorder, directory=directory, clock=STILL)
        fit_keras(model, samples=POINTS[4:], callback=callback, epochs=2)
        fit_keras(model, callback=callback)
    recorder.lines = [line for index, line in enumerate(recorder.lines) if index == 0 or line[0] != "BeforeTraining"]
    assert recorder.lines[0][:2] == ("BeforeTraining", "E1_U7_S14")
    assert_resumed(recorder, callback, model, uncut)


def test_other_batches_than_those_that_are_left_are_refused(tmp_path):
    with open_silent(tmp_path) as directory:
        fit_keras(classifier(), directory=directory, cut=7)
    with (
        open_silent(tmp_path) as directory,
        pytest.raises(ValueError, match="3 of 5 updates are left of the epoch"),
    ):
        fit_keras(classifier(), directory=directory)


def test_resumes_from_a_model_that_keras_saved(uncut, tmp_path):
    model = classifier()
    before, callback = fit_keras(model, cut=5)
    model.save(tmp_path / "model.keras")
    remembered = callback.session.state_dict()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    recorder, callback = fit_keras(loaded, remembered=remembered)
    assert_same([*before.history, *recorder.history], uncut[0].history)
    assert_resumed(recorder, callback, loaded, uncut)


def test_early_stopping_stops_fit_and_it_stays_stopped(tmp_path):
    reducer = callbacks(FixedUpdateEarlyStopping(stop_at_update=7))
    expected, state = train_own(reducer=reducer)
    with open_silent(tmp_path) as directory:
        recorder, _ = fit_keras(classifier(sgd()), reducer=reducer, directory=directory)
    assert_same(recorder.history, expected.history)
    model = classifier(sgd())
    with open_silent(tmp_path) as directory:
        again, _ = fit_keras(model, reducer=reducer, directory=directory)
    assert [line[0] for line in again.lines] == ["BeforeTraining"]  # its end was dispatched and saved
    assert_same(weights(KerasModule(model)), weights(state))
    assert model.fit(*stack(POINTS), epochs=2, verbose=0).epoch == [0, 1]  # without the callback, it can be trained


class Halve(CallbackBase):
    """Halves the learning rate at one update."""

    at: int

    def after_update(self, state, event):
        if state.iteration.update == self.at:
            return state.replace(hyperparams=state.hyperparams | {"lr_scale": 0.5}), ()
        return state, ()


@pytest.mark.parametrize("scheduled", [True, False])
def test_lr_scale_multiplies_the_rate_of_keras(scheduled):
    schedule = keras.optimizers.schedules.ExponentialDecay(LR, decay_steps=1, decay_rate=0.5)
    rate = schedule if scheduled else LR
    collector = EventCollector()
    model = classifier(keras.optimizers.SGD(rate))
    fit_keras(model, reducer=compose(Halve(at=2), collector), epochs=1)
    found = [event.lr["default"] for event in collector.of(AfterUpdate)]
    assert found == pytest.approx([LR * (0.5**u if scheduled else 1) * (1 if u < 2 else 0.5) for u in range(5)])
    rate_after = float(model.optimizer.learning_rate)
    assert rate_after == pytest.approx(LR * 0.5**5 if scheduled else LR)


def test_losses_are_those_of_the_batch_with_all_terms_that_keras_adds():
    collector = EventCollector()
    model = classifier(keras.optimizers.SGD(0.0), regularizer="l2")
    history = fit_keras(model, reducer=compose(collector), epochs=1)[1].model.history
    losses = [float(event.losses["total"]) for event in collector.of(AfterUpdate)]
    assert len(set(losses)) == 5
    assert sum(losses) / 5 == pytest.approx(float(history.history["loss"][0]), rel=1e-4)  # Keras logs their mean
    assert [event.samples for event in collector.of(AfterAccumulationStep)] == [2] * 5
    assert all(
        event.outputs.shape == (2, 2) and not event.outputs.requires_grad
        for event in collector.of(AfterAccumulationStep)
    )


def test_evaluation_takes_the_weights_of_the_state_and_leaves_the_model_as_it_is():
    model = classifier(regularizer="l2")
    module = KerasModule(model)
    before = weights(module)
    state = KerasModule(classifier(regularizer="l2"))
    zeros = {name: torch.zeros_like(value) for name, value in state.named_parameters()}
    session = fit_keras(model, epochs=1)[1].session
    trained = weights(module)
    losses, outputs = module.evaluate(session.state.replace(params=zeros), VAL[0])
    assert outputs.abs().max() == 0
    assert float(losses["total"]) == pytest.approx(0.6931472)
    assert_same(weights(module), trained)
    assert before.keys() == trained.keys()


def attention_model():
    inputs = keras.Input((3, 4))
    inner = keras.Sequential([keras.layers.Dense(4), keras.layers.Dropout(0.5), keras.layers.Dense(4)])
    attended = keras.layers.MultiHeadAttention(2, 2)(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(attended)))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def test_names_do_not_depend_on_what_was_built_before_or_loaded(tmp_path):
    first, second = attention_model(), attention_model()
    second.save(tmp_path / "model.keras")
    models = [first, second, keras.models.load_model(tmp_path / "model.keras")]
    names = [list(weights(KerasModule(model))) for model in models]
    assert names[0] == names[1] == names[2]
    assert len(set(names[0])) == len(first.variables) == 15
    assert {"multi_head_attention.query.kernel", "sequential.dense_1.bias", "dense.kernel"} < set(names[0])
    optimizers = [KerasOptimizer(KerasModule(model)) for model in models]
    slots = [{param: list(slot_names) for param, slot_names in each.opt_state["state"].items()} for each in optimizers]
    assert slots[0] == slots[1] == slots[2]
    assert all(slot_names == ["momentum", "velocity"] for slot_names in slots[0].values())


def test_the_memory_of_an_optimizer_is_that_of_its_params():
    _, callback = fit_keras(classifier(), epochs=1)
    memory = callback.session.state.opt_state
    assert memory["state"].keys() == callback.session.state.params.keys()
    assert set(memory["state"]["dense.kernel"]) == {"momentum", "velocity"}
    assert set(memory["groups"]) == {"iteration", "learning_rate"}


def test_another_optimizer_is_refused(tmp_path):
    with open_silent(tmp_path) as directory:
        fit_keras(classifier(), directory=directory, cut=5)
    with (
        open_silent(tmp_path) as directory,
        pytest.raises(KeyError, match="the optimizer that the state was saved with"),
    ):
        fit_keras(classifier(sgd()), directory=directory)


def test_validation_and_metrics_of_keras_change_nothing(uncut):
    model = classifier(metrics=["accuracy"])
    recorder = Recorder()
    run = Run(data={"val": VAL}, samples_per_epoch=10, effective_batch_size=SIZE)
    callback = NoetherCallback(callbacks(), run=run, interpreter=recorder, clock=STILL)
    x, y = stack(POINTS)
    settings = {"batch_size": SIZE, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, **settings, validation_data=(x[:3], y[:3]), callbacks=[callback])
    assert "val_accuracy" in history.history
    assert_same(recorder.lines, uncut[0].lines)
    assert_same(weights(KerasModule(model)), uncut[2])


class OwnLoss(keras.Sequential):
    """Computes a loss, with the signature of Keras before `training` was passed."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 2 * super().compute_loss(x, y, y_pred, sample_weight)


def test_a_loss_that_the_model_computes_is_reported_and_evaluated():
    collector = EventCollector()
    model = OwnLoss([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=LOSS)
    evaluate = OfflineLossCallback(every_n_updates=5, dataset_key="val")
    recorder, _ = fit_keras(model, reducer=compose(evaluate, collector), epochs=1)
    x, y = stack(POINTS)
    with torch.no_grad():
        first = 2 * float(LOSS(y[:SIZE], model(x[:SIZE])))
    assert float(collector.of(AfterUpdate)[0].losses["total"]) == pytest.approx(first)
    assert (
        len(collector.of(AfterAccumulationStep)) == len(collector.of(AfterUpdate)) == 5
    )  # evaluations are no micro-batches
    x, y = (torch.cat(parts) for parts in zip(*VAL, strict=True))
    logged = next(e.values for _, _, effects in recorder.lines for e in effects)
    with torch.no_grad():
        assert float(logged["loss/val/total"]) == pytest.approx(2 * float(LOSS(y, model(x))))


def test_a_compiled_step_is_refused():
    with pytest.raises(ValueError, match="jit_compile=False"):
        fit_keras(classifier(jit_compile=True))


class Silent(keras.Sequential):
    def train_step(self, data):
        return {"loss": torch.tensor(0.0)}


def test_a_model_that_hides_its_loss_is_refused():
    model = Silent([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(optimizer="sgd", loss=LOSS)
    with pytest.raises(TypeError, match=r"does not call self.compute_loss"):
        fit_keras(model)


def test_a_callback_of_another_model_is_refused():
    _, callback = fit_keras(classifier())
    with pytest.raises(ValueError, match="another model or optimizer"):
        fit_keras(classifier(), callback=callback)


def test_a_callback_receives_no_events_after_an_exception():
    model = classifier()
    collector = EventCollector()

    def fail(state, event):
        if isinstance(event, AfterUpdate):
            raise RuntimeError("the disk is full")  # noqa: TRY004  # it is no type that is wrong
        return state, ()

    with pytest.raises(RuntimeError, match="the disk is full"):
        fit_keras(model, reducer=compose(collector, fail))
    seen = len(collector.events)
    recorder, _ = fit_keras(model, epochs=1)
    assert len(collector.events) == seen
    assert recorder.lines[-1][0] == "AfterTraining"
    assert "compute_loss" not in vars(model)


class Gan(keras.Model):
    """Steps the discriminator at each batch, and the generator at every second one."""

    def __init__(self):
        super().__init__(name="gan")
        keras.utils.set_random_seed(0)
        self.g, self.d = keras.layers.Dense(3), keras.layers.Dense(1)
        self.g_optimizer, self.d_optimizer = keras.optimizers.Adam(0.05), keras.optimizers.SGD(0.1, momentum=0.9)
        self.turns = 0
        self.compile()
        self(torch.zeros(1, 3))

    def call(self, x):
        return self.d(self.g(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):  # noqa: FBT002  # Keras'
        return keras.ops.mean(keras.ops.tanh(y_pred))

    def train_step(self, data):
        x, _ = data
        self.turns += 1
        for name, sign in [("d", 1)] + [("g", -1)] * (self.turns % 2):
            self.zero_grad()
            outputs = self(x)
            loss = sign * (self.compute_loss(x, None, outputs) if name == "d" else keras.ops.mean(outputs))
            loss.backward()
            variables = getattr(self, name).trainable_variables
            with torch.no_grad():
                gradients = [variable.value.grad for variable in variables]
                getattr(self, f"{name}_optimizer").apply(gradients, variables)
        return {"loss": loss.detach()}


def test_a_model_that_steps_two_optimizers_resumes_exactly(tmp_path):
    # keras-team/keras#10806
    rates = []
    note = on(AfterUpdate)(lambda state, event: (rates.append(dict(event.lr)), (state, ()))[1])

    def train(path, epochs):
        model = Gan()
        with open_run(path) as directory:
            callback = NoetherCallback([note, CheckpointCallback(every_n_epochs=1)], directory=directory)
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
            model.fit(x, torch.zeros(8), batch_size=4, epochs=epochs, verbose=0, shuffle=False, callbacks=[callback])
        return weights(KerasModule(model)), callback.session.state.opt_state

    uncut = train(tmp_path / "uncut", 4)
    train(tmp_path / "cut", 2)
    assert_same(train(tmp_path / "cut", 4), uncut)
    assert uncut[1].keys() == {"g_optimizer", "d_optimizer", "optimizer"}
    assert len(uncut[1]["d_optimizer"]["state"]) == len(uncut[1]["g_optimizer"]["state"]) == 2
    assert rates[0].keys() == {"g_optimizer", "d_optimizer"}


def test_a_second_fit_says_that_the_run_has_ended_and_trains_with_more_epochs(caplog):
    model, line = classifier(sgd()), "the run has ended at E1_U5_S10, so no batch is left: to continue it, call fit"
    _, callback = fit_keras(model, reducer=compose(), epochs=1)
    assert line not in caplog.text
    before = weights(KerasModule(model))
    fit_keras(model, callback=callback, epochs=1)
    assert_same(weights(KerasModule(model)), before)
    assert line in caplog.text
    fit_keras(model, callback=callback, epochs=2)
    assert callback.session.state.iteration.epoch == 2


def test_epochs_may_differ_in_length_between_two_calls_of_fit(caplog):
    model = classifier(sgd())
    _, callback = fit_keras(model, samples=points(10), reducer=compose(), epochs=1)
    fit_keras(model, samples=points(6), callback=callback, epochs=3)
    assert str(callback.session.state.iteration) == "E3_U11_S22"  # epochs of 5, 3 and 3 updates of two samples
    assert "the session ignores updates_per_epoch" in caplog.text


class Changing(keras.utils.PyDataset):
    """Another number of batches in each epoch."""

    def __init__(self):
        super().__init__()
        self.epoch = 0

    def __len__(self):
        return (3, 2, 1)[min(self.epoch, 2)]

    def __getitem__(self, index):
        return tuple(part[2 * index : 2 * index + 2] for part in stack(POINTS))

    def on_epoch_end(self):
        self.epoch += 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_data_set_may_change_its_length_between_epochs(caplog):
    callback = NoetherCallback(compose(), interpreter=Recorder(), clock=STILL)
    classifier(sgd()).fit(Changing(), epochs=3, verbose=0, callbacks=[callback])
    assert callback.session.state.iteration.epoch == 3
    assert "the session ignores updates_per_epoch" in caplog.text


def test_an_error_in_fit_is_recorded_below_the_bar_of_keras(tmp_path, capsys):
    class Failing(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise ValueError("mine")

    x, y = stack(POINTS)
    with suppress(ValueError), open_run(tmp_path / "run") as directory:
        callback = NoetherCallback(OnlineLossCallback(every_n_updates=1), directory=directory)
        classifier().fit(x, y, batch_size=SIZE, epochs=1, verbose=1, callbacks=[callback, Failing()])
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["ending"]) == ("failed", "failed at E0_U3_S6: ValueError: mine")
    assert [line.split()[1] for line in lines if line.startswith("model ")] == ["Sequential,"]
    assert [line.split()[:2] for line in lines if "ending" in line] == [["ending", "failed"]]
    assert not has_other_bar()


def test_a_run_that_early_stopping_of_keras_ends_is_stopped_by_keras(tmp_path):
    x, y = stack(POINTS)
    stopping = keras.callbacks.EarlyStopping("loss", mode="max", patience=0, min_delta=1e9)
    with open_run(tmp_path / "run") as directory:
        callback = NoetherCallback(CheckpointCallback(every_n_epochs=1), directory=directory)
        classifier().fit(x, y, batch_size=SIZE, epochs=9, verbose=0, callbacks=[callback, stopping])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    reason = "a callback of Keras set model.stop_training"
    assert (summary["status"], summary["ending"]) == (
        "stopped",
        f"ended at {callback.session.state.iteration}: {reason}",
    )
