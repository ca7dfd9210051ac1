"""`NanGuardCallback`: counting, stopping, rollback, and callbacks that watch a metric after it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    EMACallback,
    EvaluateCallback,
    MetricEarlyStopping,
    NanGuardCallback,
    OnlineLossCallback,
    ReduceLROnPlateauCallback,
)
from noether.core.combinators import callback
from noether.core.declarations import DeclarationError
from noether.core.effect import LogScalars, LogText, SaveCheckpoint, SetSummary
from noether.core.errors import SettingsError
from noether.core.event import AfterEpoch, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.forward import forward
from noether.core.tensors.tree import storages, tensors
from noether.effects import CheckpointStore
from noether.effects.interpreter import Interpreter
from noether.session.timing import Clock
from noether.testing import same
from noether.training.data.indexed import EvaluationData, TrainingData, epoch_order
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer

NAN, INF = math.nan, math.inf
FINITE, NONFINITE = AfterUpdate(samples=4), AfterUpdate(samples=4, finite=False)
SKIPPED = AfterUpdate(samples=4, finite=torch.tensor(False), skipped=True)


def guard(**settings):
    return NanGuardCallback(**{"every_n_updates": 2, "tolerance": 2, **settings})


def rollback(**settings):
    return guard(**{"action": "rollback", **settings})


def weights(value, momentum=None):
    """Return params, a buffer, a count and optimizer memory, all with `value`."""
    memory = {"momentum_buffer": torch.tensor(value if momentum is None else momentum), "betas": (0.9, 0.99)}
    return {
        "params": {"w": torch.tensor([value, 0.0])},
        "buffers": {"mean": torch.tensor(value), "count": torch.tensor(3)},
        "opt_state": {"state": {"w": memory}, "groups": {"default": {}}},
    }


def weights_of(state):
    return {name: getattr(state, name) for name in ("params", "buffers", "opt_state")}


def snapshot_of(value):
    """Return the snapshot of `weights(value)`: everything but the optimizer's groups."""
    whole = weights(value)
    return {**whole, "opt_state": {"state": whole["opt_state"]["state"]}}


def start(member, value=0.0):
    return compose(member)(TrainState(**weights(value)), BeforeTraining())[0]


def go(member, state, *updates):
    """Return the state and the effects of each update, given by the value of its weights, or by that and its event."""
    requests = []
    for update in updates:
        value, event = update if isinstance(update, tuple) else (update, FINITE)
        state, effects = member(state.replace(**weights(value)).advance(samples=4), event)
        requests.append(tuple(effect for effect in effects if not isinstance(effect, SetSummary)))
    return state, requests


def nonfinite(in_row):
    return LogScalars({"nonfinite": in_row})


# --- counting


def test_stopping_computed_by_hand():
    updates = [(0.1, NONFINITE), 0.2, (0.3, SKIPPED), (0.4, NONFINITE)]
    state, requests = go(guard(), start(guard()), *updates)
    reason = "2 updates in a row were not finite"
    assert requests == [(nonfinite(1),), (), (nonfinite(1),), (nonfinite(2), LogText(f"stopping: {reason}"))]
    assert state.stop == reason
    assert same(weights_of(state), weights_of(TrainState(**weights(0.4))))  # stopping does not change them
    assert state.metrics["nonfinite"] == (2, TrainingIteration(update=4, sample=16))


@pytest.mark.parametrize("tolerance", [1, 2, 3, 5])
def test_only_updates_in_a_row_count(tolerance):
    member = guard(tolerance=tolerance)
    almost = [*[(0.0, NONFINITE)] * (tolerance - 1), 0.0] * 3
    state, _ = go(member, start(member), *almost)
    assert (state.stop, state.memory(member.name)["in_row"]) == (None, 0)
    state, requests = go(member, state, *[(0.0, NONFINITE)] * tolerance)
    many = f"{tolerance} updates in a row were not finite"
    assert state.stop == (many if tolerance > 1 else "1 update was not finite")
    assert [effects[0] for effects in requests] == [nonfinite(n) for n in range(1, tolerance + 1)]


