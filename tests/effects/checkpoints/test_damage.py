"""Flipped, cut, grown, zeroed, exchanged, replaced: no damage of a checkpoint is ever loaded as if it were whole."""

import json
import logging
import os
import shutil
import socket
from itertools import chain

import pytest
import torch

from noether import AfterUpdate, SaveCheckpoint, TrainingIteration, TrainState
from noether.core.state import Measured
from noether.effects import CheckpointError, CheckpointStore
from noether.testing import same

PARTS = ["weights.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"]
FILES = [*PARTS, "MANIFEST.json"]
POINTERS = ["latest", "best"]
OLDEST, OLDER, NEWEST = TAGS = ["E0_U1_S4", "E0_U2_S8", "E0_U3_S12"]
LEAST = 200
"""Cases for each file: seven files, so at least 1,400 flips, cuts and the like."""


def state_after(update):
    """Return a state of which every file differs from that of another update."""
    weight = torch.full((2, 2), float(update))
    return TrainState(
        iteration=TrainingIteration(update=update, sample=4 * update),
        previous=TrainingIteration(update=update - 1, sample=4 * update - 4),
        params={
            "weight": weight,
            "conv": torch.full((1, 2, 2, 2), -1.0 * update).to(memory_format=torch.channels_last),
        },
        buffers={"mean": weight[0]},
        opt_state={"state": {"weight": {"step": weight[0, 0], "exp_avg": weight / 2, "exp_avg_sq": weight / 3}}},
        metrics={"loss/val/total": Measured(1 / update, TrainingIteration(update=update))},
        callback_states={"ema": {"params": {"weight": weight / 4}}, "best": {"value": float("inf"), "at": (1, update)}},
    )


STATES = dict(zip(TAGS, map(state_after, (1, 2, 3)), strict=True))


def opened(folder):
    return CheckpointStore(folder, "run")


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of three segments, and two pointers."""
    made = tmp_path / "checkpoints"
    for state in STATES.values():
        pointers = ("best", "latest") if state is STATES[OLDEST] else ("latest",)
        opened(made).save(SaveCheckpoint(pointers=pointers), state, AfterUpdate(samples=4))
    return made


@pytest.fixture
def store(folder):
    """Reads them anew whenever it is asked."""
    return opened(folder)


def of_format_1(folder):
    """Turn what is there into what the first format was: manifests without a hash, pointers that are a tag."""
    for tag in TAGS:
        path = folder / tag / "MANIFEST.json"
        content = json.loads(path.read_text()) | {"format": 1}
        for name in ("log_lines", "log_lines_lost", "sha256"):
            del content[name]
        path.write_text(json.dumps(content, indent=1))
    for pointer in POINTERS:
        path = folder / pointer
        path.write_text(path.read_text().split()[0])
    return folder


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def zeroed(content, start, end):
    return content[:start] + bytes(len(content[start:end])) + content[end:]


def damages(content):
    """Return every content that differs from `content` by one of the accidents of disks and of copies."""
    size = len(content)
    # An odd step, so that every bit of a byte has its turn; lengths of files are no multiples of it.
    flips = (flipped(content, bit) for bit in chain(range(16), range(0, 8 * size, 8 * size // 250 | 1)))
    cuts = (content[:length] for length in {*range(min(size, 9)), *range(0, size, size // 60 + 1), size - 1})
    grown = (content + more for more in (b"\0", b"\n", b" ", b"\xff" * 8, bytes(512), content))
    zeros = (zeroed(content, start, start + 64) for start in range(0, size, 64))
    halves = (zeroed(content, 0, size), zeroed(content, size // 2, size), zeroed(content, 0, size // 2))
    moved = (content[1:] + content[:1], content[::-1], content[size // 2 :] + content[: size // 2])
    return {*flips, *cuts, *grown, *zeros, *halves, *moved} - {content}


def refused(store, name):
    """Return why a checkpoint cannot be loaded, or None if it could; what is loaded is what was saved, or it fails."""
    try:
        manifest = store.find(name)
        state = store.load(manifest)
    except CheckpointError as error:
        return str(error)
    assert same(state, STATES[manifest.tag])
    assert manifest.tag == {"latest": NEWEST, "best": OLDEST}.get(name, name)
    return None


def recovered(store, caplog):
    """Return the tag of the checkpoint from which a run goes on, in the very state that was saved, and the warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        state, manifest = store.recover()
    assert same(state, STATES[manifest.tag])
    return manifest.tag, [record.getMessage() for record in caplog.records]


def passes_over(store, path, caplog):
    """Assert that the newest checkpoint is refused for `path`, told of, and the next older one taken in its place."""
    assert str(path) in refused(store, NEWEST)
    taken, (warning,) = recovered(store, caplog)
    assert taken == OLDER
    assert str(path) in warning


