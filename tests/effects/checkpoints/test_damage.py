"""Damage: no flipped, truncated, extended, zeroed, swapped or replaced file of a checkpoint is loaded silently."""

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
MIN_CASES = 200
"""Fewest cases for each file; for seven files at least 1,400."""


def state_after(update):
    """Return a state whose files all differ from those of other updates."""
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


def open_store(folder):
    return CheckpointStore(folder, "run")


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of three segments, and two pointers."""
    directory = tmp_path / "checkpoints"
    for state in STATES.values():
        pointers = ("best", "latest") if state is STATES[OLDEST] else ("latest",)
        open_store(directory).save(SaveCheckpoint(pointers=pointers), state, AfterUpdate(samples=4))
    return directory


@pytest.fixture
def store(folder):
    """A store; it reads the directory at every call."""
    return open_store(folder)


def convert_to_format_1(folder):
    """Convert the checkpoints to format 1: manifests without a hash, pointers that are only a tag."""
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


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def zero(content, start, end):
    return content[:start] + bytes(len(content[start:end])) + content[end:]


def damages(content):
    """Return `content` with every kind of damage that disks and copies cause."""
    size = len(content)
    # The step is odd, so that it reaches every bit of a byte.
    flips = (flip(content, bit) for bit in chain(range(16), range(0, 8 * size, 8 * size // 250 | 1)))
    cuts = (content[:length] for length in {*range(min(size, 9)), *range(0, size, size // 60 + 1), size - 1})
    grown = (content + more for more in (b"\0", b"\n", b" ", b"\xff" * 8, bytes(512), content))
    zeros = (zero(content, start, start + 64) for start in range(0, size, 64))
    halves = (zero(content, 0, size), zero(content, size // 2, size), zero(content, 0, size // 2))
    moved = (content[1:] + content[:1], content[::-1], content[size // 2 :] + content[: size // 2])
    return {*flips, *cuts, *grown, *zeros, *halves, *moved} - {content}


def load_error(store, name):
    """Return why a checkpoint cannot be loaded, or None; fail if it loads another state than the saved one."""
    try:
        manifest = store.find(name)
        state = store.load(manifest)
    except CheckpointError as error:
        return str(error)
    assert same(state, STATES[manifest.tag])
    assert manifest.tag == {"latest": NEWEST, "best": OLDEST}.get(name, name)
    return None


def recover(store, caplog):
    """Return the tag of the checkpoint from which a run resumes, and the warnings; check that the state is right."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        state, manifest = store.recover()
    assert same(state, STATES[manifest.tag])
    return manifest.tag, [record.getMessage() for record in caplog.records]


def check_skipped(store, path, caplog):
    """Check that the newest checkpoint is refused because of `path`, and the next older one used with a warning."""
    assert str(path) in load_error(store, NEWEST)
    tag, (warning,) = recover(store, caplog)
    assert tag == OLDER
    assert str(path) in warning


def test_intact_checkpoints_load(folder, store, caplog):
    assert [load_error(store, name) for name in (*TAGS, *POINTERS)] == [None] * 5
    assert recover(store, caplog) == (NEWEST, [])
    convert_to_format_1(folder)
    assert recover(store, caplog) == (NEWEST, [])
    assert [load_error(store, name) for name in (*TAGS, *POINTERS)] == [None] * 5


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_refused(folder, store, caplog, name):
    path = folder / NEWEST / name
    cases = damages(path.read_bytes())
    assert len(cases) >= MIN_CASES
    for content in cases:
        path.write_bytes(content)
        check_skipped(store, path, caplog)


@pytest.mark.parametrize("name", POINTERS)
def test_damaged_pointer_is_refused(folder, store, caplog, name):
    path = folder / name
    cases = damages(path.read_bytes())
    assert len(cases) >= MIN_CASES
    for content in cases:
        path.write_bytes(content)
        assert str(path) in load_error(store, name)
    assert recover(store, caplog)[0] == NEWEST  # it does not need the pointers