@pytest.mark.parametrize(
    "event",
    [NONFINITE, SKIPPED, AfterUpdate(samples=4, skipped=True), AfterUpdate(samples=4, finite=torch.tensor(False))],
)
def test_which_updates_count(event):
    state, requests = go(guard(), start(guard()), (0.0, event))
    assert (requests, state.memory(guard().name)["in_row"]) == ([(nonfinite(1),)], 1)


@pytest.mark.parametrize("finite", [True, torch.tensor(True)])
def test_a_finite_update_after_finite_ones_returns_the_same_state(finite):
    state = start(guard()).advance(samples=4)
    assert guard()(state, AfterUpdate(samples=4, finite=finite)) == (state, ())


def test_the_summary_has_the_total():
    member, state = guard(tolerance=9), start(guard(tolerance=9))
    totals = []
    for event in (NONFINITE, FINITE, SKIPPED, SKIPPED):
        state, effects = member(state.advance(samples=4), event)
        totals += [effect.values for effect in effects if isinstance(effect, SetSummary)]
    assert totals == [{"nonfinite/updates": 1}, {"nonfinite/updates": 2}, {"nonfinite/updates": 3}]


def test_a_buffer_of_infinities_does_not_prevent_a_snapshot():
    member = rollback(tolerance=1, every_n_updates=1)
    mask = {"mask": torch.tensor([0.0, -INF]), "mean": torch.tensor(1.0)}
    state = compose(member)(TrainState(buffers=mask), BeforeTraining())[0]
    state, _ = member(state.replace(buffers={**mask, "mean": torch.tensor(2.0)}).advance(samples=4), FINITE)
    assert state.memory(member.name)["taken"] == "E0_U1_S4"
    spoilt, _ = member(state.replace(buffers={**mask, "mean": torch.tensor(INF)}).advance(samples=4), FINITE)
    assert spoilt.memory(member.name)["taken"] == "E0_U1_S4"


def test_a_rollback_does_not_change_learning_rates():
    member = rollback(tolerance=1, every_n_updates=1)
    groups = ({"default": {"lr": 0.1}}, {"default": {"lr": 0.05}})
    opt_state = {"state": {"w": {"m": torch.tensor(1.0)}}, "groups": groups[0]}
    state = compose(member)(TrainState(opt_state=opt_state), BeforeTraining())[0]
    later = {"state": {"w": {"m": torch.tensor(NAN)}}, "groups": groups[1]}
    state, _ = member(state.replace(opt_state=later).advance(samples=4), NONFINITE)
    assert same(state.opt_state, {"state": opt_state["state"], "groups": groups[1]})


def test_the_first_reason_to_stop_stays():
    state, _ = go(guard(), start(guard()).request_stop("mine"), (0.0, NONFINITE), (0.0, NONFINITE))
    assert state.stop == "mine"


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4))
def test_it_stops_after_tolerance_updates_in_a_row(finite, tolerance):
    member = guard(tolerance=tolerance)
    state, row, expected = start(member), 0, None
    for update, is_finite in enumerate(finite, start=1):
        row = 0 if is_finite else row + 1
        expected = update if row == tolerance and expected is None else expected
        state, _ = go(member, state, (0.0, FINITE if is_finite else NONFINITE))
        assert (state.stop is None) == (expected is None)


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"tolerance": 0}, ["tolerance: 0 is not a whole number of at least 1"]),
        ({"tolerance": True}, ["tolerance: True is not a whole number of at least 1"]),
        ({"max_rollbacks": 0}, ["max_rollbacks: 0 is not a whole number of at least 1"]),
        ({"max_rollbacks": 2.0}, ["max_rollbacks: 2.0 is not a whole number of at least 1"]),
        (
            {"action": "rolback"},
            ["action: 'rolback' is not one of 'stop', 'rollback'; did you mean 'rollback'?"],
        ),
        (
            {"every_n_updates": 0, "tolerance": -1, "action": "skip"},
            [
                "every_n_updates: 0 is not a whole number of at least 1",
                "tolerance: -1 is not a whole number of at least 1",
                "action: 'skip' is not one of 'stop', 'rollback'",
            ],
        ),
    ],
)
def test_invalid_settings_are_refused(given, problems):
    with pytest.raises(SettingsError) as refused:
        guard(**given)
    assert [str(problem) for problem in refused.value.problems] == problems