def test_what_is_not_damaged_is_loaded(folder, store, caplog):
    assert [refused(store, name) for name in (*TAGS, *POINTERS)] == [None] * 5
    assert recovered(store, caplog) == (NEWEST, [])
    of_format_1(folder)
    assert recovered(store, caplog) == (NEWEST, [])
    assert [refused(store, name) for name in (*TAGS, *POINTERS)] == [None] * 5


@pytest.mark.parametrize("name", FILES)
def test_no_flip_and_no_cut_of_a_file_loads_silently(folder, store, caplog, name):
    path = folder / NEWEST / name
    cases = damages(path.read_bytes())
    assert len(cases) >= LEAST
    for content in cases:
        path.write_bytes(content)
        passes_over(store, path, caplog)


@pytest.mark.parametrize("name", POINTERS)
def test_no_flip_and_no_cut_of_a_pointer_loads_silently(folder, store, caplog, name):
    path = folder / name
    cases = damages(path.read_bytes())
    assert len(cases) >= LEAST
    for content in cases:
        path.write_bytes(content)
        assert str(path) in refused(store, name)
    assert recovered(store, caplog)[0] == NEWEST  # which is newest, the manifests say


@pytest.mark.parametrize("name", ["MANIFEST.json", "latest"])
def test_no_bit_of_what_says_what_is_where_can_flip(folder, store, name):
    path = folder / name if name == "latest" else folder / NEWEST / name
    content = path.read_bytes()
    for tag in (OLDEST, OLDER):  # alone, it is looked for in a third of the time
        shutil.rmtree(folder / tag)
    for bit in range(8 * len(content)):
        path.write_bytes(flipped(content, bit))
        assert str(path) in refused(store, "latest")


@pytest.mark.parametrize("name", PARTS)
def test_the_first_format_tells_damage_of_its_files(folder, store, caplog, name):
    path = of_format_1(folder) / NEWEST / name
    cases = sorted(damages(path.read_bytes()))[::5]
    assert len(cases) >= LEAST / 5
    for content in cases:
        path.write_bytes(content)
        passes_over(store, path, caplog)


@pytest.mark.parametrize(("tag", "name"), [(NEWEST, "MANIFEST.json"), ("", "latest"), ("", "best")])
def test_the_first_format_has_no_hash_of_its_own_and_still_loads_nothing_else(folder, store, caplog, tag, name):
    # A flip in the name of its run or its event cannot be seen; every one that would load anything else can.
    path = of_format_1(folder) / tag / name
    cases = damages(path.read_bytes())
    refusals = 0
    for content in cases:
        path.write_bytes(content)
        why = refused(store, tag or name)
        assert why is None or str(folder / (tag or name)) in why
        refusals += why is not None
        recovered(store, caplog)
    assert refusals > 0.8 * len(cases)


def test_a_manifest_that_says_that_it_is_older_than_it_is(folder, store, caplog):
    # Two bits that make a 1 of the 2 must not take the hash out of force.
    path = folder / NEWEST / "MANIFEST.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1').replace('"segment": 3', '"segment": 2'))
    passes_over(store, path, caplog)


