"""`EMACallback`: the averages, their evaluation, their checkpoints, and exact resume."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from noether.core.callbacks import CheckpointCallback, EMACallback, EvaluateCallback, MetricCallback
from noether.core.declarations import DeclarationError
from noether.core.effect import LogScalars, LogText, SaveCheckpoint
from noether.core.errors import SettingsError, WeightsError
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import dispatch
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.forward import forward
from noether.core.tensors.stored_weights import find_weights, use_weights
from noether.core.tensors.tree import storages, tensors
from noether.effects import CheckpointStore, open_run
from noether.effects.interpreter import Interpreter
from noether.testing import same
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer

UPDATE = AfterUpdate(samples=4)


def ema(*factors, **settings):
    return EMACallback(**{"every_n_epochs": 1, "target_factors": factors or (0.5,), **settings})


def start(callback, **fields):
    state = TrainState(**fields)
    return state.replace(callback_states=callback.init(state))


def update_once(callback, state, event=UPDATE, **fields):
    """Return the state after one more update that changes `fields`."""
    return callback(state.replace(**fields).advance(samples=4), event)[0]


def average_of(state, weights="ema=0.5"):
    return state.memory(f"weights/{weights}")


# --- the average


def test_two_updates_computed_by_hand():
    state = start(ema(0.5, 0.75), params={"w": torch.tensor([0.0, 8.0])}, buffers={"n": torch.tensor(1)})
    for value, count in [(4.0, 2), (8.0, 3)]:
        params, buffers = {"w": torch.tensor([value, 8.0])}, {"n": torch.tensor(count)}
        state = update_once(ema(0.5, 0.75), state, params=params, buffers=buffers)
    half = {"params": {"w": torch.tensor([5.0, 8.0])}, "buffers": {"n": torch.tensor(3)}}
    assert same(average_of(state), half)
    quarter = {"params": {"w": torch.tensor([2.75, 8.0])}, "buffers": {"n": torch.tensor(3)}}
    assert same(average_of(state, "ema=0.75"), quarter)
    assert find_weights(state) == ("ema=0.5", "ema=0.75")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("center", [0.0, 1.0, -100.0])
def test_the_closed_form_over_a_thousand_updates(dtype, rtol, center):
    factors, updates = (0.5, 0.9, 0.99, 0.999, 0.9999), 1000
    normal = torch.randn(updates + 1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = (center + normal).to(dtype)
    callback = ema(*factors)
    state = start(callback, params={"w": params[0]})
    for param in params[1:]:
        state = update_once(callback, state, params={"w": param})
    for factor in factors:
        shares = [factor**updates, *((1 - factor) * factor ** (updates - k) for k in range(1, updates + 1))]
        assert math.isclose(sum(shares), 1.0)
        expected = torch.tensor(shares, dtype=torch.float64) @ params.double()
        average = average_of(state, f"ema={factor}")["params"]["w"]
        assert average.dtype == dtype
        assert (average.double() - expected).norm() <= rtol * expected.norm()


FLOATS = st.sampled_from([torch.float32, torch.float64])


@settings(max_examples=30)
@given(st.floats(0.01, 0.999), st.integers(0, 8), st.booleans(), st.integers(0, 15), st.integers(0, 15))
def test_averaging_starts_at_an_update_and_its_decay_grows_as_in_tensorflow(factor, begin, warmup, cut, updates):
    callback = ema(factor, start_at_update=begin, warmup=warmup)
    params = torch.randn(updates + 1, 3, generator=torch.Generator().manual_seed(updates), dtype=torch.float64)
    state = start(callback, params={"w": params[0]})
    expected = params[0]
    for update, param in enumerate(params[1:], 1):
        if update == cut:  # what a checkpoint holds; the callback keeps nothing
            callback = ema(factor, start_at_update=begin, warmup=warmup)
            state = TrainState(iteration=state.iteration, callback_states=state.callback_states)
        state = update_once(callback, state, params={"w": param})
        averaged = update - begin - 1
        decay = min(factor, (1 + averaged) / (10 + averaged)) if warmup else factor
        expected = param if averaged < 0 else decay * expected + (1 - decay) * param
        torch.testing.assert_close(average_of(state, f"ema={factor}")["params"]["w"], expected)
        assert averaged >= 0 or torch.equal(average_of(state, f"ema={factor}")["params"]["w"], param)


def test_a_start_below_zero_is_refused():
    with pytest.raises(SettingsError, match="start_at_update: -1 is not a whole number of at least 0"):
        ema(start_at_update=-1)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


@torch.no_grad()
def randomize(model, generator):
    """Write random numbers into the params and buffers of a model."""
    for tensor in (*model.parameters(), *model.buffers()):
        whole = torch.randint(100, tensor.shape, generator=generator)
        tensor.copy_(torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else whole)


@settings(max_examples=25)
@given(st.floats(0.01, 0.999), st.integers(0, 12), st.integers(0, 2**31), FLOATS)
def test_the_average_equals_that_of_torch(factor, updates, seed, dtype):
    """Bit for bit, with a state that views a live model."""
    generator, model, callback = torch.Generator().manual_seed(seed), network().to(dtype), ema(factor)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(factor))
    randomize(model, generator)
    theirs.update_parameters(model)  # the first call only copies
    state = start(callback, **tensors_of(TrainState.from_module(model)))
    for _ in range(updates):
        randomize(model, generator)
        theirs.update_parameters(model)
        state = update_once(callback, state)
    ours = average_of(state, f"ema={factor}")
    assert same(ours["params"], {name: p.detach() for name, p in theirs.module.named_parameters()})
    assert same(ours["buffers"], dict(theirs.module.named_buffers()))


def tensors_of(state):
    return {"params": state.params, "buffers": state.buffers}


def test_params_are_averaged_in_float32_or_more_and_integers_are_copied():
    types = (torch.float64, torch.float32, torch.bfloat16, torch.complex64)
    callback, whole = ema(0.75), {"int64": torch.tensor([3]), "bool": torch.tensor(True)}
    state = start(callback, params={str(dtype): torch.zeros(2, dtype=dtype) for dtype in types} | whole)
    later = {"int64": torch.tensor([5]), "bool": torch.tensor(False)}
    state = update_once(callback, state, params={str(dtype): torch.ones(2, dtype=dtype) for dtype in types} | later)
    averages = {str(dtype): torch.full((2,), 0.25, dtype=dtype) for dtype in types} | later
    precise = averages | {str(torch.bfloat16): torch.full((2,), 0.25)}
    assert same(average_of(state, "ema=0.75")["params"], precise)
    assert same(use_weights(state, "ema=0.75").params, averages)


def test_an_average_of_half_precision_params_moves():
    callback = ema(0.999)
    state = start(callback, params={"w": torch.tensor(1.0, dtype=torch.bfloat16)})
    for _ in range(1000):
        state = update_once(callback, state, params={"w": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert average_of(state, "ema=0.999")["params"]["w"].item() == pytest.approx(2 - 0.999**1000, rel=1e-5)
    assert use_weights(state, "ema=0.999").params["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_average_follows_a_model_that_is_moved_to_another_dtype(dtype):
    ema = EMACallback(every_n_updates=1, target_factors=(0.5,))
    model = nn.Linear(1, 1, bias=False)
    state, _ = compose(ema)(TrainState.from_module(model), BeforeTraining())
    first = model.weight.item()
    model.to(dtype)
    model.weight.data.fill_(8.0)
    state, _ = compose(ema)(state.advance(samples=1), AfterUpdate(samples=1))
    average = state.memory("weights/ema=0.5")["params"]["weight"]
    assert average.dtype is (torch.float32 if dtype is torch.bfloat16 else dtype)
    assert average.item() == pytest.approx((first + 8) / 2)


def test_a_resumed_run_with_other_model_paths_is_refused():
    params = {"body.w": torch.ones(2), "head.w": torch.ones(2)}
    state = start(ema(), params=params)
    part = EMACallback(every_n_epochs=1, target_factors=(0.5,), model_paths=("head",))
    with pytest.raises(WeightsError, match=r"'weights/ema=0.5' has other .* --drop-memory weights/ema=0.5"):
        compose(part)(state, BeforeTraining(resumed=True))
    with pytest.raises(WeightsError, match=r"'weights/ema=0.5' has other parameters"):
        compose(ema())(start(part, params=params), BeforeTraining(resumed=True))


def test_skipped_updates_do_not_count():
    state = start(ema(), params={"w": torch.tensor(2.0)})
    skipped = AfterUpdate(samples=4, finite=False, skipped=True)
    moved = state.replace(params={"w": torch.tensor(4.0)}).advance(samples=4)
    assert ema()(moved, skipped) == (moved, ())
    applied = AfterUpdate(samples=4, finite=False)
    assert average_of(update_once(ema(), state, applied, params={"w": torch.tensor(4.0)}))["params"]["w"] == 3.0


def test_averages_share_no_storage_and_are_never_written_to():
    callback = ema(0.5, 0.9)
    params = {"w": torch.ones(3), "v": torch.zeros(())}
    buffers = {"mean": torch.ones(3), "count": torch.tensor(7)}
    state = start(callback, params=params, buffers=buffers)
    seen = []
    for update in range(3):
        weights = storages(tensors_of(state))
        memories = [storages(average_of(state, weights)) for weights in ("ema=0.5", "ema=0.9")]
        assert len(weights.union(*memories)) == len(weights) + sum(map(len, memories))
        held = tensors((state.params, state.buffers, state.callback_states))
        seen += [(tensor, tensor.clone()) for _, tensor in held]
        new = {"params": {"w": torch.full((3,), float(update)), "v": torch.ones(())}, "buffers": buffers}
        state = update_once(callback, state, **new)
    for tensor, content in seen:
        assert tensor._version == 0  # noqa: SLF001  # the number of writes in place
        assert torch.equal(tensor, content)


# --- sub-modules

PARAMS = {name: torch.zeros(1) for name in ("body.a.weight", "body.b.weight", "body2.weight", "head.weight")}
BUFFERS = {"body.a.count": torch.tensor(0), "head.mean": torch.zeros(1)}
LATER = {name: torch.ones(1) for name in PARAMS}
COUNTED = {"body.a.count": torch.tensor(5), "head.mean": torch.ones(1)}


@pytest.mark.parametrize(
    ("paths", "params", "buffers"),
    [
        ((), tuple(PARAMS), tuple(BUFFERS)),
        (("body",), ("body.a.weight", "body.b.weight"), ("body.a.count",)),
        (("body.a", "head"), ("body.a.weight", "head.weight"), ("body.a.count", "head.mean")),
        (("body2",), ("body2.weight",), ()),
        (("body", None), tuple(PARAMS), tuple(BUFFERS)),
        ((None,), tuple(PARAMS), tuple(BUFFERS)),
    ],
)
def test_averages_of_sub_modules_are_combined_with_the_weights_in_training(paths, params, buffers):
    callback = ema(0.75, model_paths=paths)
    state = update_once(callback, start(callback, params=PARAMS, buffers=BUFFERS), params=LATER, buffers=COUNTED)
    average = average_of(state, "ema=0.75")
    assert (tuple(average["params"]), tuple(average["buffers"])) == (params, buffers)
    mixed = use_weights(state, "ema=0.75")
    assert {name: param.item() for name, param in mixed.params.items()} == {
        name: 0.25 if name in params else 1.0 for name in PARAMS
    }
    assert same(mixed.buffers, COUNTED)
    assert list(mixed.params) == list(PARAMS)  # sums over all of them depend on the order
    assert (state.params, mixed.iteration) == (LATER, state.iteration)


def test_buffers_of_an_average_replace_those_in_training():
    state = TrainState(params=PARAMS, buffers=BUFFERS)
    state = state.remember("weights/mine", {"params": {}, "buffers": {"head.mean": torch.full((1,), 7.0)}})
    assert same(use_weights(state, "mine").buffers, {**BUFFERS, "head.mean": torch.full((1,), 7.0)})
    assert same(use_weights(state, "mine").params, PARAMS)


def test_a_path_without_parameters_is_refused_with_the_nearest_path():
    known = "the model has body, body.a, body.b, body2, head"
    initial = TrainState(params=PARAMS, buffers={**BUFFERS, "stats.mean": torch.zeros(1)})
    with pytest.raises(SettingsError) as refused:
        compose(ema(model_paths=("bdy", "head", "stats", "head.weight")))(initial, BeforeTraining())
    assert [str(problem) for problem in refused.value.problems] == [
        f"model_paths.0: 'bdy' names no sub-module with parameters; {known}; did you mean 'body'?",
        f"model_paths.2: 'stats' names no sub-module with parameters; {known}",
        f"model_paths.3: 'head.weight' names no sub-module with parameters; {known}",
    ]
    with pytest.raises(SettingsError, match=r"^model_paths.0: 'a' names no sub-module with .*; the model has none$"):
        ema(model_paths=("a",)).init(TrainState(params={"weight": torch.zeros(1)}))


def test_unknown_weights_are_refused_with_the_known_ones():
    state = start(ema(0.9, 0.99), params={"w": torch.zeros(1)})
    with pytest.raises(WeightsError) as error:
        use_weights(state, "ema=0.999")
    assert str(error.value) == (
        "no weights 'ema=0.999' are stored; stored: ema=0.9, ema=0.99; did you mean 'ema=0.99'?"
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"keep": 0}, "keep: 0 is not a whole number of at least 1"),
        (
            {"keep": 2, "save_weights": False},
            "keep: has no effect without save_weights: leave it out, or set save_weights to true",
        ),
    ],
)
def test_a_keep_without_meaning_is_refused(settings, problem):
    with pytest.raises(SettingsError) as refused:
        ema(**settings)
    assert [str(each) for each in refused.value.problems] == [problem]


# --- requests


def save(factor, *, keep, pointer=None, models=()):
    return SaveCheckpoint(
        tag=f"E1_U1_S4.ema={factor}", optimizer=False, weights_of=f"ema={factor}", models=models,
        pointers=() if pointer is None else (f"{pointer}.ema={factor}",), retention={f"weights/ema={factor}": keep},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "at_interval", "after_training"),
    [
        ({}, [save(0.5, keep=None)], [save(0.5, keep=0, pointer="last")]),
        ({"save_last_weights": False}, [save(0.5, keep=None)], []),
        ({"keep": 3}, [save(0.5, keep=3)], [save(0.5, keep=0, pointer="last")]),
        ({"save_weights": False}, [], [save(0.5, keep=0, pointer="last")]),
        ({"save_weights": False, "save_last_weights": False}, [], []),
        (
            {"save_weights": False, "save_latest_weights": True},
            [save(0.5, keep=0, pointer="latest")],
            [save(0.5, keep=0, pointer="last")],
        ),
        ({"save_latest_weights": True, "save_last_weights": False}, [save(0.5, keep=None, pointer="latest")], []),
        (
            {"target_factors": (0.5, 0.9)},
            [save(0.5, keep=None), save(0.9, keep=None)],
            [save(0.5, keep=0, pointer="last"), save(0.9, keep=0, pointer="last")],
        ),
        (
            {"model_paths": ("body", "head")},
            [save(0.5, keep=None, models=("body", "head"))],
            [save(0.5, keep=0, pointer="last", models=("body", "head"))],
        ),
        ({"model_paths": ("body", None)}, [save(0.5, keep=None)], [save(0.5, keep=0, pointer="last")]),
        (
            {"id": "mine", "model_paths": (None,), "save_last_weights": False},
            [
                SaveCheckpoint(
                    tag="E1_U1_S4.mine.ema=0.5",
                    optimizer=False,
                    weights_of="mine/ema=0.5",
                    retention={"weights/mine/ema=0.5": None},
                )
            ],
            [],
        ),
    ],
)
def test_requests_for_each_combination_of_settings(given, at_interval, after_training):
    callback = ema(**given)
    state = update_once(callback, start(callback, params=PARAMS, buffers=BUFFERS)).next_epoch()
    assert callback(state, AfterEpoch()) == (state, tuple(at_interval))
    assert callback(state, AfterTraining()) == (state, tuple(after_training))
    later = state.advance(samples=4)
    assert callback(later, AtEval()) == (later, ())
    assert callback(start(callback, params=PARAMS), BeforeTraining())[1] == ()


def test_between_firings_the_average_moves_and_nothing_is_requested():
    callback = ema(every_n_epochs=None, every_n_updates=2)
    state, effects = callback(start(callback, params=PARAMS).advance(samples=4), UPDATE)
    assert effects == ()
    state, effects = callback(state.advance(samples=4), UPDATE)
    assert [effect.tag for effect in effects] == ["E0_U2_S8.ema=0.5"]
    after = state.next_epoch()
    assert callback(after, AfterEpoch()) == (after, ())


def test_at_end_fires_after_training():
    callback = ema(every_n_epochs=7, at_end=True, save_last_weights=False)
    state = start(callback, params=PARAMS).advance(samples=4).next_epoch()
    assert callback(state, AfterTraining())[1] == (save(0.5, keep=None),)


# --- on disk


def open_store(directory):
    store = CheckpointStore(directory, "run")
    ignored = [lambda *_: None]
    return store, Interpreter({SaveCheckpoint: [store.save], LogScalars: ignored, LogText: ignored})


def train(callback, directory, epochs=3, state=None):
    """Run `epochs` of two updates, whose number becomes the weights, and save to disk."""
    store, interpreter = open_store(directory)
    reducer = compose(callback, CheckpointCallback(every_n_epochs=1, save_weights=True, save_optim=True))
    if state is None:
        zeros = {"body.w": torch.zeros(2), "head.w": torch.zeros(1)}
        state = TrainState(params=zeros, buffers={"body.n": torch.tensor(0)})
    state = dispatch(state, BeforeTraining(), reducer, interpreter)
    for _ in range(epochs):
        for _ in range(2):
            number = state.iteration.update + 1
            params = {name: torch.full_like(param, number) for name, param in state.params.items()}
            state = state.replace(params=params, buffers={"body.n": torch.tensor(number)}).advance(samples=4)
            state = dispatch(state, UPDATE, reducer, interpreter)
        state = dispatch(state.next_epoch(), AfterEpoch(), reducer, interpreter)
    return dispatch(state.replace(ended=True), AfterTraining(), reducer, interpreter), store


def averages_in(store):
    return [manifest.tag for manifest in store.manifests() if manifest.weights_of]


def test_a_saved_average_loads_and_cannot_be_resumed(tmp_path):
    state, store = train(ema(0.5, 0.9), tmp_path)
    for weights in ("ema=0.5", "ema=0.9"):
        saved = store.find(f"last.{weights}")
        assert (saved.weights_of, saved.resumable, set(saved.parts)) == (weights, False, {"weights.safetensors"})
        loaded = store.load(saved)
        assert same(tensors_of(loaded), dict(average_of(state, weights)))
        assert (loaded.iteration, loaded.callback_states) == (state.iteration, {})
    assert store.find("last.ema=0.5").tag == "E3_U6_S24.ema=0.5"  # saved by AfterEpoch, at the same iteration
    newest = store.newest()
    assert (newest.weights_of, newest.resumable) == (None, True)
    assert same(store.load(newest), state)  # the averages included


def test_a_run_that_saved_only_averages_cannot_be_resumed(tmp_path):
    store, interpreter = open_store(tmp_path)
    state = start(ema(0.5, 0.9), params=PARAMS).advance(samples=4)
    dispatch(state, AfterTraining(), ema(0.5, 0.9), interpreter)
    assert sorted(averages_in(store)) == ["E0_U1_S4.ema=0.5", "E0_U1_S4.ema=0.9"]
    # Even with the optimizer's memory, because that belongs to other weights.
    store.save(SaveCheckpoint(tag="whole", weights_of="ema=0.5"), state, UPDATE)
    assert set(store.find("whole").parts) == {"weights.safetensors", "state.json", "state.safetensors"}
    assert store.newest() is None


def test_each_firing_saves_the_average_at_that_time(tmp_path):
    _, store = train(ema(0.5), tmp_path, epochs=2)
    found = {tag: store.load(store.find(tag)).params["head.w"].item() for tag in averages_in(store)}
    # 0.5 * (0.5 * 0 + 0.5 * 1) + 0.5 * 2, and two updates later
    assert found == {"E1_U2_S8.ema=0.5": 1.25, "E2_U4_S16.ema=0.5": 3.0625}
    assert store.pointers() == {"latest": "E2_U4_S16", "last": "E2_U4_S16", "last.ema=0.5": "E2_U4_S16.ema=0.5"}


def test_only_the_newest_of_the_latest_weights_are_kept(tmp_path):
    settings = {"save_weights": False, "save_latest_weights": True}
    state, store = train(ema(0.5, **settings), tmp_path)
    assert store.pointers()["latest.ema=0.5"] == "E3_U6_S24.ema=0.5"
    assert sorted(averages_in(store)) == ["E3_U6_S24.ema=0.5"]
    # An extended run moves both pointers.
    _, store = train(ema(0.5, **settings), tmp_path, epochs=1, state=state.replace(ended=False))
    assert sorted(averages_in(store)) == ["E4_U8_S32.ema=0.5"]


def test_only_the_last_average_can_be_saved(tmp_path):
    _, store = train(ema(0.5, save_weights=False), tmp_path)
    assert averages_in(store) == ["E3_U6_S24.ema=0.5"]
    assert store.pointers()["last.ema=0.5"] == "E3_U6_S24.ema=0.5"


def test_only_the_weights_of_the_chosen_sub_module_are_saved(tmp_path):
    state, store = train(ema(0.5, model_paths=("body",)), tmp_path)
    loaded = store.load(store.find("last.ema=0.5"))
    assert same(tensors_of(loaded), dict(average_of(state)))
    assert (list(loaded.params), list(loaded.buffers)) == (["body.w"], ["body.n"])


# --- two callbacks with one factor


def test_two_callbacks_with_one_factor_differ_by_id():
    whole, body = ema(0.5, id="whole"), ema(0.5, id="body", model_paths=("body",))
    state, _ = compose(whole, body)(TrainState(params=PARAMS), BeforeTraining())
    assert set(state.callback_states) == {"weights/whole/ema=0.5", "weights/body/ema=0.5"}
    assert find_weights(state) == ("whole/ema=0.5", "body/ema=0.5")
    state, effects = compose(whole, body)(state.replace(params=LATER).advance(samples=4).next_epoch(), AfterTraining())
    assert [effect.pointers for effect in effects] == [("last.whole.ema=0.5",), ("last.body.ema=0.5",)]
    assert (whole.produces, body.produces) == (("weights/whole/ema=0.5",), ("weights/body/ema=0.5",))


def test_two_callbacks_with_one_factor_and_no_id_are_refused():
    with pytest.raises(DeclarationError) as refused:
        compose(ema(0.5), ema(0.9, 0.5))(TrainState(params=PARAMS), BeforeTraining())
    assert str(refused.value).splitlines()[0] == (
        "2 callbacks have a memory named 'weights/ema=0.5'; give this one another id or name"
    )
    compose(ema(0.5), ema(0.9))(TrainState(params=PARAMS), BeforeTraining())


# --- evaluation


def error(outputs, batch):
    return (outputs - batch[1]).abs()


def scale_model(state, batch):
    """A forward that scales the input and adds a buffer."""
    return {}, batch[0] * state.params["w"] + state.buffers["shift"]


def metric(weights="ema=0.9", **settings):
    wanted = {"dataset_key": "val", "metric": error, "weights": weights}
    return MetricCallback(**{"every_n_epochs": 1, **wanted, **settings})


def test_evaluating_an_average_does_not_change_the_weights_in_training():
    run = Run(data={"val": [(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))]}, forward=scale_model)
    reducer = compose(ema(0.75), metric("ema=0.75"), metric(weights=None))
    initial = TrainState(params={"w": torch.tensor(0.0)}, buffers={"shift": torch.tensor(0.0)})
    state, _ = reducer(initial, BeforeTraining(run=run))
    state = state.replace(params={"w": torch.tensor(4.0)}, buffers={"shift": torch.tensor(1.0)})
    state, _ = reducer(state.advance(samples=4), AfterUpdate(samples=4, run=run))
    after, effects = reducer(state.next_epoch(), AfterEpoch(run=run))
    logged = {key: value for effect in effects if type(effect) is LogScalars for key, value in effect.values.items()}
    assert logged == {"val/error/ema=0.75": 2.5, "val/error": 7.0}  # w is 1 and 4, the shift 1; inputs 1 and 2
    assert (after.params, after.buffers, after.callback_states) == (state.params, state.buffers, state.callback_states)
    assert all(after.params[name] is state.params[name] for name in state.params)


def misfit(*callbacks):
    with pytest.raises(DeclarationError) as refused:
        compose(*callbacks)(TrainState(params=PARAMS), BeforeTraining())
    return str(refused.value)


def test_weights_without_a_producer_are_refused_before_training():
    wanted = "MetricCallback/E1/val/ema=0.99/error consumes 'weights/ema=0.99', which no callback produces; "
    assert misfit(ema(0.9, 0.5), metric("ema=0.99")) == (
        f"{wanted}produced before it: weights/ema=0.9, weights/ema=0.5; did you mean 'weights/ema=0.9'?"
    )
    assert misfit(metric("ema=0.99")) == f"{wanted}produced before it: nothing"


def test_a_consumer_listed_before_the_producer_is_refused():
    assert misfit(metric(), ema(0.9)) == (
        "MetricCallback/E1/val/ema=0.9/error consumes 'weights/ema=0.9': "
        "list it after EMACallback/E1, which produces it"
    )


@pytest.mark.parametrize(
    "interval", [{"every_n_epochs": 1}, {"every_n_epochs": None, "every_n_samples": 3}, {"at_end": True}]
)
def test_an_average_is_current_at_every_update(interval):
    callback = ema(0.9, every_n_epochs=10)
    assert callback.produces == ("weights/ema=0.9",)
    reducer = compose(callback, metric(**interval))
    run = Run(data={"val": []}, forward=scale_model)
    state, _ = reducer(TrainState(params=PARAMS), BeforeTraining(run=run))
    assert set(state.callback_states) == {"weights/ema=0.9"}


def test_an_evaluation_before_the_first_update_uses_the_initial_weights():
    run = Run(data={"val": [(torch.tensor([1.0]), torch.tensor([0.0]))]}, forward=scale_model)
    reducer = compose(ema(0.9), metric())
    initial = TrainState(params={"w": torch.tensor(3.0)}, buffers={"shift": torch.tensor(0.0)})
    state, _ = reducer(initial, BeforeTraining(run=run))
    assert reducer(state, AtEval(run=run))[1][0].values == {"val/error/ema=0.9": 3.0}


# --- settings

BETWEEN = "is not a number between 0 and 1, both excluded"


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"target_factors": ()}, ["target_factors: [] is not a list of different factors"]),
        (
            {"target_factors": (0.9, 0.5, 0.90)},
            ["target_factors: [0.9, 0.5, 0.9] is not a list of different factors"],
        ),
        *(
            ({"target_factors": (0.5, factor)}, [f"target_factors.1: {factor!r} {BETWEEN}"])
            for factor in (0.0, 1.0, 0, 1, -0.1, 1.5, math.nan, math.inf, True, "0.9", None)
        ),
        (
            {"target_factors": (2.0, 3.0), "every_n_epochs": 0},
            [
                "every_n_epochs: 0 is not a whole number of at least 1",
                f"target_factors.0: 2.0 {BETWEEN}",
                f"target_factors.1: 3.0 {BETWEEN}",
            ],
        ),
        (
            {"every_n_epochs": None},
            ["no interval is set; give exactly one of every_n_epochs, every_n_updates, every_n_samples"],
        ),
    ],
)
def test_invalid_settings_are_refused(given, problems):
    with pytest.raises(SettingsError) as refused:
        ema(**given)
    assert [str(problem) for problem in refused.value.problems] == problems


# --- resume


class Points(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.tensor([float(index), 1.0, -1.0]) / 3 + 0.1 * torch.randn(3)
        return x, (x.sum() > 0).long()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def entropy(outputs, batch):
    return {"entropy": nn.functional.cross_entropy(outputs, batch[1])}


class Cut(Exception):  # noqa: N818  # not an error
    """The process is killed."""


def trainer(directory, dies_at=None):
    """Return trainer, state and store of a process that is killed before the effects of event `dies_at`."""
    store, interpreter = open_store(directory)
    data = TrainingData(Points(), seed=0, effective_batch_size=2)
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    step = Step(model=make_model(), loss=entropy, optimizer=optimizer, lr={"default": lambda _: 0.1})
    events = []

    def dying(effects, state, event):
        events.append(event)
        if len(events) == dies_at:
            raise Cut
        interpreter(effects, state, event)

    reducer = compose(
        ema(0.5, 0.9, model_paths=("0",), every_n_epochs=2, id="first"),
        ema(0.8, every_n_epochs=None, every_n_updates=2, save_weights=False, save_latest_weights=True),
        EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", "accuracy"), weights="ema=0.8"),
        EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("accuracy",), weights="first/ema=0.9"),
        CheckpointCallback(every_n_updates=2, save_weights=True, save_optim=True),
    )
    run = Run(
        end=TrainingIteration(epoch=4), updates_per_epoch=3, samples_per_epoch=6, effective_batch_size=2,
        data={"val": EvaluationData(Points(), seed=0, batch_size=3)}, forward=forward(make_model(), entropy),
    )  # fmt: skip
    state = TrainState.from_module(make_model())
    state = state.replace(opt_state=optimizer.init(state.params))
    return Trainer(run=run, step=step, data=data, reducer=reducer, interpreter=dying), state, store


def run_with_cuts(directory, cuts):
    for dies_at in (*cuts, None):
        train, state, store = trainer(directory, dies_at)
        newest = store.newest()
        if newest is not None:
            state = store.resume(newest)
        try:
            return train(state, resumed=newest is not None), store
        except Cut:
            continue
    raise AssertionError("the last process does not die")


def averages_on_disk(store):
    """Return the weights of each saved average by its iteration, and by the pointers that name it."""
    saved = {f"{m.iteration} {m.weights_of}": m for m in store.manifests() if m.weights_of}
    pointed = {name: store.find(name) for name in store.pointers() if "ema" in name}
    return {name: tensors_of(store.load(manifest)) for name, manifest in (saved | pointed).items()}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    state, store = run_with_cuts(tmp_path_factory.mktemp("uncut"), [])
    return state, averages_on_disk(store)


@settings(max_examples=12)
@given(st.lists(st.integers(2, 17), max_size=2))
def test_a_run_cut_anywhere_equals_the_uncut_run(uncut, tmp_path_factory, cuts):
    expected, averages = uncut
    state, store = run_with_cuts(tmp_path_factory.mktemp("cut"), cuts)
    assert set(state.callback_states) == {"weights/first/ema=0.5", "weights/first/ema=0.9", "weights/ema=0.8"}
    assert same(state, expected)
    assert same(averages_on_disk(store), averages)
    assert not same(average_of(state, "ema=0.8")["params"], state.params)


def test_a_kept_average_of_the_end_survives_when_the_run_is_extended(tmp_path):
    directory = open_run(tmp_path)
    reducer = compose(EMACallback(every_n_epochs=10, target_factors=(0.5,), at_end=True))
    state = dispatch(TrainState(params={"w": torch.ones(2)}), BeforeTraining(), reducer, directory.interpreter)
    for _ in range(2):
        state = dispatch(state.advance(samples=1), AfterUpdate(samples=1), reducer, directory.interpreter)
        state = dispatch(state, AfterTraining(), reducer, directory.interpreter)
    directory.close()
    tags = [manifest.tag for manifest in directory.checkpoints.manifests()]
    assert tags == ["E0_U1_S1.ema=0.5", "E0_U2_S2.ema=0.5"]  # one kept, one the last


def test_two_saves_with_one_tag_keep_their_order(tmp_path):
    store = CheckpointStore(tmp_path, "order")
    state = start(ema(0.999), params={"w": torch.ones(2)}).advance(samples=4)
    for event in (AtEval(), BeforeTraining(), AfterEpoch()):
        store.save(SaveCheckpoint(tag="T.ema=0.999", optimizer=False, weights_of="ema=0.999"), state, event)
    assert [(each.tag, each.number) for each in store.manifests()] == [
        ("T.ema=0.999", 1), ("T.ema=0.999.2", 2), ("T.ema=0.999.3", 3),
    ]  # fmt: skip