# --- rollback


def test_a_rollback_computed_by_hand():
    member = rollback()
    state, requests = go(member, start(member, 9.0), 1.0, 2.0, 3.0, (NAN, NONFINITE))
    assert requests[-1] == (nonfinite(1),)
    assert math.isnan(state.params["w"][0])  # not yet
    state = state.remember("other", 7).replace(hyperparams={"lr_scale": 0.5})
    state, requests = go(member, state, (NAN, NONFINITE))
    text = "2 updates in a row were not finite: back to the weights of E0_U2_S8"
    assert requests == [(nonfinite(2), LogText(text))]
    assert same(weights_of(state), weights_of(TrainState(**weights(2.0))))
    # Everything else continues.
    assert (str(state.iteration), str(state.previous), state.stop) == ("E0_U5_S20", "E0_U4_S16", None)
    assert (state.memory("other"), dict(state.hyperparams)) == (7, {"lr_scale": 0.5})
    assert state.metrics["nonfinite"] == (2, state.iteration)
    memory = state.memory(member.name)
    assert (memory["in_row"], memory["rollbacks"]) == (0, 1)


def test_before_the_first_firing_it_rolls_back_to_the_start():
    member = rollback(every_n_updates=100, tolerance=1)
    state, requests = go(member, start(member, 9.0), 1.0, 2.0, (INF, NONFINITE))
    assert requests[-1][1] == LogText("1 update was not finite: back to the weights of E0_U0_S0")
    assert same(weights_of(state), weights_of(TrainState(**weights(9.0))))


