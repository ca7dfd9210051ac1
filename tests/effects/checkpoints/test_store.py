"""The checkpoint store: states are saved and loaded bit for bit, and retention never removes a kept checkpoint."""

import contextlib
import errno
import json
import os
import resource
import shutil
import stat

import pytest
import torch
from faults import Faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from noether import (
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
    SaveCheckpoint,
    TrainingIteration,
    TrainState,
)
from noether.core.state import Measured
from noether.core.tensors.tree import freeze
from noether.effects import CheckpointError, CheckpointStore, open_run
from noether.effects.checkpoints.listing import UnsavableError
from noether.effects.checkpoints.manifest import Manifest, Part
from noether.effects.checkpoints.retention import select_prunable
from noether.effects.disk.calls import Disk, fsync
from noether.testing import same

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

UPDATE = AfterUpdate(samples=4)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def open_store(folder):
    """Return the store as a new process opens it: with a new segment."""
    return CheckpointStore(folder, "run")


@pytest.fixture
def store(folder):
    return open_store(folder)


def state_at(update, epoch=0, **fields):
    return TrainState(
        iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update),
        params={"body.weight": torch.full((2,), float(update)), "head.weight": torch.ones(1)},
        buffers={"body.mean": torch.zeros(2)},
        **fields,
    )


def tags(store):
    return [manifest.tag for manifest in store.manifests()]


FULL = TrainState(
    iteration=TrainingIteration(epoch=1, update=7, sample=28),
    previous=TrainingIteration(epoch=1, update=6, sample=24),
    params={"b": torch.tensor([1.0, float("nan")]), "a": torch.tensor(2.0, dtype=torch.bfloat16)},
    buffers={"count": torch.tensor(3), "mask": torch.tensor([True, False]), "none": torch.zeros(0, 3)},
    opt_state={"state": {"b": {"step": torch.tensor(7.0), "betas": (0.9, 0.99)}}, "groups": {"default": {}}},
    hyperparams={"lr_scale": 0.5},
    metrics={
        "val/x": Measured(float("inf"), TrainingIteration(update=6)),
        "y": Measured(torch.tensor(1), TrainingIteration()),
    },
    callback_states={"best": {"value": None, "$at": ("E1", 2)}, "ema": {"params": {"b": torch.ones(2)}}},
    stop="plateau",
    ended=True,
    seed=3,
)


def test_round_trip_keeps_a_state(store):
    store.save(SaveCheckpoint(), FULL, UPDATE)
    loaded = store.load(store.find("E1_U7_S28"))
    assert same(loaded, FULL)
    assert [list(loaded.params), list(loaded.buffers)] == [["b", "a"], ["count", "mask", "none"]]


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]


