"""The forecast of checkpoints equals a run that is walked save by save."""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples

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
from noether.effects.checkpoints.contents import select_weights
from noether.effects.checkpoints.file_names import STATE, WEIGHTS
from noether.effects.checkpoints.manifest import Manifest, Part
from noether.effects.checkpoints.retention import select_prunable, unite_limits
from noether.effects.checkpoints.reuse import covers, covers_end
from noether.effects.interpreter import merge_effects
from noether.planning.planned_callback import plan_callback
from noether.planning.requests import Probe
from noether.planning.retention_forecast import forecast_checkpoints
from noether.testing.strategies import run_lengths, schedules
from noether.training.configured_callbacks import ConfiguredCallback


def initial_state(device):
    params = {name: torch.zeros(size, device=device) for name, size in (("a.w", 3), ("a.v", 5), ("b.w", 11))}
    return TrainState(params=params, opt_state={"state": {"m": torch.zeros(19, device=device)}})


def size_bytes(state, save):
    weights = select_weights(save, state).values() if save.weights else ()
    rest = tensors((state.opt_state, state.callback_states)) if save.optimizer else ()
    return sum(t.numel() * t.element_size() for t in [*weights, *(tensor for _, tensor in rest)])


@dataclasses.dataclass
class Store:
    """A checkpoint store in memory: applies requests and retention."""

    existing: dict = dataclasses.field(default_factory=dict)
    pointers: dict = dataclasses.field(default_factory=dict)
    written: list = dataclasses.field(default_factory=list)
    peak: int = 0

    def __call__(self, effects, state, event):
        saves = [effect for effect in merge_effects(effects) if isinstance(effect, SaveCheckpoint)]
        for number, save in enumerate(saves, 1):
            tag = self.find(save, state, event) or self.write(save, state, event)
            made, size = self.existing[tag]
            made = dataclasses.replace(made, retention=unite_limits(made.retention, save.retention))
            self.existing[tag] = made, size
            self.pointers.update(dict.fromkeys(save.pointers, tag))
            manifests = [manifest for manifest, _ in self.existing.values()]
            for each in select_prunable(manifests, self.pointers, set(self.existing)):
                if not any(covers(self.existing[each][0], later, state.iteration) for later in saves[number:]):
                    del self.existing[each]

    def find(self, save, state, event):
        """Return the tag of a checkpoint that makes a save after training unnecessary."""
        if not isinstance(event, AfterTraining):
            return None
        saved = {rule: [tag for tag, (each, _) in self.existing.items() if rule(each, save, state.iteration)]
                 for rule in (covers, covers_end)}  # fmt: skip
        return next((tags[-1] for tags in saved.values() if tags), None)

    def write(self, save, state, event):
        files = [name for name, asked in ((WEIGHTS, save.weights), (STATE, save.optimizer)) if asked]
        number, name = 1 + len(self.written), save.tag or str(state.iteration)
        made = Manifest(tag=f"{name}.{number}" if number > 1 else name, run_id="r", segment=1, parent=None,
                        iteration=state.iteration, event=type(event).__name__, number=number, retention={},
                        parts=dict.fromkeys(files, Part(size_bytes=0, sha256="")), weights_of=save.weights_of,
                        models=save.models if save.weights else ())  # fmt: skip
        self.existing[made.tag] = (made, size_bytes(state, save))
        self.written.append(size_bytes(state, save))
        self.peak = max(self.peak, self.bytes)
        return made.tag

    @property
    def bytes(self):
        return sum(size for _, size in self.existing.values())


def walk(reducer, run):
    """Pass all events of a run through the reducer and the store."""
    store, state = Store(), initial_state("cpu")

    def dispatch(state, event):
        after, effects = reducer(state, event)
        store(effects, after, event)
        return after

    state = dispatch(state, BeforeTraining(run=run))
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state = dispatch(state.next_epoch(), AfterEpoch(run=run))
        elif move is Move.END_TRAINING:
            state = dispatch(state.replace(ended=True), AfterTraining(run=run))
        else:
            size = run.iteration_after(state.iteration.update + 1).sample - state.iteration.sample
            state = dispatch(state.advance(samples=size), AfterUpdate(run=run, samples=size))
    return store


def find_requests(callbacks, run):
    memory = compose(*callbacks).init(initial_state("meta"))
    state = initial_state("meta").replace(callback_states=memory)
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
def checkpoint_callbacks(draw, name):
    kinds = [draw(st.booleans()) for _ in range(4)]
    names = ("save_weights", "save_optim", "save_latest_weights", "save_latest_optim")
    given = dict(zip(names, kinds if any(kinds) else [True, *kinds[1:]], strict=True))
    models = draw(st.sampled_from(((), ("a",), ("b",), ("a", "b"))))
    return CheckpointCallback(id=name, keep=draw(keeps), model_names=models, **given, **draw(intervals))


@st.composite
def ema_callbacks(draw, name):
    saves = {key: draw(st.booleans()) for key in ("save_weights", "save_last_weights", "save_latest_weights")}
    paths = draw(st.sampled_from(((), ("a",))))
    keep = draw(keeps) if saves["save_weights"] else None
    return EMACallback(id=name, target_factors=(0.5, 0.25), model_paths=paths, at_end=draw(st.booleans()), keep=keep,
                       **saves, **draw(intervals))  # fmt: skip


