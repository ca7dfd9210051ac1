"""The arithmetic of checkpoints against the run walked save by save."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noether.core.callbacks import BestCheckpointCallback, CheckpointCallback, EMACallback
from noether.core.combinators import callback, on, when
from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, next_move
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.schedules.schedule import EveryNUpdates
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict, tensors
from noether.effects.checkpoints.contents import STATE, WEIGHTS, select_weights
from noether.effects.checkpoints.manifest import Manifest, Part
from noether.effects.checkpoints.retention import select_prunable
from noether.effects.interpreter import merge_effects
from noether.planning.planned_callback import plan_callback
from noether.planning.requests import Probe
from noether.planning.retention_forecast import forecast_checkpoints
from noether.testing.strategies import run_lengths, schedules
from noether.training.configured_callbacks import ConfiguredCallback


def begun(device):
    params = {name: torch.zeros(size, device=device) for name, size in (("a.w", 3), ("a.v", 5), ("b.w", 11))}
    return TrainState(params=params, opt_state={"state": {"m": torch.zeros(19, device=device)}})


def size(state, save):
    weights = select_weights(save, state).values() if save.weights else ()
    rest = tensors((state.opt_state, state.callback_states)) if save.optimizer else ()
    return sum(t.numel() * t.element_size() for t in [*weights, *(tensor for _, tensor in rest)])


@dataclasses.dataclass
class Store:
    """What the checkpoint store does with requests, on paper."""

    held: dict = dataclasses.field(default_factory=dict)
    pointers: dict = dataclasses.field(default_factory=dict)
    written: list = dataclasses.field(default_factory=list)
    peak: int = 0

    def __call__(self, effects, state, event):
        for save in (effect for effect in merge_effects(effects) if isinstance(effect, SaveCheckpoint)):
            files = [name for name, asked in ((WEIGHTS, save.weights), (STATE, save.optimizer)) if asked]
            made = Manifest(tag=str(len(self.written)), run_id="r", segment=1, parent=None, iteration=state.iteration,
                            event=type(event).__name__, parts=dict.fromkeys(files, Part(size_bytes=0, sha256="")),
                            number=1 + len(self.written), weights_of=save.weights_of, models=save.models,
                            retention=dict(save.retention))  # fmt: skip
            self.held[made.tag] = (made, size(state, save))
            self.written.append(size(state, save))
            self.peak = max(self.peak, self.bytes)
            self.pointers.update(dict.fromkeys(save.pointers, made.tag))
            manifests = [manifest for manifest, _ in self.held.values()]
            for tag in select_prunable(manifests, self.pointers, set(self.held), parent=None):
                del self.held[tag]

    @property
    def bytes(self):
        return sum(size for _, size in self.held.values())


def walk(reducer, run):
    """Run all events through the reducer and the store."""
    store, state = Store(), begun("cpu")

    def tell(state, event):
        after, effects = reducer(state, event)
        store(effects, after, event)
        return after

    state = tell(state, BeforeTraining(run=run))
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state = tell(state.next_epoch(), AfterEpoch(run=run))
        elif move is Move.END_TRAINING:
            state = tell(state.replace(ended=True), AfterTraining(run=run))
        else:
            size = run.iteration_after(state.iteration.update + 1).sample - state.iteration.sample
            state = tell(state.advance(samples=size), AfterUpdate(run=run, samples=size))
    return store


def asked(callbacks, run):
    memory = compose(*callbacks).init(begun("meta"))
    state = begun("meta").replace(callback_states=memory)
    probe = Probe(state=state, initial=state, run=run.replace(data={}))
    planned = [plan_callback(ConfiguredCallback(each, ()), probe) for each in callbacks]
    assert not any(each.probe_error or each.save_error for each in planned)
    return [request for each in planned for request in each.requests]


intervals = st.builds(
    lambda name, n: {name: n},
    st.sampled_from(("every_n_epochs", "every_n_updates", "every_n_samples")),
    st.integers(1, 9),
)
keeps = st.one_of(st.none(), st.integers(1, 4))


@st.composite
def checkpointing(draw, name):
    kinds = [draw(st.booleans()) for _ in range(4)]
    names = ("save_weights", "save_optim", "save_latest_weights", "save_latest_optim")
    given = dict(zip(names, kinds if any(kinds) else [True, *kinds[1:]], strict=True))
    models = draw(st.sampled_from(((), ("a",), ("b",), ("a", "b"))))
    return CheckpointCallback(id=name, keep=draw(keeps), model_names=models, **given, **draw(intervals))


@st.composite
def averaging(draw, name):
    saves = {key: draw(st.booleans()) for key in ("save_weights", "save_last_weights", "save_latest_weights")}
    paths = draw(st.sampled_from(((), ("a",))))
    return EMACallback(id=name, target_factors=(0.5, 0.25), model_paths=paths, at_end=draw(st.booleans()),
                       **saves, **draw(intervals))  # fmt: skip


@st.composite
def of_a_user(draw, name):
    weights, optimizer = draw(st.sampled_from(((True, True), (True, False), (False, True))))
    models, pointers = draw(st.sampled_from(((), ("a",)))), draw(st.sampled_from(((), (name,))))
    save = SaveCheckpoint(weights=weights, optimizer=optimizer, models=models if weights else (), pointers=pointers,
                          retention=FrozenDict({name: draw(keeps)}))  # fmt: skip
    tag = draw(st.sampled_from((None, "{}.mine", "same")))

    def asks(state, event):
        return state, (dataclasses.replace(save, tag=tag and tag.format(state.iteration)),)

    if draw(st.booleans()):
        return when(draw(schedules(12)), at_end=draw(st.booleans()))(asks)
    kinds = st.sets(st.sampled_from((BeforeTraining, AfterUpdate, AfterEpoch, AfterTraining)), min_size=1)
    return on(*draw(kinds))(asks)


@st.composite
def savers(draw):
    kinds = st.lists(st.sampled_from((checkpointing, averaging, of_a_user)), min_size=1, max_size=3)
    return [draw(kind(f"saver{index}")) for index, kind in enumerate(draw(kinds))]


@given(savers(), run_lengths(max_epochs=4))
@settings(max_examples=100)
def test_what_no_metric_decides_is_known_exactly(callbacks, run):
    store, planned = walk(compose(*callbacks), run), forecast_checkpoints(asked(callbacks, run), run)
    assert planned.written == (len(store.written),) * 2
    assert planned.written_bytes == (sum(store.written),) * 2
    assert planned.kept == (len(store.held),) * 2
    assert planned.kept_bytes == (store.bytes,) * 2
    assert store.peak <= planned.peak_bytes


SHORT = Run(end=TrainingIteration(update=35), updates_per_epoch=7, samples_per_epoch=14, effective_batch_size=2)


def saver(name, interval, **asked):
    save = SaveCheckpoint(retention=FrozenDict({name: 1}), **asked)
    return when(EveryNUpdates(interval))(lambda state, event: (state, (save,)))


def test_the_newest_to_go_on_from_may_need_two_who_seldom_meet():
    """Weights are asked for at one interval and the optimizer at another: only together they make a resumable one."""
    callbacks = [saver("weights", 3, optimizer=False), saver("optimizer", 4, weights=False)]
    store, planned = walk(compose(*callbacks), SHORT), forecast_checkpoints(asked(callbacks, SHORT), SHORT)
    assert [manifest.iteration.update for manifest, _ in store.held.values()] == [24, 32, 33]
    assert (planned.kept, planned.kept_bytes) == ((3, 3), (store.bytes,) * 2)


@st.composite
def measuring(draw):
    """A callback that logs a metric which goes up and down."""
    values = draw(st.lists(st.floats(0, 1), min_size=1, max_size=20))

    def measure(state, event):
        return log(state, event, {"val/accuracy": values[state.iteration.update % len(values)]})

    return on(AfterUpdate, AfterEpoch, AfterTraining)(measure)


def promising(inner):
    """Return a saver that asks only where a metric is large."""

    def is_large(state, event):
        measured = state.metrics.get("val/accuracy")
        return measured is not None and measured.value > 0.5

    return callback("promising", consumes=("val/accuracy",))(when(is_large)(inner))


def test_a_metric_may_make_one_resumable_together_with_what_is_certain():
    """Weights where a metric says so and the optimizer at an interval: three checkpoints can stay of the two."""
    measure = on(AfterUpdate)(lambda state, event: log(state, event, {"val/accuracy": 1.0}))
    callbacks = [measure, promising(saver("weights", 3, optimizer=False)), saver("optimizer", 4, weights=False)]
    store, planned = walk(compose(*callbacks), SHORT), forecast_checkpoints(asked(callbacks, SHORT), SHORT)
    assert [manifest.iteration.update for manifest, _ in store.held.values()] == [24, 32, 33]
    assert planned.kept == (1, 3)
    assert planned.kept_bytes.at_least < store.bytes <= planned.kept_bytes.at_most


@st.composite
def watching(draw):
    """The callback that saves the best."""
    tolerances, at_end = draw(st.sampled_from(((), (1,), (1, 2)))), draw(st.booleans())
    return BestCheckpointCallback(metric_key="val/accuracy", at_end=at_end, tolerances=tolerances, **draw(intervals))


@given(savers(), measuring(), st.one_of(watching(), of_a_user("promising").map(promising)), run_lengths(max_epochs=4))
@settings(max_examples=100)
def test_what_a_metric_decides_is_bounded(callbacks, measure, decides, run):
    callbacks = [measure, *callbacks, decides]
    store, planned = walk(compose(*callbacks), run), forecast_checkpoints(asked(callbacks, run), run)
    for bounds, real in ((planned.written, len(store.written)), (planned.written_bytes, sum(store.written)),
                         (planned.kept, len(store.held)), (planned.kept_bytes, store.bytes)):  # fmt: skip
        assert bounds.at_least <= real <= bounds.at_most
    assert store.peak <= planned.peak_bytes