@settings(UNTIMED, max_examples=50)
@given(
    specs=st.dictionaries(
        st.text("abc.$_0", min_size=1, max_size=6),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.booleans()),
        max_size=4,
    ),
    memory=st.recursive(
        st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.just(torch.tensor([2.0, -0.0]))),
        lambda inner: st.one_of(
            st.lists(inner, max_size=2).map(tuple), st.dictionaries(st.sampled_from(["a", "a.b", "$x", ""]), inner)
        ),
        max_leaves=6,
    ),
)
def test_round_trip_keeps_any_tensors_and_memory(tmp_path_factory, specs, memory):
    params = {}
    for name, (dtype, shape, turned) in specs.items():
        tensor = (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
        params[name] = tensor.T if turned and tensor.ndim == 2 else tensor
    state = TrainState(params=params, opt_state={"state": {"x": freeze(memory)}}, callback_states={"m": freeze(memory)})
    store = CheckpointStore(tmp_path_factory.mktemp("store"), "run")
    store.save(SaveCheckpoint(tag="x"), state, UPDATE)
    assert same(store.load(store.find("x")), state)


def test_equal_states_give_equal_files(tmp_path):
    for name in ("one", "two"):
        CheckpointStore(tmp_path / name, "run").save(SaveCheckpoint(), FULL, UPDATE)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*/*")} for name in ("one", "two"))
    assert one == two
    assert set(one) == {
        "MANIFEST.json",
        "weights.safetensors",
        "optimizer.safetensors",
        "state.json",
        "state.safetensors",
    }


def test_round_trip_keeps_tied_weights_and_views(store, folder):
    storage = torch.arange(10.0)
    state = state_at(1).replace(
        params={"a": storage, "b": storage, "tail": storage[6:], "turned": storage.view(2, 5).T}
    )
    store.save(SaveCheckpoint(), state, UPDATE)
    assert same(store.load(store.find("E0_U1_S4")).params, state.params)
    assert (folder / "E0_U1_S4/weights.safetensors").stat().st_size < 2000


def test_a_module_with_tied_weights_is_restored(tmp_path):
    def make_model():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = make_model()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with open_run(tmp_path) as directory:
        directory.interpreter([SaveCheckpoint()], TrainState.from_module(model).advance(samples=1), UPDATE)
    fresh = make_model()
    open_run(tmp_path).resume().into_module(fresh)
    assert torch.equal(fresh[1].weight, model[0].weight)
    assert fresh[1].weight is fresh[0].weight


def test_state_json_is_strict_json(store, folder):
    store.save(SaveCheckpoint(), FULL, UPDATE)
    text = (folder / "E1_U7_S28/state.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["val/x"] == {
        "$tuple": [{"$number": "Infinity"}, "E0_U6_S0"]
    }


@pytest.mark.parametrize(
    ("effect", "files", "resumable"),
    [
        (SaveCheckpoint(), {"weights.safetensors", "state.json"}, True),
        (SaveCheckpoint(optimizer=False), {"weights.safetensors"}, False),
        (SaveCheckpoint(weights=False), {"state.json"}, False),
        (SaveCheckpoint(models=("head",)), {"weights.safetensors", "state.json"}, False),
    ],
)
def test_checkpoint_has_the_requested_files_and_knows_if_it_is_resumable(store, effect, files, resumable, folder):
    store.save(effect, state_at(1), UPDATE)
    (manifest,) = store.manifests()
    assert set(manifest.parts) == files
    assert {path.name for path in (folder / manifest.tag).iterdir()} == {*files, "MANIFEST.json"}
    assert manifest.resumable == resumable
    assert (store.newest() == manifest) == resumable


def test_model_names_limit_the_saved_weights(store):
    store.save(SaveCheckpoint(models=("body",)), state_at(1), UPDATE)
    loaded = store.load(store.find("E0_U1_S4"))
    assert (set(loaded.params), set(loaded.buffers)) == ({"body.weight"}, {"body.mean"})
    with pytest.raises(CheckpointError) as error:
        store.save(SaveCheckpoint(models=("bod",)), state_at(2), UPDATE)
    assert str(error.value) == "model_names: no weights below bod; there are: body.weight, head.weight"
    assert tags(store) == ["E0_U1_S4"]


def test_a_checkpoint_is_never_replaced(store, folder):
    store.save(SaveCheckpoint(pointers=("latest",)), state_at(1), UPDATE)
    before = {path: path.read_bytes() for path in (folder / "E0_U1_S4").iterdir()}
    other = state_at(1).replace(params={"body.weight": torch.zeros(2)})
    open_store(folder).save(SaveCheckpoint(pointers=("latest",)), other, UPDATE)
    open_store(folder).save(SaveCheckpoint(pointers=("latest",)), other, UPDATE)
    assert {path: path.read_bytes() for path in before} == before
    assert tags(store) == ["E0_U1_S4", "E0_U1_S4.2", "E0_U1_S4.3"]
    assert store.pointers() == {"latest": "E0_U1_S4.3"}
    assert [manifest.segment for manifest in store.manifests()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("first", "second", "saved"),
    [
        (SaveCheckpoint(), SaveCheckpoint(), 1),
        (SaveCheckpoint(), SaveCheckpoint(optimizer=False), 1),
        (SaveCheckpoint(optimizer=False), SaveCheckpoint(), 2),
        # A checkpoint of a part of the model does not satisfy a request for the whole model.
        (SaveCheckpoint(models=("head",)), SaveCheckpoint(), 2),
        (SaveCheckpoint(), SaveCheckpoint(models=("head",)), 2),
    ],
)
def test_one_event_does_not_save_the_same_content_twice(store, first, second, saved):
    store.save(first, state_at(1), UPDATE)
    store.save(second, state_at(1), UPDATE)
    assert len(tags(store)) == saved


def test_the_end_of_training_moves_pointers_to_what_the_epoch_saved(store):
    store.save(SaveCheckpoint(pointers=("latest",)), state_at(1, epoch=1), AfterEpoch())
    assert not store.load(store.newest()).ended
    store.save(SaveCheckpoint(pointers=("last",)), state_at(1, epoch=1, ended=True), AfterTraining())
    assert tags(store) == ["E1_U1_S4"]
    assert store.pointers() == {"latest": "E1_U1_S4", "last": "E1_U1_S4"}
    assert store.load(store.newest()).ended


def test_an_end_that_changed_the_memory_is_dispatched_again_on_resume(store):
    store.save(SaveCheckpoint(), state_at(1, epoch=1), AfterEpoch())
    ended = state_at(1, epoch=1, ended=True).remember("best", 0.9)
    store.save(SaveCheckpoint(pointers=("last",)), ended, AfterTraining())
    assert (tags(store), store.pointers()) == (["E1_U1_S4"], {"last": "E1_U1_S4"})
    assert not store.load(store.newest()).ended


def test_an_end_that_changed_the_weights_is_saved_again(store):
    store.save(SaveCheckpoint(), state_at(1, epoch=1), AfterEpoch())
    averaged = state_at(1, epoch=1, ended=True).replace(params=state_at(2).params)
    store.save(SaveCheckpoint(pointers=("last",)), averaged, AfterTraining())
    assert tags(store) == ["E1_U1_S4", "E1_U1_S4.2"]
    assert same(store.load(store.find("last")), averaged)


def test_another_event_at_the_same_iteration_saves_again(store):
    store.save(SaveCheckpoint(), state_at(0), BeforeTraining())
    store.save(SaveCheckpoint(), state_at(0).remember("measured", 1), AtEval())
    assert tags(store) == ["E0_U0_S0", "E0_U0_S0.2"]


def test_an_interruption_does_not_save_an_unchanged_state_again(store):
    store.save(SaveCheckpoint(), state_at(1, epoch=1), AfterEpoch())
    store.save(SaveCheckpoint(pointers=("latest",)), state_at(1, epoch=1), UPDATE)
    assert (tags(store), store.pointers()) == (["E1_U1_S4"], {"latest": "E1_U1_S4"})
    store.save(SaveCheckpoint(pointers=("latest",)), state_at(1, epoch=1).remember("m", 1), UPDATE)
    assert (tags(store), store.pointers()) == (["E1_U1_S4", "E1_U1_S4.2"], {"latest": "E1_U1_S4.2"})


def test_newest_is_of_the_newest_segment(store, folder):
    store.save(SaveCheckpoint(), state_at(9), UPDATE)
    second = open_store(folder)
    second.save(SaveCheckpoint(), state_at(2), UPDATE)
    second.save(SaveCheckpoint(optimizer=False), state_at(3), UPDATE)
    assert store.newest().tag == "E0_U2_S8"


def test_newest_compares_numbers_not_text(store, folder):
    for update in (9, 10, 100):
        store.save(SaveCheckpoint(), state_at(update), UPDATE)
    for _ in range(11):
        store = open_store(folder)
        store.save(SaveCheckpoint(), state_at(100), UPDATE)
    assert store.newest().tag == "E0_U100_S400.12"


def test_resumed_segment_names_its_parent_and_keeps_it_until_another_is_resumable(store, folder):
    store.save(SaveCheckpoint(retention={"c": 1}), state_at(1), UPDATE)
    second = open_store(folder)
    second.resume(second.newest())
    second.save(SaveCheckpoint(optimizer=False, retention={"c": 1}), state_at(2), UPDATE)
    assert tags(store) == ["E0_U1_S4", "E0_U2_S8"]
    second.save(SaveCheckpoint(retention={"c": 1}), state_at(3), UPDATE)
    assert tags(store) == ["E0_U3_S12"]  # as in a run that was not interrupted
    assert store.find("E0_U3_S12").parent == "E0_U1_S4"


def test_a_store_holds_the_iterations_of_its_own_resumable_checkpoints(store, folder):
    assert not store.holds(state_at(1))
    store.save(SaveCheckpoint(optimizer=False), state_at(1), UPDATE)
    assert not store.holds(state_at(1))
    store.save(SaveCheckpoint(tag="whole"), state_at(1), UPDATE)
    assert (store.holds(state_at(1)), store.holds(state_at(1, epoch=1))) == (True, False)
    second = open_store(folder)
    assert not second.holds(state_at(1))
    second.resume(second.newest())
    assert second.holds(state_at(1))


def test_a_pointer_keeps_its_checkpoint(store):
    store.save(SaveCheckpoint(pointers=("best",), retention={"b": 0}), state_at(1), UPDATE)
    store.save(SaveCheckpoint(retention={"c": 1}), state_at(2), UPDATE)
    store.save(SaveCheckpoint(retention={"c": 1}), state_at(3), UPDATE)
    assert tags(store) == ["E0_U1_S4", "E0_U3_S12"]
    assert store.find("best") == store.find("E0_U1_S4")
    store.save(SaveCheckpoint(pointers=("best",), retention={"b": 0}), state_at(4), UPDATE)
    assert tags(store) == ["E0_U3_S12", "E0_U4_S16"]


def test_error_for_an_unknown_name_lists_the_known_ones(store, folder):
    with pytest.raises(CheckpointError) as error:
        store.find("latest")
    assert str(error.value) == f"no checkpoint 'latest' in {folder}; there are: none"
    store.save(SaveCheckpoint(pointers=("latest",)), state_at(1), UPDATE)
    with pytest.raises(CheckpointError) as error:
        store.find("lates")
    assert str(error.value).endswith("; there are: latest, E0_U1_S4; did you mean 'latest'?")


@pytest.mark.parametrize(
    "effect", [SaveCheckpoint(tag="a/b"), SaveCheckpoint(tag=".x"), SaveCheckpoint(pointers=("a b",))]
)
def test_invalid_names_are_refused(store, effect):
    with pytest.raises(CheckpointError, match=r"is not a valid name: use up to 200 letters, digits and '_\.=%-'"):
        store.save(effect, state_at(1), UPDATE)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_error_names_the_damaged_file(store, name, damage, folder):
    store.save(SaveCheckpoint(), FULL, UPDATE)
    path = folder / "E1_U7_S28" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError) as error:
        store.load(store.find("E1_U7_S28"))
    reason = "is missing" if damage == "missing" else "is damaged: its content is not what was written"
    assert str(error.value) == f"{path} {reason}"


@pytest.mark.parametrize("content", ["", "{}", '{"tag": 3}', "\x00"])
def test_error_names_the_damaged_manifest(store, content, folder):
    store.save(SaveCheckpoint(), state_at(1), UPDATE)
    path = folder / "E0_U1_S4/MANIFEST.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=f"^{path} is damaged: "):
        store.find("E0_U1_S4")


def test_partly_written_checkpoint_of_a_crash_is_ignored(store, folder):
    store.save(SaveCheckpoint(), state_at(1), UPDATE)
    complete = folder / "E0_U1_S4"
    partial = complete.with_name(".tmp-E0_U2_S8")
    partial.mkdir()
    for path in complete.iterdir():
        (partial / path.name).write_bytes(path.read_bytes()[:5])
    (complete.parent / ".tmp-latest").write_text("E0_U9")
    later = open_store(folder)
    assert (tags(later), later.pointers()) == (["E0_U1_S4"], {})
    later.save(SaveCheckpoint(pointers=("latest",)), state_at(2), UPDATE)
    assert same(later.load(later.find("latest")).params, state_at(2).params)
    assert not partial.exists()


def test_failed_save_adds_no_checkpoint_and_moves_no_pointer(store):
    store.save(SaveCheckpoint(pointers=("latest",)), state_at(1), UPDATE)
    broken = state_at(2).replace(opt_state={"state": {1, 2}})
    with pytest.raises(UnsavableError, match="opt_state: state is a set, which cannot be saved"):
        store.save(SaveCheckpoint(pointers=("latest",)), broken, UPDATE)
    assert (tags(store), store.pointers()) == (["E0_U1_S4"], {"latest": "E0_U1_S4"})


def test_round_trip_keeps_a_manifest(store, folder):
    store.save(SaveCheckpoint(models=("head",), retention={"a": None, "b": 2}), state_at(3, epoch=1), AfterEpoch())
    text = (folder / "E1_U3_S12/MANIFEST.json").read_text()
    manifest = Manifest.loads(text)
    assert (manifest.iteration, manifest.event, manifest.models) == (
        TrainingIteration(1, 3, 12),
        "AfterEpoch",
        ("head",),
    )
    assert manifest.retention == {"a": None, "b": 2}
    assert manifest.dumps() == text
    assert json.loads(text)["format"] == 3


RESUMABLE = dict.fromkeys(["weights.safetensors", "state.json"], Part(size_bytes=0, sha256=""))
OWNERS = st.sampled_from(["checkpoint", "best", "ema"])
KEEPS = st.sampled_from([None, 0, 1, 2, 3])


@st.composite
def histories(draw):
    """Draw all checkpoints of a run oldest first, the pointers, and the tags known to be intact."""
    manifests = []
    segment = update = 1
    for number in range(draw(st.integers(0, 8))):
        if draw(st.booleans()):
            segment, update = segment + draw(st.integers(0, 1)), update + draw(st.integers(0, 3))
        manifests.append(
            Manifest(
                tag=f"T.{number + 2}", number=number + 2, run_id="r", segment=segment, parent=None,
                event="AfterUpdate", parts=draw(st.sampled_from([{}, RESUMABLE])),
                iteration=TrainingIteration(update=update),
                retention=draw(st.dictionaries(OWNERS, KEEPS, max_size=2)),
            )
        )  # fmt: skip
    names = st.sampled_from([manifest.tag for manifest in manifests] or ["gone"])
    pointers = draw(st.dictionaries(st.sampled_from(["latest", "best"]), names))
    intact = draw(st.sets(names))
    return manifests, pointers, intact


@UNTIMED
@given(histories(), st.randoms())
def test_retention_follows_its_rules(history, random):
    manifests, pointers, intact = history
    prunable = select_prunable(random.sample(manifests, len(manifests)), pointers, intact)
    kept = [manifest for manifest in manifests if manifest.tag not in prunable]
    assert prunable == [manifest.tag for manifest in manifests if manifest not in kept]
    resumable = [each.tag for each in manifests if each.resumable]
    while len(resumable) > 1 and intact & set(resumable[1:]):  # drop those older than the newest intact one
        del resumable[0]
    protected = {*pointers.values(), *resumable}
    assert not protected & set(prunable)
    for owner in ("checkpoint", "best", "ema"):
        own = [manifest for manifest in manifests if owner in manifest.retention]
        moments = list(dict.fromkeys(manifest.iteration for manifest in reversed(own)))
        for manifest in own:
            keep = manifest.retention[owner]
            assert manifest in kept or (keep is not None and moments.index(manifest.iteration) >= keep)
    for manifest in kept:
        younger = manifests[manifests.index(manifest) :]
        reasons = [
            keep is None or len({other.iteration for other in younger if owner in other.retention}) <= keep
            for owner, keep in manifest.retention.items()
        ]
        assert any(reasons) or manifest.tag in protected


@UNTIMED
@given(histories())
def test_pruning_again_removes_nothing(history):
    manifests, pointers, intact = history
    prunable = select_prunable(manifests, pointers, intact)
    rest = [manifest for manifest in manifests if manifest.tag not in prunable]
    keeps = {keep for manifest in manifests for keep in manifest.retention.values()}
    if len(keeps) <= 1:  # otherwise an owner changed how many it keeps
        assert select_prunable(rest, pointers, intact) == []
    assert [manifest.tag for manifest in manifests if manifest.tag in prunable] == list(prunable)


def test_save_on_a_full_disk_fails_and_harms_no_other_checkpoint(store):
    store.save(SaveCheckpoint(), state_at(1), UPDATE)
    wide = state_at(2).replace(params={"weight": torch.ones(100_000)})
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))  # limits the size of files of this process
    try:
        with pytest.raises(CheckpointError, match=r"could not be written: .*File too large: '.*/weights.safetensors'"):
            store.save(SaveCheckpoint(), wide, UPDATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert tags(store) == [str(state_at(1).iteration)]
    store.save(SaveCheckpoint(), wide, UPDATE)
    assert same(store.load(store.newest()).params, wide.params)


def test_round_trip_keeps_strides(store):
    conv = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    turned = torch.arange(6.0).reshape(2, 3).t()
    part = torch.arange(10.0)[::2]
    state = state_at(1).replace(params={"conv": conv}, opt_state={"turned": turned, "part": part})
    store.save(SaveCheckpoint(), state, UPDATE)
    loaded = store.load(store.newest())
    assert loaded.params["conv"].stride() == conv.stride() != conv.contiguous().stride()
    assert loaded.opt_state["turned"].stride() == turned.stride()
    assert same((loaded.params, loaded.opt_state), (state.params, state.opt_state))


def test_checkpoint_with_foreign_files_is_not_removed(store, folder, caplog):
    keep = SaveCheckpoint(retention={"c": 1})
    store.save(keep, state_at(1), UPDATE)
    (folder / "E0_U1_S4/notes.txt").write_text("the good one")
    store.save(keep, state_at(2), UPDATE)
    store.save(keep, state_at(3), UPDATE)
    assert (folder / "E0_U1_S4/notes.txt").read_text() == "the good one"
    assert tags(store) == ["E0_U1_S4", "E0_U3_S12"]
    assert "checkpoints that retention would remove stay in" in caplog.text
    assert "E0_U1_S4/notes.txt would be lost" in caplog.text


def test_foreign_files_are_not_removed(store, folder):
    folder.mkdir()
    (folder / "mine").mkdir()
    (folder / "mine/weights.pt").write_text("x")
    (folder / "README").write_text("x")
    for update in (1, 2):
        store.save(SaveCheckpoint(retention={"c": 1}), state_at(update), UPDATE)
    assert {path.name for path in folder.iterdir()} >= {"mine", "README"}
    assert (folder / "mine/weights.pt").exists()


def test_nothing_is_removed_while_a_pointer_is_broken(store, folder, caplog):
    best = SaveCheckpoint(pointers=("best",), retention={"b": 0})
    store.save(best, state_at(1), UPDATE)
    (folder / "best").write_text("E0_U1")
    store.save(SaveCheckpoint(retention={"c": 1}), state_at(2), UPDATE)
    assert tags(store) == ["E0_U1_S4", "E0_U2_S8"]
    assert f"{folder / 'best'} is damaged, or not a pointer" in caplog.text
    store.save(best, state_at(3), UPDATE)  # sets the broken pointer again
    assert tags(store) == ["E0_U2_S8", "E0_U3_S12"]


def test_newest_resumable_checkpoint_known_to_be_intact_stays(store, folder):
    """Saves of weights alone do not remove an older resumable checkpoint while the newer one is not verified."""
    for update in (1, 2):
        store.save(SaveCheckpoint(retention={"c": None}), state_at(update), UPDATE)
    damaged = folder / "E0_U2_S8/weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    later = open_store(folder)
    for update in (3, 4, 5):
        later.save(SaveCheckpoint(optimizer=False, retention={"c": 1}), state_at(update), UPDATE)
    assert "E0_U1_S4" in tags(later)
    assert later.recover()[1].tag == "E0_U1_S4"


def test_commit_that_failed_at_its_last_call_does_not_count(folder):
    faults = Faults()
    store = CheckpointStore(folder, "run", Disk(faults))
    faults.arm()
    store.save(SaveCheckpoint(tag="x"), state_at(1), UPDATE)
    last = len(faults.names) - 2  # the fsync of the directory that contains the name, and its close
    assert faults.names[last] == "fsync"
    faults.arm(last, "EIO once")
    # In an empty directory, so that the calls are those counted above.
    other = CheckpointStore(folder.with_name("other"), "run", Disk(faults))
    with pytest.raises(CheckpointError, match=r"could not be written: .*Input/output error"):
        other.save(SaveCheckpoint(tag="x"), state_at(1), UPDATE)
    assert [manifest.tag for manifest in other.manifests()] == ["x"]
    other.save(SaveCheckpoint(tag="x", pointers=("p",)), state_at(1), UPDATE)
    assert other.pointers() == {"p": "x.2"}


def test_no_file_gets_a_second_fsync_after_a_failed_one(tmp_path):
    """The operating system drops what it could not write, so a second fsync of the file reports success."""
    effect = SaveCheckpoint(pointers=("latest",))

    def record_fsyncs(directory, failing):
        synced, open_files = [], []

        def call(function, *arguments):
            if function is not fsync:
                return function(*arguments)
            status = os.fstat(arguments[0])
            open_files.append(os.dup(arguments[0]))  # so that its inode is not used again
            synced.append((status.st_ino, stat.S_ISREG(status.st_mode)))
            if len(synced) - 1 == failing:
                raise OSError(errno.EIO, "Input/output error")
            return None

        store = CheckpointStore(directory, "run", Disk(call))
        for update in (1, 2, 3):
            with contextlib.suppress(CheckpointError):
                store.save(effect, state_at(update), UPDATE)
        for file in open_files:
            os.close(file)
        return synced

    for failing in range(len(record_fsyncs(tmp_path / "faultless", None)) // 3):
        synced = record_fsyncs(tmp_path / str(failing), failing)
        number, regular = synced[failing]
        assert not regular or synced.count((number, regular)) == 1
    assert failing > 5


@pytest.mark.parametrize("failing", ["x", "latest"])
def test_failed_step_cancels_later_steps(folder, failing):
    def call(function, *arguments):
        if function is os.rename and arguments[1].name == failing:
            raise OSError(errno.EIO, "Input/output error")
        return function(*arguments)

    open_store(folder).save(SaveCheckpoint(pointers=("latest",), retention={"c": 1}), state_at(1), UPDATE)
    store = CheckpointStore(folder, "run", Disk(call))
    with pytest.raises(CheckpointError) as error:
        store.save(SaveCheckpoint(tag="x", pointers=("latest",), retention={"c": 1}), state_at(2), UPDATE)
    messages = {
        "x": f"checkpoint {folder / 'x'} could not be written",
        "latest": f"the pointer {folder / 'latest'} could",
    }
    assert str(error.value).startswith(messages[failing])
    # The pointer did not move without its checkpoint, and the checkpoint that it names stays.
    assert store.pointers() == {"latest": "E0_U1_S4"}
    assert same(store.load(store.find("latest")).params, state_at(1).params)
    assert ("x" in tags(store)) == (failing == "latest")


def test_recovery_fails_if_the_checkpoint_of_a_pointer_was_removed(store, folder):
    """A silent start from the beginning would overwrite the rest of the run."""
    store.save(SaveCheckpoint(pointers=("latest",)), state_at(1), UPDATE)
    shutil.rmtree(folder / "E0_U1_S4")
    with pytest.raises(CheckpointError, match="latest names E0_U1_S4, which does not exist"):
        open_store(folder).recover()


@pytest.mark.parametrize("name", ["MANIFEST.json", "weights.safetensors"])
def test_recovery_fails_if_a_checkpoint_is_not_readable(store, folder, name):
    """It may be intact, for example if another user wrote it; resuming from an older one would lose its progress."""
    for update in (1, 2):
        store.save(SaveCheckpoint(), state_at(update), UPDATE)
    unreadable = folder / "E0_U2_S8" / name

    def call(function, *arguments):
        if function is os.open and arguments[0] == unreadable:
            raise OSError(errno.EACCES, "Permission denied")
        return function(*arguments)

    with pytest.raises(CheckpointError) as error:
        CheckpointStore(folder, "run", Disk(call)).recover()
    assert str(error.value) == f"{unreadable} cannot be read: Permission denied; make it readable, then resume"