@st.composite
def users_callbacks(draw, name, limit=lambda request: request):
    weights, optimizer = draw(st.sampled_from(((True, True), (True, False), (False, True))))
    models, pointers = draw(st.sampled_from(((), ("a",)))), draw(st.sampled_from(((), (name,))))
    save = SaveCheckpoint(weights=weights, optimizer=optimizer, models=models if weights else (), pointers=pointers,
                          retention=FrozenDict({name: draw(keeps)}))  # fmt: skip
    tag = draw(st.sampled_from((None, "{}.mine", "same")))

    def request(state, event):
        return state, (dataclasses.replace(save, tag=tag and tag.format(state.iteration)),)

    request = limit(request)
    if draw(st.booleans()):
        return when(draw(schedules(12)), at_end=draw(st.booleans()))(request)
    kinds = st.sets(st.sampled_from((BeforeTraining, AfterUpdate, AfterEpoch, AfterTraining)), min_size=1)
    return on(*draw(kinds))(request)


@st.composite
def savers(draw):
    kinds = st.lists(st.sampled_from((checkpoint_callbacks, ema_callbacks, users_callbacks)), min_size=1, max_size=3)
    return [draw(kind(f"saver{index}")) for index, kind in enumerate(draw(kinds))]


@given(savers(), run_lengths(max_epochs=4))
@examples(100, quick=30)
def test_without_metrics_the_forecast_is_exact(callbacks, run):
    store, planned = walk(compose(*callbacks), run), forecast_checkpoints(find_requests(callbacks, run), run)
    assert planned.written == (len(store.written),) * 2
    assert planned.written_bytes == (sum(store.written),) * 2
    assert planned.kept == (len(store.existing),) * 2
    assert planned.kept_bytes == (store.bytes,) * 2
    assert store.peak <= planned.peak_bytes


SHORT = Run(end=TrainingIteration(update=35), updates_per_epoch=7, samples_per_epoch=14, effective_batch_size=2)


def saver(name, interval, limit=lambda request: request, **settings):
    save = SaveCheckpoint(retention=FrozenDict({name: 1}), **settings)
    return when(EveryNUpdates(interval))(limit(lambda state, event: (state, (save,))))


def test_the_newest_resumable_checkpoint_may_need_two_callbacks():
    """One callback saves weights, another the optimizer: only together they make a resumable checkpoint."""
    callbacks = [saver("weights", 3, optimizer=False), saver("optimizer", 4, weights=False)]
    store, planned = walk(compose(*callbacks), SHORT), forecast_checkpoints(find_requests(callbacks, SHORT), SHORT)
    assert [manifest.iteration.update for manifest, _ in store.existing.values()] == [24, 32, 33]
    assert (planned.kept, planned.kept_bytes) == ((3, 3), (store.bytes,) * 2)


@st.composite
def metric_callbacks(draw):
    """Callbacks that log a metric which goes up and down."""
    values = draw(st.lists(st.floats(0, 1), min_size=1, max_size=20))

    def measure(state, event):
        return log(state, event, {"val/accuracy": values[state.iteration.update % len(values)]})

    return on(AfterUpdate, AfterEpoch, AfterTraining)(measure)


def only_for_large_metrics(request):
    """Return a callback that saves only where a metric is large."""

    def is_large(state, event):
        measured = state.metrics.get("val/accuracy")
        return measured is not None and measured.value > 0.5

    return callback("promising", consumes=("val/accuracy",))(when(is_large)(request))


def test_a_checkpoint_may_be_resumable_because_of_a_metric():
    """Weights are saved where a metric is large, the optimizer at an interval: three checkpoints can stay."""
    measure = on(AfterUpdate)(lambda state, event: log(state, event, {"val/accuracy": 1.0}))
    callbacks = [
        measure,
        saver("weights", 3, only_for_large_metrics, optimizer=False),
        saver("optimizer", 4, weights=False),
    ]
    store, planned = walk(compose(*callbacks), SHORT), forecast_checkpoints(find_requests(callbacks, SHORT), SHORT)
    assert [manifest.iteration.update for manifest, _ in store.existing.values()] == [24, 32, 33]
    assert planned.kept == (1, 3)
    assert planned.kept_bytes.at_least < store.bytes <= planned.kept_bytes.at_most


@st.composite
def best_checkpoint_callbacks(draw):
    """Callbacks that save the best checkpoint."""
    tolerances, at_end = draw(st.sampled_from(((), (1,), (1, 2)))), draw(st.booleans())
    return BestCheckpointCallback(metric_key="val/accuracy", at_end=at_end, tolerances=tolerances, **draw(intervals))


@given(
    savers(),
    metric_callbacks(),
    st.one_of(best_checkpoint_callbacks(), users_callbacks("promising", only_for_large_metrics)),
    run_lengths(max_epochs=4),
)
@examples(100, quick=30)
def test_with_metrics_the_forecast_bounds_the_run(callbacks, measure, decides, run):
    callbacks = [measure, *callbacks, decides]
    store, planned = walk(compose(*callbacks), run), forecast_checkpoints(find_requests(callbacks, run), run)
    for bounds, real in ((planned.written, len(store.written)), (planned.written_bytes, sum(store.written)),
                         (planned.kept, len(store.existing)), (planned.kept_bytes, store.bytes)):  # fmt: skip
        assert bounds.at_least <= real <= bounds.at_most
    assert store.peak <= planned.peak_bytes