@pytest.mark.parametrize("name", ["MANIFEST.json", "latest"])
def test_any_flipped_bit_of_manifest_or_pointer_is_detected(folder, store, name):
    path = folder / name if name == "latest" else folder / NEWEST / name
    content = path.read_bytes()
    for tag in (OLDEST, OLDER):  # with one checkpoint left, this takes a third of the time
        shutil.rmtree(folder / tag)
    for bit in range(8 * len(content)):
        path.write_bytes(flip(content, bit))
        assert str(path) in load_error(store, "latest")


@pytest.mark.parametrize("name", PARTS)
def test_format_1_detects_damaged_files(folder, store, caplog, name):
    path = convert_to_format_1(folder) / NEWEST / name
    cases = sorted(damages(path.read_bytes()))[::5]
    assert len(cases) >= MIN_CASES / 5
    for content in cases:
        path.write_bytes(content)
        check_skipped(store, path, caplog)


@pytest.mark.parametrize(("tag", "name"), [(NEWEST, "MANIFEST.json"), ("", "latest"), ("", "best")])
def test_damaged_manifest_of_format_1_loads_no_other_state(folder, store, caplog, tag, name):
    # Format 1 cannot detect a flip in the name of the run or event, but any flip that would load another state.
    path = convert_to_format_1(folder) / tag / name
    cases = damages(path.read_bytes())
    refusals = 0
    for content in cases:
        path.write_bytes(content)
        error = load_error(store, tag or name)
        assert error is None or str(folder / (tag or name)) in error
        refusals += error is not None
        recover(store, caplog)
    assert refusals > 0.8 * len(cases)


def test_manifest_with_a_wrong_older_format_is_refused(folder, store, caplog):
    # A flipped bit turns the 3 into a 1, and must not disable the hash.
    path = folder / NEWEST / "MANIFEST.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 1').replace('"segment": 3', '"segment": 2'))
    check_skipped(store, path, caplog)