def exchange(one, other):
    aside = one.with_name(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("name", FILES)
def test_files_of_two_checkpoints_exchanged(folder, store, caplog, name):
    paths = [folder / tag / name for tag in (OLDER, NEWEST)]
    exchange(*paths)
    taken, warnings = recovered(store, caplog)
    assert taken == OLDEST
    for path, tag in zip(paths, (OLDER, NEWEST), strict=True):
        assert str(path) in refused(store, tag)
        assert sum(str(path) in warning for warning in warnings) == 1


@pytest.mark.parametrize("name", FILES)
def test_one_file_of_another_checkpoint(folder, store, caplog, name):
    shutil.copy(folder / OLDEST / name, folder / NEWEST / name)
    passes_over(store, folder / NEWEST / name, caplog)


def test_whole_checkpoints_under_the_names_of_each_other(folder, store, caplog):
    exchange(folder / OLDER, folder / NEWEST)
    for tag in (OLDER, NEWEST):
        assert str(folder / tag / "MANIFEST.json") in refused(store, tag)
    taken, warnings = recovered(store, caplog)
    assert (taken, len(warnings)) == (OLDEST, 2)
    assert f"is the manifest of {NEWEST}" in warnings[0] + warnings[1]


def test_a_checkpoint_in_the_place_of_another(folder, store, caplog):
    shutil.rmtree(folder / NEWEST)
    shutil.copytree(folder / OLDEST, folder / NEWEST)
    passes_over(store, folder / NEWEST / "MANIFEST.json", caplog)


def test_a_checkpoint_under_a_name_of_its_own_is_not_the_one_that_the_pointer_was_set_to(folder, store, caplog):
    (folder / NEWEST).rename(folder / "E0_U4_S16")
    assert str(folder / "latest") in refused(store, "latest")
    assert recovered(store, caplog)[0] == OLDER
    # Nor is another checkpoint that has its name, and is whole: the same update of another run.
    other = folder.with_name("other")
    CheckpointStore(other, "other").save(SaveCheckpoint(), STATES[NEWEST], AfterUpdate(samples=4))
    shutil.copytree(other / NEWEST, folder / NEWEST)
    assert f"{folder / 'latest'} is damaged: {NEWEST} is not the checkpoint" in refused(store, "latest")


def test_pointers_exchanged_or_copied(folder):
    # A pointer does not know its own name: exchanged, each leads to what the other named, whole.
    exchange(folder / "latest", folder / "best")
    assert [opened(folder).find(name).tag for name in POINTERS] == [OLDEST, NEWEST]


def to_socket(path):
    here = os.open(path.parent, os.O_RDONLY)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def to_device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        path.symlink_to("/dev/zero")


def to_copy(path):
    shutil.copy(path.with_name(".aside"), path.with_name(".copy"))
    path.symlink_to(".copy")


IN_ITS_PLACE = {
    "nothing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": to_socket,
    "a device": to_device,
    "a link to its content": to_copy,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to the device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
@pytest.mark.parametrize("name", FILES)
def test_something_else_in_the_place_of_a_file(folder, store, caplog, name, what):
    # None of these may be waited for, as a pipe would be, or read for ever.
    path = folder / NEWEST / name
    path.rename(path.with_name(".aside"))
    IN_ITS_PLACE[what](path)
    passes_over(store, path, caplog)


@pytest.mark.parametrize("what", [what for what in IN_ITS_PLACE if what != "a directory"])
def test_something_else_in_the_place_of_a_pointer(folder, store, caplog, what):
    path = folder / "latest"
    path.rename(path.with_name(".aside"))
    IN_ITS_PLACE[what](path)
    assert "latest" in refused(store, "latest")
    assert recovered(store, caplog)[0] == NEWEST


@pytest.mark.parametrize("what", ["a pipe", "a device", "a link to itself", "a link to nothing"])
def test_something_else_in_the_place_of_a_checkpoint(folder, store, caplog, what):
    path = folder / NEWEST
    path.rename(path.with_name(".aside"))
    IN_ITS_PLACE[what](path)
    passes_over(store, path, caplog)


def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(folder, store, caplog):
    (folder / NEWEST).rename(folder.with_name("elsewhere"))
    (folder / NEWEST).symlink_to(folder.with_name("elsewhere"))
    passes_over(store, folder / NEWEST, caplog)


@pytest.mark.parametrize("what", ["a file", "a pipe"])
def test_something_else_in_the_place_of_all_checkpoints(folder, what):
    shutil.rmtree(folder)
    folder.touch() if what == "a file" else os.mkfifo(folder)
    with pytest.raises(CheckpointError, match=f"^{folder} cannot be read: Not a directory"):
        opened(folder)


def damage_in_turn(folder, number):
    """Damage each checkpoint in another way; return the files and what is said of them."""
    ways = [
        ("weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "its content is not what was"),
        ("MANIFEST.json", lambda path: path.write_bytes(flipped(path.read_bytes(), 77)), "is damaged: "),
        ("state.json", lambda path: path.unlink(), "is missing"),
        ("MANIFEST.json", lambda path: path.unlink(), "is missing, beside "),
        ("optimizer.safetensors", lambda path: path.write_bytes(bytes(path.stat().st_size)), "its content is not what"),
    ]
    said = {}
    for shift, tag in enumerate(TAGS):
        name, damage, why = ways[(number + shift) % len(ways)]
        damage(folder / tag / name)
        said[folder / tag / name] = why
    return said


@pytest.mark.parametrize("number", range(5))
def test_when_all_are_damaged_one_error_says_why_of_each_and_nothing_begins_afresh(folder, number):
    said = damage_in_turn(folder, number)
    with pytest.raises(CheckpointError) as error:
        opened(folder).recover()
    first, *reasons = str(error.value).splitlines()
    assert first == f"the run cannot resume from any of the 3 checkpoints in {folder}:"
    assert len(reasons) == 3
    for path, why in said.items():
        assert sum(reason.startswith(f"  {path} ") and why in reason for reason in reasons) == 1, (path, reasons)


def test_nothing_was_ever_saved_only_where_nothing_is(tmp_path):
    assert opened(tmp_path / "none").recover() is None
    (tmp_path / "empty").mkdir()
    assert opened(tmp_path / "empty").recover() is None