@pytest.mark.parametrize("broken", ["params", "buffers", "opt_state"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_snapshot_is_taken_only_if_all_of_it_is_finite(broken, value):
    member = rollback(tolerance=1)
    state, _ = go(member, start(member), 1.0, 2.0, 3.0)
    spoilt = state.replace(**{**weights(4.0), broken: weights(value)[broken]}).advance(samples=4)
    after, effects = member(spoilt, FINITE)  # the loss is still finite
    assert (after, effects) == (spoilt, ())
    assert same(after.memory(member.name)["snapshot"], snapshot_of(2.0))
    whole, _ = member(state.replace(**weights(4.0)).advance(samples=4), FINITE)
    assert same(whole.memory(member.name)["snapshot"], snapshot_of(4.0))
    assert whole.memory(member.name)["taken"] == "E0_U4_S16"


def test_complex_weights_are_checked_too():
    member = rollback(tolerance=1, every_n_updates=1)
    state = compose(member)(TrainState(params={"w": torch.tensor(1 + 1j)}), BeforeTraining())[0]
    broken = state.replace(params={"w": torch.tensor(complex(NAN, 0))}).advance(samples=4)
    state, _ = member(broken, FINITE)
    state, _ = member(state.advance(samples=4), NONFINITE)
    assert same(state.params["w"], torch.tensor(1 + 1j))


def test_a_rollback_at_a_firing_takes_no_snapshot_and_names_the_source():
    member = rollback(tolerance=1, every_n_updates=2)
    state, requests = go(member, start(member), 1.0, 2.0, 3.0, (NAN, NONFINITE), (NAN, NONFINITE))
    assert [effect.text for effects in requests for effect in effects if isinstance(effect, LogText)] == [
        "1 update was not finite: back to the weights of E0_U2_S8"
    ] * 2
    assert same(state.params["w"], torch.tensor([2.0, 0.0]))


def test_no_snapshot_is_taken_while_updates_are_not_finite():
    member = rollback(tolerance=3)
    state, _ = go(member, start(member), 1.0, 2.0, 3.0, (4.0, NONFINITE))
    assert state.memory(member.name)["taken"] == "E0_U2_S8"
    epochs = rollback(every_n_updates=None, every_n_epochs=1, tolerance=3)
    state, _ = go(epochs, start(epochs), 1.0, (2.0, NONFINITE))
    ended = state.next_epoch()
    assert epochs(ended, AfterEpoch()) == (ended, ())
    state, _ = go(epochs, state, 3.0)
    assert epochs(state.next_epoch(), AfterEpoch())[0].memory(epochs.name)["taken"] == "E1_U3_S12"


def test_action_stop_takes_no_snapshots():
    state, _ = go(guard(), start(guard()), 1.0, 2.0)
    assert state.memory(guard().name) == {
        "total": 0, "in_row": 0, "rollbacks": 0, "snapshot": None, "taken": "E0_U0_S0",
    }  # fmt: skip


def test_snapshot_and_weights_share_no_storage():
    member = rollback(tolerance=1)
    state, _ = go(member, start(member), 1.0, 2.0)
    snapshot = state.memory(member.name)["snapshot"]
    assert not storages(snapshot) & storages(weights_of(state))
    state, _ = go(member, state, (NAN, NONFINITE))
    assert same(snapshot, snapshot_of(2.0))
    assert not storages(state.memory(member.name)) & storages(weights_of(state))
    # Writing to the live model does not change the snapshot: the next rollback restores the same.
    state.params["w"].fill_(NAN)
    state, _ = go(member, state, (NAN, NONFINITE))
    assert same(weights_of(state), weights_of(TrainState(**weights(2.0))))
    assert [tensor._version for _, tensor in tensors(snapshot)] == [0] * 4  # noqa: SLF001  # torch's count of writes


def test_it_stops_after_max_rollbacks():
    member = rollback(tolerance=1, max_rollbacks=2)
    state, requests = go(member, start(member), 1.0, 2.0, *[(NAN, NONFINITE), 3.0] * 2)
    assert [len(effects) for effects in requests] == [0, 0, 2, 0, 2, 0]
    assert (state.stop, state.memory(member.name)["rollbacks"]) == (None, 2)
    state, requests = go(member, state, (NAN, NONFINITE))
    reason = "1 update was not finite, after 2 rollbacks"
    assert (state.stop, requests) == (reason, [(nonfinite(1), LogText(f"stopping: {reason}"))])
    assert math.isnan(state.params["w"][0])


class Loop:
    """A user's loop around a live model, which gets the state back after a rollback."""

    def __init__(self, member):
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.member = compose(member)
        self.state, _ = self.member(TrainState.from_module(self.model, self.optimizer), BeforeTraining())

    def update(self, factor=1.0):
        loss = factor * self.model(torch.ones(4, 2)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        event = AfterUpdate(samples=4, finite=loss.detach().isfinite())
        self.state, _ = self.member(self.state.advance(samples=4), event)
        self.state = self.state.into_module(self.model, self.optimizer)


def test_a_live_model_rolls_back_too():
    torch.manual_seed(0)
    loop = Loop(rollback(tolerance=1))
    for _ in range(3):
        loop.update()
    momentum = loop.optimizer.state[loop.model.weight]["momentum_buffer"]
    taken = loop.state.memory(loop.member.members[0].name)["snapshot"]
    loop.update(factor=NAN)
    assert same(loop.state.params, taken["params"])
    assert torch.equal(loop.model.weight, taken["params"]["weight"])
    assert torch.equal(loop.optimizer.state[loop.model.weight]["momentum_buffer"],
                       taken["opt_state"]["state"]["weight"]["momentum_buffer"])  # fmt: skip
    assert momentum.isnan().any()
    loop.update()
    assert loop.model.weight.isfinite().all()
    assert not same(loop.state.params, taken["params"])


# --- averages


@pytest.mark.parametrize("guarded_first", [True, False])
@pytest.mark.parametrize(
    ("second", "average"),
    [
        # An average that is not finite restarts from the snapshot.
        ((NAN, NONFINITE), 2.0),
        # Skipped updates do not change it: 0, 1, 2 and 6 gave 3.625, and it continues from there.
        ((6.0, SKIPPED), 3.625),
    ],
)
def test_an_average_restarts_only_if_it_is_not_finite(second, average, guarded_first):
    member, ema = rollback(), EMACallback(every_n_updates=100, target_factors=(0.5,))
    first = (6.0, SKIPPED) if second[1] is SKIPPED else (NAN, NONFINITE)
    both = compose(member, ema) if guarded_first else compose(ema, member)
    state, _ = go(both, start(both), 1.0, 2.0, 6.0, first, second)
    assert same(weights_of(state), weights_of(TrainState(**weights(2.0))))
    kept = state.memory("weights/ema=0.5")
    assert same(kept["params"], {"w": torch.tensor([average, 0.0])})
    assert same(kept["buffers"], {"mean": torch.tensor(average if average == 2.0 else 6.0), "count": torch.tensor(3)})
    assert not storages(kept) & storages((weights_of(state), state.memory(member.name)))


def test_each_average_is_checked_separately():
    """The average of a finite sub-module continues, and the average of the whole model restarts."""
    member = rollback(tolerance=1)
    head = EMACallback(every_n_updates=100, target_factors=(0.5,), id="head", model_paths=("head",))
    whole = EMACallback(every_n_updates=100, target_factors=(0.5,))
    reducer = compose(head, whole, member)
    state, _ = reducer(TrainState(params={"head.w": torch.tensor(4.0), "body.w": torch.tensor(1.0)}), BeforeTraining())
    later = {"head.w": torch.tensor(8.0), "body.w": torch.tensor(NAN)}
    state, _ = reducer(state.replace(params=later).advance(samples=4), NONFINITE)
    assert same(state.memory("weights/head/ema=0.5")["params"], {"head.w": torch.tensor(6.0)})
    assert same(state.memory("weights/ema=0.5")["params"], {"head.w": torch.tensor(4.0), "body.w": torch.tensor(1.0)})


# --- metric watchers

KEY = "loss/val/total"


def consumers(mode, **interval):
    watch = {"metric_key": KEY, "mode": mode, **(interval or {"every_n_updates": 1})}
    return {
        "metric": BestMetricCallback(**watch),
        "checkpoint": BestCheckpointCallback(**watch),
        "stopping": MetricEarlyStopping(**watch, tolerance=9),
        "plateau": ReduceLROnPlateauCallback(**watch, tolerance=9),
    }


def measuring(value):
    return callback("measure", produces=(KEY,))(lambda state, event: log(state, event, {KEY: value}))


@pytest.mark.parametrize(("mode", "better"), [("lower", -1e300), ("lower", 0.25), ("higher", 1e300), ("higher", 0.75)])
@pytest.mark.parametrize("bad", [NONFINITE, SKIPPED])
@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_an_update_that_is_not_finite_gives_no_best_value(mode, better, bad, action):
    watchers = consumers(mode)
    member = guard(tolerance=2, action=action)

    def update(state, value, event):
        reducer = compose(member, measuring(value), *watchers.values())
        return reducer(state.replace(**weights(1.0)).advance(samples=4), event)

    state = start(compose(member, measuring(0.0), *watchers.values()))
    state, _ = update(state, 0.5, FINITE)
    best = {name: state.memory(watcher.name)["best"] for name, watcher in watchers.items()}
    assert best == dict.fromkeys(watchers, 0.5)
    for _ in range(2):  # it acts at the second, whose rollback restores weights that were not measured
        state, effects = update(state, better, bad)
        assert {name: state.memory(watcher.name)["best"] for name, watcher in watchers.items()} == best
        assert not any(isinstance(effect, SaveCheckpoint) for effect in effects)
        assert LogScalars({f"{KEY}/best": 0.5, f"{KEY}/best_update": 1}) in effects
    assert [state.memory(watchers[name].name)["since"] for name in ("checkpoint", "stopping", "plateau")] == [0, 0, 0]
    state, effects = update(state, better, FINITE)
    assert {name: state.memory(watcher.name)["best"] for name, watcher in watchers.items()} == dict.fromkeys(
        watchers, better
    )
    assert any(isinstance(effect, SaveCheckpoint) for effect in effects)


@pytest.mark.parametrize(("mode", "better"), [("lower", -1e300), ("higher", 1e300)])
def test_an_epoch_whose_last_update_is_not_finite_gives_no_best_value(mode, better):
    watchers = consumers(mode, every_n_epochs=1)
    reducer = compose(guard(), callback("measure", produces=(KEY,))(
        lambda state, event: log(state, event, {KEY: better}) if isinstance(event, AfterEpoch) else (state, ())
    ), *watchers.values())  # fmt: skip
    state, _ = go(reducer, start(reducer), 1.0, (1.0, NONFINITE))
    state, effects = reducer(state.next_epoch(), AfterEpoch())
    assert {state.memory(watcher.name)["best"] for watcher in watchers.values()} == {None}
    assert effects == (LogScalars({KEY: better}),)
    state, _ = go(reducer, state, (1.0, NONFINITE), 1.0)
    state, effects = reducer(state.next_epoch(), AfterEpoch())
    assert {state.memory(watcher.name)["best"] for watcher in watchers.values()} == {better}


@pytest.mark.parametrize("name", ["metric", "checkpoint", "stopping", "plateau"])
def test_a_guard_listed_after_a_metric_watcher_is_refused(name):
    watcher = consumers("lower")[name]
    with pytest.raises(DeclarationError) as refused:
        compose(measuring(0.0), watcher, guard())(TrainState(), BeforeTraining())
    assert str(refused.value) == (
        f"{watcher.name} reads 'nonfinite', which NanGuardCallback/U2 logs later at the same event: "
        "list it after NanGuardCallback/U2"
    )
    compose(guard(), measuring(0.0), watcher)(TrainState(), BeforeTraining())


# --- in the trainer

STILL = Clock(wall_s=lambda: 0.0, elapsed_s=lambda: 0.0)
LENGTH, BATCH, EPOCHS = 12, 2, 4


class Points(Dataset):
    """Points with their index; with `spoilt`, a third of them are NaN or huge."""

    def __init__(self, *, spoilt):
        self._inputs = torch.randn(LENGTH, 3, generator=torch.Generator().manual_seed(1))
        self._targets = self._inputs.sum(dim=1, keepdim=True)
        if spoilt:
            self._inputs[::3, 1] = INF

    def __len__(self):
        return LENGTH

    def __getitem__(self, index):
        return self._inputs[index], self._targets[index], index


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def squares(outputs, batch):
    return {"mse": (outputs - batch[1]).square().mean()}


def exploding_lr(position):
    """A learning rate that is absurdly high at one update."""
    return 1e30 if position == 10 else 0.05


class Cut(Exception):  # noqa: N818  # not an error
    """The process is killed."""


class Process:
    """One process of a run, with its requests and the batches that it trained on."""

    def __init__(self, directory, nonfinite, dies_at=None):
        self.store = CheckpointStore(directory, "run")
        self._save = Interpreter({SaveCheckpoint: [self.store.save]})
        self.stream, self.batches = [], []
        self._dies_at = dies_at
        self._nonfinite = nonfinite
        self._events = 0

    def train(self):
        newest = self.store.newest()
        trainer, state = self._trainer()
        return trainer(state if newest is None else self.store.resume(newest), resumed=newest is not None)

    def _trainer(self):
        skips = self._nonfinite == "skip"
        model, optimizer = make_model(), FunctionalOptimizer(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
        lr = {"default": (lambda _: 0.05) if skips else exploding_lr}
        step = Step(model=model, loss=self._loss, optimizer=optimizer, lr=lr, nonfinite=self._nonfinite)
        data = TrainingData(Points(spoilt=skips), seed=0, effective_batch_size=BATCH)
        watch = {"every_n_epochs": 1, "metric_key": "loss/val/total"}
        reducer = compose(
            rollback(every_n_updates=3, tolerance=2),
            EMACallback(every_n_epochs=1, target_factors=(0.5, 0.9)),
            OnlineLossCallback(every_n_updates=2, nan="log"),
            EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss",)),
            BestMetricCallback(**watch),
            BestCheckpointCallback(**watch, tolerances=(1,)),
            ReduceLROnPlateauCallback(**watch, tolerance=2, factor=0.5),
            CheckpointCallback(every_n_updates=4, save_weights=True, save_optim=True),
        )
        run = Run(
            end=TrainingIteration(epoch=EPOCHS), updates_per_epoch=LENGTH // BATCH, samples_per_epoch=LENGTH,
            effective_batch_size=BATCH, data={"val": EvaluationData(Points(spoilt=False), seed=0, batch_size=4)},
            forward=forward(make_model(), squares),
        )  # fmt: skip
        state = TrainState.from_module(make_model())
        state = state.replace(opt_state=optimizer.init(state.params))
        return Trainer(run=run, step=step, data=data, reducer=reducer, interpreter=self._interpret, clock=STILL), state

    def _loss(self, outputs, batch):
        self.batches.append(batch[2].tolist())
        return squares(outputs, batch)

    def _interpret(self, effects, state, event):
        self._events += 1
        if self._events == self._dies_at:
            raise Cut
        self.stream += [(type(event).__name__, str(state.iteration), effect) for effect in effects]
        self._save([effect for effect in effects if isinstance(effect, SaveCheckpoint)], state, event)


EXPECTED_BATCHES = [
    epoch_order(0, epoch, LENGTH)[start : start + BATCH] for epoch in range(EPOCHS) for start in range(0, LENGTH, BATCH)
]


@pytest.fixture(scope="module", params=["skip", "apply"])
def uncut(request, tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("uncut"), request.param)
    return request.param, process.train(), process


def rollbacks_of(process):
    """Return the update and the text of each rollback."""
    texts = [(at, effect.text) for _, at, effect in process.stream if isinstance(effect, LogText)]
    return [(TrainingIteration.parse(at).update, text) for at, text in texts if "not finite" in text]


def second_spoilt_updates():
    """Return the updates of each second spoilt batch in a row."""
    row, updates = 0, []
    for update, batch in enumerate(EXPECTED_BATCHES, start=1):
        row = row + 1 if any(index % 3 == 0 for index in batch) else 0
        if row == 2:
            row, updates = 0, [*updates, update]
    return updates


def test_training_ends_finite_after_rollbacks(uncut):
    nonfinite, state, process = uncut
    assert all(tensor.isfinite().all() for _, tensor in tensors((weights_of(state), state.callback_states)))
    assert (state.stop, str(state.iteration)) == (None, f"E{EPOCHS}_U24_S48")
    back = rollbacks_of(process)
    if nonfinite == "apply":  # update 11 leaves weights of 1e30, whose loss is infinite at 12 and NaN at 13
        assert back == [(13, "2 updates in a row were not finite: back to the weights of E1_U9_S18")]
    else:
        assert [update for update, _ in back] == second_spoilt_updates()
        assert len(back) >= 2
    assert state.memory(rollback(every_n_updates=3).name)["rollbacks"] == len(back)


def test_training_continues_with_the_next_batch_after_a_rollback(uncut):
    _, _, process = uncut
    assert rollbacks_of(process)
    assert process.batches == EXPECTED_BATCHES


@settings(max_examples=6)
@given(st.lists(st.integers(2, 29), max_size=2))
def test_a_run_cut_anywhere_equals_the_uncut_run(uncut, tmp_path_factory, cuts):
    nonfinite, expected, _ = uncut
    directory = tmp_path_factory.mktemp("cut")
    for dies_at in cuts:
        try:
            Process(directory, nonfinite, dies_at).train()
        except Cut:
            continue
    process = Process(directory, nonfinite)
    assert same(process.train(), expected)