def swap(one, other):
    aside = one.with_name(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("name", FILES)
def test_swapped_files_of_two_checkpoints_are_refused(folder, store, caplog, name):
    paths = [folder / tag / name for tag in (OLDER, NEWEST)]
    swap(*paths)
    tag, warnings = recover(store, caplog)
    assert tag == OLDEST
    for path, tag in zip(paths, (OLDER, NEWEST), strict=True):
        assert str(path) in load_error(store, tag)
        assert sum(str(path) in warning for warning in warnings) == 1


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_checkpoint_is_refused(folder, store, caplog, name):
    shutil.copy(folder / OLDEST / name, folder / NEWEST / name)
    check_skipped(store, folder / NEWEST / name, caplog)


def test_checkpoints_with_swapped_names_are_refused(folder, store, caplog):
    swap(folder / OLDER, folder / NEWEST)
    for tag in (OLDER, NEWEST):
        assert str(folder / tag / "MANIFEST.json") in load_error(store, tag)
    tag, warnings = recover(store, caplog)
    assert (tag, len(warnings)) == (OLDEST, 2)
    assert f"is the manifest of {NEWEST}" in warnings[0] + warnings[1]


def test_checkpoint_in_place_of_another_is_refused(folder, store, caplog):
    shutil.rmtree(folder / NEWEST)
    shutil.copytree(folder / OLDEST, folder / NEWEST)
    check_skipped(store, folder / NEWEST / "MANIFEST.json", caplog)


def test_pointer_to_a_replaced_checkpoint_is_refused(folder, store, caplog):
    (folder / NEWEST).rename(folder / "E0_U4_S16")
    assert str(folder / "latest") in load_error(store, "latest")
    assert recover(store, caplog)[0] == OLDER
    # An intact checkpoint with the same name, from another run, is refused as well.
    other = folder.with_name("other")
    CheckpointStore(other, "other").save(SaveCheckpoint(), STATES[NEWEST], AfterUpdate(samples=4))
    shutil.copytree(other / NEWEST, folder / NEWEST)
    assert f"{folder / 'latest'} is damaged: {NEWEST} is not the checkpoint" in load_error(store, "latest")


def test_swapped_pointers_are_not_detected(folder):
    # A pointer does not contain its name, so each leads to the intact checkpoint of the other.
    swap(folder / "latest", folder / "best")
    assert [open_store(folder).find(name).tag for name in POINTERS] == [OLDEST, NEWEST]


def make_socket(path):
    here = os.open(path.parent, os.O_RDONLY)  # the path of a socket has to be short
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def make_device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        path.symlink_to("/dev/zero")


def make_link_to_copy(path):
    shutil.copy(path.with_name(".aside"), path.with_name(".copy"))
    path.symlink_to(".copy")


REPLACEMENTS = {
    "nothing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": make_device,
    "a link to its content": make_link_to_copy,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to the device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
@pytest.mark.parametrize("name", FILES)
def test_anything_else_in_place_of_a_file_is_refused(folder, store, caplog, name, what):
    # Reading must neither wait, as for a pipe, nor continue for ever.
    path = folder / NEWEST / name
    path.rename(path.with_name(".aside"))
    REPLACEMENTS[what](path)
    check_skipped(store, path, caplog)


@pytest.mark.parametrize("what", [what for what in REPLACEMENTS if what != "a directory"])
def test_anything_else_in_place_of_a_pointer_is_refused(folder, store, caplog, what):
    path = folder / "latest"
    path.rename(path.with_name(".aside"))
    REPLACEMENTS[what](path)
    assert "latest" in load_error(store, "latest")
    assert recover(store, caplog)[0] == NEWEST


@pytest.mark.parametrize("what", ["a pipe", "a device", "a link to itself", "a link to nothing"])
def test_anything_else_in_place_of_a_checkpoint_is_refused(folder, store, caplog, what):
    path = folder / NEWEST
    path.rename(path.with_name(".aside"))
    REPLACEMENTS[what](path)
    check_skipped(store, path, caplog)


def test_link_in_place_of_a_checkpoint_is_not_followed(folder, store, caplog):
    (folder / NEWEST).rename(folder.with_name("elsewhere"))
    (folder / NEWEST).symlink_to(folder.with_name("elsewhere"))
    check_skipped(store, folder / NEWEST, caplog)


@pytest.mark.parametrize("what", ["a file", "a pipe"])
def test_anything_else_in_place_of_the_directory_is_refused(folder, what):
    shutil.rmtree(folder)
    folder.touch() if what == "a file" else os.mkfifo(folder)
    with pytest.raises(CheckpointError, match=f"^{folder} cannot be read: Not a directory"):
        open_store(folder)


def damage_all(folder, number):
    """Damage each checkpoint in another way; return the expected reason by file."""
    ways = [
        ("weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "its content is not what was"),
        ("MANIFEST.json", lambda path: path.write_bytes(flip(path.read_bytes(), 77)), "is damaged: "),
        ("state.json", lambda path: path.unlink(), "is missing"),
        ("MANIFEST.json", lambda path: path.unlink(), "is missing, beside "),
        ("optimizer.safetensors", lambda path: path.write_bytes(bytes(path.stat().st_size)), "its content is not what"),
    ]
    expected = {}
    for shift, tag in enumerate(TAGS):
        name, damage, reason = ways[(number + shift) % len(ways)]
        damage(folder / tag / name)
        expected[folder / tag / name] = reason
    return expected


@pytest.mark.parametrize("number", range(5))
def test_one_error_has_the_reasons_for_all_damaged_checkpoints(folder, number):
    expected = damage_all(folder, number)
    with pytest.raises(CheckpointError) as error:
        open_store(folder).recover()
    first, *reasons = str(error.value).splitlines()
    assert first == f"the run cannot resume from any of the 3 checkpoints in {folder}:"
    assert len(reasons) == 3
    for path, text in expected.items():
        assert sum(reason.startswith(f"  {path} ") and text in reason for reason in reasons) == 1, (path, reasons)


def test_an_empty_directory_has_nothing_to_recover(tmp_path):
    assert open_store(tmp_path / "none").recover() is None
    (tmp_path / "empty").mkdir()
    assert open_store(tmp_path / "empty").recover() is None
