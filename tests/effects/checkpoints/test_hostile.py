"""Malicious checkpoints with valid hashes: they are refused, or loaded as data only."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from audit import dangerous_events, executions, opened_paths, record_audit

from noether import AfterUpdate, SaveCheckpoint, TrainingIteration, TrainState
from noether.core.state import Measured
from noether.core.tensors.tree import FrozenDict
from noether.effects import CheckpointError, CheckpointStore
from noether.testing import same

WEIGHTS, OPTIMIZER, STATE, MEMORY = "weights.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"
HUGE = 10**400
DEEP = 100_000


def honest_state():
    return TrainState(
        iteration=TrainingIteration(update=3, sample=12),
        previous=TrainingIteration(update=2, sample=8),
        params={"w": torch.arange(9.0).reshape(3, 3)},
        opt_state={"state": {"w": {"exp_avg": torch.ones(3, 3)}}},
        metrics={"loss": Measured(0.5, TrainingIteration(update=3, sample=12))},
        callback_states={"ema": {"params": {"w": torch.ones(3)}, "at": (1, 2)}},
    )


@pytest.fixture(scope="module", autouse=True)
def honest(tmp_path_factory):
    """The files of a valid checkpoint; it is loaded once, so that later loads import nothing."""
    folder = tmp_path_factory.mktemp("honest")
    store = CheckpointStore(folder, "run")
    store.save(SaveCheckpoint(tag="x"), honest_state(), AfterUpdate(samples=4))
    assert same(store.load(store.find("x")), honest_state())
    return {path.name: path.read_bytes() for path in (folder / "x").iterdir()}


def sign(content):
    """Return the text of a manifest with its hash, which an attacker can compute as well."""

    def text(of):
        return json.dumps(of, indent=1) + "\n"

    unsigned = {key: value for key, value in content.items() if key != "sha256"}
    return text({**unsigned, "sha256": hashlib.sha256(text(unsigned).encode()).hexdigest()})


def forge(folder, honest, files=None, manifest=None):
    """Write a checkpoint `x` with changed files or a changed manifest, and with the right sizes and hashes."""
    changed = {name: content for name, content in {**honest, **(files or {})}.items() if content is not None}
    content = json.loads(changed.pop("MANIFEST.json"))
    hashes = {
        name: {"size_bytes": len(each), "sha256": hashlib.sha256(each).hexdigest()} for name, each in changed.items()
    }
    content["parts"] = hashes
    text = manifest(content) if manifest else sign(content)
    (folder / "x").mkdir(parents=True)
    for name, each in {**changed, "MANIFEST.json": text.encode() if isinstance(text, str) else text}.items():
        (folder / "x" / name).write_bytes(each)
    return CheckpointStore(folder, "run")


def refusal(store, name="x"):
    """Return why `load` and `recover` refuse a checkpoint; check that they only read its files."""
    with record_audit() as events:
        with pytest.raises(CheckpointError) as load_error:
            store.load(store.find(name))
        with pytest.raises(CheckpointError) as recover_error:
            store.recover()
    assert (dangerous_events(events), executions(events)) == ([], [])
    assert {Path(each).parent.name for each in opened_paths(events)} <= {"x"}
    message = str(load_error.value)
    first, *reasons = str(recover_error.value).splitlines()
    assert first.startswith("the run cannot resume from the checkpoint in ")
    assert [reason.strip().partition(": ")[0] for reason in reasons] == [message.partition(": ")[0]]
    return message


class Executed:
    """Creates a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_the_audit_detects_harm(tmp_path, monkeypatch):
    """Without this, the tests here would pass if the audit saw nothing."""
    monkeypatch.chdir(tmp_path)
    with record_audit() as events:
        pickle.loads(pickle.dumps(Executed()))  # noqa: S301  # the test needs it
        exec("pass")  # noqa: S102  # the text is from here
        (tmp_path / "written").write_text("x")
        (tmp_path / "written").read_text()
    assert [name for name, _ in dangerous_events(events)] == ["pickle.find_class", "os.mkdir", "open"]
    assert [name for name, _ in executions(events)] == ["compile", "exec"]
    assert opened_paths(events) == {str(tmp_path / "written")}
    assert (tmp_path / "executed").exists()


def torch_file():
    content = io.BytesIO()
    torch.save({"w": Executed()}, content)
    return content.getvalue()


W = {"dtype": "F32", "shape": [3, 3], "data_offsets": [0, 36]}


def facts(**changes):
    return {"order": {"params": ["w"], "buffers": []}, "strides": {}, **changes}


def tensors(w=W, known=None, *, content=bytes(36), metadata=None, header=None, length=None):
    """Return a file of tensors with one thing wrong."""
    known = facts() if known is None else known
    metadata = {"noether": known if isinstance(known, str) else json.dumps(known)} if metadata is None else metadata
    text = json.dumps({"__metadata__": metadata, "w": w}).encode() if header is None else header
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


HOSTILE_TENSORS = {
    "a file of torch": torch_file(),
    "a pickle": pickle.dumps(Executed()),
    "nothing": b"",
    "half a length": b"\0\0\0",
    "a header of 2**63 bytes": tensors(length=2**63),
    "a header of 2**64 - 1 bytes": tensors(length=2**64 - 1),
    "a header longer than the file": tensors(length=4096),
    "a header of no bytes": tensors(length=0),
    "a header that is not JSON": tensors(header=b"import os"),
    "a header nested deeply": tensors(header=b'{"w":' * DEEP),
    "a header of lists": tensors(header=b"[" * DEEP),
    "offsets beyond the file": tensors({**W, "shape": [6, 3], "data_offsets": [0, 72]}),
    "offsets that leave a hole": tensors({**W, "data_offsets": [4, 40]}, content=bytes(40)),
    "offsets backwards": tensors({**W, "data_offsets": [36, 0]}),
    "offsets of 2**64": tensors({**W, "data_offsets": [0, 2**64]}),
    "offsets below 0": tensors({**W, "data_offsets": [-36, 0]}),
    "overlapping tensors": tensors(
        header=json.dumps({"__metadata__": {"noether": json.dumps(facts())}, "w": W, "v": W}).encode()
    ),
    "bytes behind the last tensor": tensors(content=bytes(37)),
    "a shape whose product overflows": tensors({**W, "shape": [2**32, 2**32, 2**32]}),
    "a shape that overflows a number of 64 bits": tensors(
        {**W, "shape": [2**63, 0], "data_offsets": [0, 0]}, content=b""
    ),
    "a shape below 0": tensors({**W, "shape": [-3, -3]}),
    "a shape larger than its bytes": tensors({**W, "shape": [2**20, 2**20]}),
    "an unknown type": tensors({**W, "dtype": "PICKLE"}),
    "a type that torch does not have": tensors({**W, "dtype": "F4", "shape": [72]}),
    "a stride below 0": tensors(known=facts(strides={"w": [-1, 3]})),
    "a stride of 0": tensors(known=facts(strides={"w": [0, 8]})),
    "huge strides": tensors(known=facts(strides={"w": [2**62, 2**62]})),
    "strides beyond 64 bits": tensors(known=facts(strides={"w": [HUGE, 1]})),
    # They fit the number of elements, but elements overlap, so other values would be read than were written.
    "overlapping strides": tensors(known=facts(strides={"w": [2, 2]})),
    "strides that are text": tensors(known=facts(strides={"w": ["1", "3"]})),
    "strides that are fractions": tensors(known=facts(strides={"w": [1.0, 3.0]})),
    "strides of something else": tensors(known=facts(strides={"v": [1, 3]})),
    "strides that are a list": tensors(known=facts(strides=[1])),
    "strides of another dimension": tensors(known=facts(strides={"w": [1, 3, 9]})),
    "facts that are a list": tensors(known=[]),
    "facts that are null": tensors(known="null"),
    "facts that are not JSON": tensors(known="__import__('os').mkdir('executed')"),
    "facts nested deeply": tensors(known="[" * DEEP),
    "facts that are a number": tensors(metadata={"noether": 3}),
    "no facts": tensors(metadata={}),
}
HOSTILE_WEIGHTS = {
    "no metadata": tensors(header=json.dumps({"w": W}).encode()),
    "no order": tensors(known={"strides": {}}),
    "an order of what is not there": tensors(known=facts(order={"params": ["v"], "buffers": []})),
    "an order that leaves a weight out": tensors(known=facts(order={"params": [], "buffers": []})),
    "an order that names a weight twice": tensors(known=facts(order={"params": ["w", "w"], "buffers": []})),
    "an order that is text": tensors(known=facts(order={"params": "w", "buffers": ""})),
    "an order of lists": tensors(known=facts(order={"params": [["w"]], "buffers": []})),
    "an order with more in it": tensors(known=facts(order={"params": ["w"], "buffers": [], "code": ["w"]})),
    "an order that is null": tensors(known=facts(order=None)),
}


@pytest.mark.parametrize("what", HOSTILE_TENSORS | HOSTILE_WEIGHTS)
def test_hostile_weights_are_refused(tmp_path, monkeypatch, honest, what):
    monkeypatch.chdir(tmp_path)
    store = forge(tmp_path / "c", honest, {WEIGHTS: (HOSTILE_TENSORS | HOSTILE_WEIGHTS)[what]})
    message = refusal(store)
    assert message.startswith(f"{tmp_path}/c/x does not hold a state: ")
    assert f" {WEIGHTS}: " in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("what", HOSTILE_TENSORS)
@pytest.mark.parametrize("name", [OPTIMIZER, MEMORY])
def test_hostile_tensors_of_the_state_are_refused(tmp_path, honest, name, what):
    assert f" {name}: " in refusal(forge(tmp_path, honest, {name: HOSTILE_TENSORS[what]}))


def test_valid_forgery_is_loaded(tmp_path, honest):
    """The others are refused for the one thing that is wrong with them, not because they are forged."""
    store = forge(tmp_path, honest, {WEIGHTS: tensors(known=facts(strides={"w": [1, 3]}))})
    assert same(store.load(store.find("x")), honest_state().replace(params={"w": torch.zeros(3, 3)}))


def state_text(honest, **changes):
    return json.dumps(json.loads(honest[STATE]) | changes, indent=1).encode()


def replace_text(honest, old, new):
    text = honest[STATE].decode()
    assert text.count(old) == 1
    return text.replace(old, new).encode()


TREES = ["hyperparams", "metrics", "callback_states", "opt_state"]
HOSTILE_TREES = {
    "null": None,
    "a number": 3,
    "text": "os.system",
    "a list": [1],
    "a tuple": {"$tuple": []},
    "a list inside": {"a": [1]},
    "an unknown entry": {"a": {"$kind": "os.system"}},
    "another unknown entry": {"a": {"$reduce": {"$tuple": ["os.system", "mkdir executed"]}}},
    "an entry beside others": {"a": {"$tuple": [], "$dict": {}}},
    "an entry behind others": {"a": {"b": 1, "$tensor": "ema"}},
    "a missing tensor": {"a": {"$tensor": "../../weights"}},
    "a tensor of the other file": {"a": {"$tensor": "w"}},
    "a tensor whose name is a list": {"a": {"$tensor": []}},
    "a tensor whose name is null": {"a": {"$tensor": None}},
    "a tuple that is text": {"a": {"$tuple": "ab"}},
    "a tuple that is a mapping": {"a": {"$tuple": {"a": 1}}},
    "a mapping that is a list": {"a": {"$dict": [["a", 1]]}},
    "an unnecessary mapping entry": {"a": {"$dict": {"b": 1}}},
    "an invalid number": {"a": {"$number": "__import__('os')"}},
    "a number whose name is a list": {"a": {"$number": []}},
}


@pytest.mark.parametrize("what", HOSTILE_TREES)
@pytest.mark.parametrize("tree", TREES)
def test_hostile_trees_are_refused(tmp_path, honest, tree, what):
    message = refusal(forge(tmp_path, honest, {STATE: state_text(honest, **{tree: HOSTILE_TREES[what]})}))
    assert message.startswith(f"{tmp_path}/x does not hold a state: ")
    assert f" {STATE}: " in message


def nest(levels, opening='{"a": ', closing="}"):
    return opening * levels + "1" + closing * levels


HOSTILE_STATES = {
    "a pickle": lambda honest: pickle.dumps(Executed()),
    "nothing": lambda honest: b"",
    "a list": lambda honest: b"[]",
    "null": lambda honest: b"null",
    "not UTF-8": lambda honest: honest[STATE].replace(b"loss", b"lo\xffs"),
    "another encoding": lambda honest: honest[STATE].decode().encode("utf-16"),
    "a byte order mark": lambda honest: b"\xef\xbb\xbf" + honest[STATE],
    "other spaces": lambda honest: json.dumps(json.loads(honest[STATE])).encode(),
    "an extra line": lambda honest: honest[STATE] + b"\n",
    "an extra document": lambda honest: honest[STATE] * 2,
    "an extra key": lambda honest: state_text(honest, kind="os.system"),
    "a class": lambda honest: state_text(honest, **{"py/object": "os.system"}),
    "a __reduce__ entry": lambda honest: state_text(honest, __reduce__=["os.system", ["mkdir executed"]]),
    "a missing key": lambda honest: replace_text(honest, ' "seed": 0,\n', ""),
    "a repeated key": lambda honest: replace_text(honest, '"seed": 0', '"seed": 0,\n "seed": 1'),
    "a repeated nested key": lambda honest: replace_text(
        honest, '"lr_scale": 1.0', '"lr_scale": 1.0,\n  "lr_scale": 2.0'
    ),
    "a NaN": lambda honest: replace_text(honest, '"lr_scale": 1.0', '"lr_scale": NaN'),
    "an infinity": lambda honest: replace_text(honest, '"lr_scale": 1.0', '"lr_scale": -Infinity'),
    "a number that overflows": lambda honest: replace_text(honest, '"lr_scale": 1.0', '"lr_scale": 1e999'),
    "a seed that is text": lambda honest: state_text(honest, seed="5"),
    "a seed that is code": lambda honest: state_text(honest, seed="__import__('os').mkdir('executed')"),
    "a seed that is a fraction": lambda honest: state_text(honest, seed=5.7),
    "a seed that is true": lambda honest: state_text(honest, seed=True),
    "a seed that is NaN": lambda honest: replace_text(honest, '"seed": 0', '"seed": NaN'),
    "a seed beyond 64 bits": lambda honest: state_text(honest, seed=2**63),
    "a huge seed": lambda honest: state_text(honest, seed=HUGE),
    "a seed of too many digits": lambda honest: replace_text(honest, '"seed": 0', f'"seed": {"7" * 5000}'),
    "an end that is text": lambda honest: state_text(honest, ended="no"),
    "an end that is null": lambda honest: state_text(honest, ended=None),
    "a reason that is a list": lambda honest: state_text(honest, stop=[]),
    "a reason that is a number": lambda honest: state_text(honest, stop=5),
    "an iteration that is code": lambda honest: state_text(honest, iteration="os.system"),
    "an iteration that is a number": lambda honest: state_text(honest, iteration=3),
    "an iteration of too many digits": lambda honest: state_text(honest, iteration="U" + "9" * 5000),
    "the iteration of another checkpoint": lambda honest: state_text(honest, iteration="E0_U4_S16"),
    "a previous iteration that is null": lambda honest: state_text(honest, previous=None),
    "a metric without iteration": lambda honest: state_text(honest, metrics={"loss": 0.5}),
    "a metric with an invalid iteration": lambda honest: state_text(honest, metrics={"loss": {"$tuple": [0.5, "x"]}}),
    "endless lists": lambda honest: b"[" * DEEP,
    "endless mappings": lambda honest: replace_text(honest, '"at": {', f'"deep": {nest(DEEP)}, "at": {{'),
    # Python's stack would suffice to load the first of these, but not to use or save it.
    "mappings nested deeply": lambda honest: state_text(honest, callback_states=json.loads(nest(300))),
    "tuples nested deeply": lambda honest: state_text(
        honest, callback_states={"a": json.loads(nest(200, '{"$tuple": [', "]}"))}
    ),
}


@pytest.mark.parametrize("what", HOSTILE_STATES)
def test_hostile_states_are_refused(tmp_path, monkeypatch, honest, what):
    monkeypatch.chdir(tmp_path)
    message = refusal(forge(tmp_path / "c", honest, {STATE: HOSTILE_STATES[what](honest)}))
    assert message.startswith(f"{tmp_path}/c/x does not hold a state: ")
    assert f" {STATE}: " in message
    assert len(message) < 1000 + len(str(tmp_path))  # the message stays one line
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", [OPTIMIZER, MEMORY])
def test_missing_tensors_of_the_state_are_refused(tmp_path, honest, name):
    assert "there is no tensor " in refusal(forge(tmp_path, honest, {name: None}))


def test_swapped_files_with_their_hashes_are_refused(tmp_path, honest):
    swapped = {WEIGHTS: honest[OPTIMIZER], OPTIMIZER: honest[WEIGHTS]}
    assert f" {STATE}: ValueError: there is no tensor 'state.w.exp_avg'" in refusal(forge(tmp_path, honest, swapped))


def test_memory_that_looks_like_code_stays_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = {
        "kind": "os.system",
        "py/object": "subprocess.Popen",
        "__reduce__": ("os.mkdir", ("executed",)),
        "__class__": "Executed",
        "$tensor": "w",
        "$kind": {"$tuple": (1,)},
        "yaml": "!!python/object/apply:os.mkdir [executed]",
        "large": HUGE,
    }
    state = honest_state().replace(callback_states={"memory": memory, "$dict": {}})
    store = CheckpointStore(tmp_path / "c", "run")
    store.save(SaveCheckpoint(tag="x"), state, AfterUpdate(samples=4))
    with record_audit() as events:
        loaded = store.load(store.find("x"))
    assert same(loaded, state)
    assert (dangerous_events(events), executions(events)) == ([], [])


def test_tree_that_could_not_be_loaded_is_not_saved(tmp_path):
    memory = "x"
    for _ in range(101):
        memory = (memory,)
    state = honest_state()
    with pytest.raises(
        TypeError, match=r"^memory 'deep': 0\.0\.0.* is nested deeper than 99 levels; write a flat dict"
    ):
        state.replace(callback_states={"deep": memory})
    for field, name in (("callback_states", "memory 'deep': 0"), ("opt_state", "opt_state: deep")):
        deep = state.replace(**{field: FrozenDict(deep=memory)})
        with pytest.raises(CheckpointError, match=rf"could not be written: {name}\.0.* is nested deeper than"):
            CheckpointStore(tmp_path, "run").save(SaveCheckpoint(), deep, AfterUpdate(samples=4))
    fits = state.replace(callback_states={"deep": memory[0][0]})
    store = CheckpointStore(tmp_path, "run")
    store.save(SaveCheckpoint(), fits, AfterUpdate(samples=4))
    assert same(store.load(store.newest()), fits)


def with_part(name, **changes):
    """Return a function that makes a manifest with one more file, or with one changed file."""

    def manifest(content):
        part = {"size_bytes": 5, "sha256": "0" * 64} | content["parts"].get(name, {}) | changes
        return sign({**content, "parts": {**content["parts"], name: part}})

    return manifest


def edit(**changes):
    return lambda content: sign({**content, **changes})


def with_text(old, new):
    return lambda content: sign(content).replace(old, new, 1)


HOSTILE_MANIFESTS = {
    **{
        f"the file {name!r}": with_part(name)
        for name in (
            "../../x", "../x/weights.safetensors", "/etc/passwd", "..", ".", "", "..\\x", "C:\\x", "~/x", "x\0",
            "weights.safetensors\0", "weights.safetensors/", "./weights.safetensors", "WEIGHTS.safetensors",
            "MANIFEST.json", "code.py", "\x1b[2J", "\ud800", "x" * 5000,
        )
    },
    **{
        f"the size {size!r:.20}": with_part(WEIGHTS, size_bytes=size)
        for size in (-1, HUGE, 2**63, 36.5, "36", True, None, [], float("nan"), float("inf"))
    },
    **{
        f"the hash {text!r:.20}": with_part(WEIGHTS, sha256=text)
        for text in ("", "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "\n", "g" * 64, "\u0660" * 64, None, 3, [])
    },
    **{
        f"the tag {tag!r:.20}": edit(tag=tag)
        for tag in ("../x", "/x", "x/", "..", ".", "", ".tmp-x", "x\n", "x\0", "y", "x" * 300, "\u0445", None, 3, ["x"])
    },
    **{f"the parent {tag!r}": edit(parent=tag) for tag in ("../x", "", "a/b", 3, ["x"])},
    **{f"the format {number!r:.20}": edit(format=number) for number in (0, -1, 4, HUGE, True, "3", 3.0, None, [3])},
    **{f"the segment {number!r:.20}": edit(segment=number) for number in (-1, HUGE, True, "1", 1.5, None)},
    **{f"the number {number!r:.20}": edit(number=number) for number in (-1, HUGE, False, "1", None)},
    **{f"{number!r:.20} lines of the log": edit(log_lines=number) for number in (-1, HUGE, "1", [])},
    **{
        f"the iteration {text!r:.20}": edit(iteration=text)
        for text in ("os.system", "U-1", "U1.5", "U" + "9" * 5000, "U" + "9" * 400, "U\u0663", 3, None, [])
    },
    "files that are a list": edit(parts=[]),
    "files that are text": edit(parts="weights.safetensors"),
    "a file that is text": lambda content: sign({**content, "parts": {WEIGHTS: "x"}}),
    "a file with code": with_part(WEIGHTS, kind="os.system"),
    "models that are text": edit(models="ab"),
    "a retention that is a list": edit(retention=[["a", 1]]),
    "a retention that is text": edit(retention={"a": "1"}),
    "an extra key": edit(kind="os.system"),
    "a class": edit(**{"py/object": "os.system"}),
    "a __reduce__ entry": edit(__reduce__=["os.system", ["mkdir executed"]]),
    "a missing key": lambda content: sign({key: value for key, value in content.items() if key != "event"}),
    "no hash": lambda content: json.dumps({k: v for k, v in content.items() if k != "sha256"}, indent=1) + "\n",
    "another hash": with_text('"sha256": "', '"sha256": "0'),
    # In Python, True equals 1, the format without a hash.
    "a format that is true": lambda content: json.dumps(
        {key: content[key] for key in content if key != "sha256" and "log_lines" not in key} | {"format": True}
    ),
    "a repeated key": with_text('"tag": "x"', '"tag": "y",\n "tag": "x"'),
    "a repeated key, in the other order": with_text('"tag": "x"', '"tag": "x",\n "tag": "../x"'),
    "a comment": with_text("{", "{ // "),
    "a NaN": with_text('"number": 1', '"number": NaN'),
    "too many digits": with_text('"number": 1', f'"number": {"1" * 5000}'),
    "other spaces": lambda content: json.dumps(json.loads(sign(content))),
    "a byte order mark": lambda content: "\ufeff" + sign(content),
    "another encoding": lambda content: sign(content).encode("utf-16"),
    "not UTF-8": lambda content: sign(content).encode().replace(b"AfterUpdate", b"After\xff"),
    "a pickle": lambda content: pickle.dumps(Executed()),
    "a list": lambda content: "[]",
    "text": lambda content: '"x"',
    "endless lists": lambda content: "[" * DEEP,
    "endless mappings": lambda content: '{"tag":' * DEEP,
    "a mapping nested deeply": edit(retention=json.loads(nest(300))),
    "nothing": lambda content: "",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_MANIFESTS)
def test_hostile_manifests_are_refused(tmp_path, monkeypatch, honest, what):
    monkeypatch.chdir(tmp_path)
    message = refusal(forge(tmp_path / "c", honest, manifest=HOSTILE_MANIFESTS[what]))
    assert message.startswith(f"{tmp_path}/c/x/MANIFEST.json is damaged: ")
    assert "\x1b" not in message  # an escape sequence, which a terminal obeys
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("size", [0, 35, 2**60, 2**63 - 1])
def test_wrong_size_in_the_manifest_is_refused(tmp_path, honest, size):
    store = forge(tmp_path, honest, manifest=with_part(WEIGHTS, size_bytes=size))
    assert refusal(store).startswith(f"{tmp_path}/x/{WEIGHTS} is damaged")


def test_huge_manifest_is_refused(tmp_path, honest):
    store = forge(tmp_path, honest)
    os.truncate(tmp_path / "x/MANIFEST.json", 1 << 40)
    assert refusal(store).startswith(f"{tmp_path}/x/MANIFEST.json is damaged, or cannot be read: 1099511627776 bytes")


@pytest.mark.parametrize("name", [WEIGHTS, STATE, "MANIFEST.json"])
@pytest.mark.parametrize("what", ["link", "absolute link", "pipe"])
def test_links_and_pipes_with_the_right_content_are_refused(tmp_path, honest, name, what):
    store = forge(tmp_path / "c", honest)
    path = tmp_path / "c/x" / name
    path.rename(tmp_path / "secret")
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "secret" if what == "absolute link" else "../../secret")
    assert str(path) in refusal(store)


def test_link_to_a_checkpoint_elsewhere_is_refused(tmp_path, honest):
    forge(tmp_path / "elsewhere", honest)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/x").symlink_to("../elsewhere/x")
    assert f"{tmp_path}/c/x is damaged: it is a link" in refusal(CheckpointStore(tmp_path / "c", "run"))


HOSTILE_POINTERS = {
    "a parent path": b"../elsewhere/x",
    "an absolute path": b"/etc/passwd",
    "a relative path": b"./x",
    "a name with a NUL": b"x\0",
    "a name with a line": b"x\n",
    "a name and a space": b"x ",
    "a name and another hash": b"x " + b"0" * 64 + b"\n",
    "a pointer": b"latest",
    "nothing": b"",
    "bytes": bytes(range(256)),
    "not ASCII": "\u0445".encode(),
    "a long name": b"x" * 399,
    "YAML": b"!!python/object/apply:os.system [mkdir executed]",
    "10 MB": bytes(10 << 20),
    "10 MB behind a name": b"x " + bytes(10 << 20),
}


@pytest.mark.parametrize("what", HOSTILE_POINTERS)
def test_hostile_pointers_are_refused(tmp_path, honest, what):
    forge(tmp_path / "elsewhere", honest)
    store = forge(tmp_path / "c", honest)
    (tmp_path / "c/latest").write_bytes(HOSTILE_POINTERS[what])
    with record_audit() as events:
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/c/latest is damaged") as error:
            store.find("latest")
        state, manifest = store.recover()
    assert same(state, honest_state())
    assert manifest.tag == "x"
    assert (dangerous_events(events), executions(events)) == ([], [])
    assert all(name.startswith(f"{tmp_path}/c/") for name in opened_paths(events))
    assert "10 MB" not in what or "bytes are more than the 400 that it may have" in str(error.value)


@pytest.mark.parametrize(
    "name", ["../elsewhere/x", "/etc/passwd", "x/../x", "x/", "./x", "x\0", "..", ".", "", "x" * 5000]
)
def test_hostile_names_are_not_found(tmp_path, honest, name):
    forge(tmp_path / "elsewhere", honest)
    store = forge(tmp_path / "c", honest)
    with record_audit() as events, pytest.raises(CheckpointError, match=f"in {tmp_path}/c; there are: x"):
        store.find(name)
    assert all(each.startswith(f"{tmp_path}/c/x/") for each in opened_paths(events))


def test_strange_names_in_the_directory_are_skipped(tmp_path, honest, caplog):
    store = forge(tmp_path, honest)
    for name in (b"a b", b"\xff\xfe", b"-rf", b"$(reboot)", b"x\n", b"\x1b[2J", b"y" * 255):
        (tmp_path / os.fsdecode(name)).mkdir()
        (tmp_path / os.fsdecode(name) / "MANIFEST.json").write_bytes(b"{}")
        (tmp_path / os.fsdecode(name[1:] + b"1")).write_bytes(name)
    state, manifest = store.recover()
    assert manifest.tag == "x"
    assert same(state, honest_state())
    assert len(caplog.messages) > 7
    assert all(each.isprintable() for each in caplog.messages)  # no escape sequences, which a terminal obeys


LIMITED = """
import os, resource, sys
from pathlib import Path
from noether.effects import CheckpointError, CheckpointStore
from noether.config import ConfigError, load

store = CheckpointStore(Path("c"), "run")
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
room = 256 << 20
resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
for name in sys.argv[1:]:
    try:
        load(name) if name.endswith(".yaml") else store.load(store.find(name))
    except (CheckpointError, ConfigError) as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="where the size of a process can be limited and read")
def test_huge_files_do_not_fill_the_memory(tmp_path, honest):
    store = tmp_path / "c"
    bombs = {
        "header": {WEIGHTS: tensors(header=b'{"w":' * 19_900_000)},
        "facts": {WEIGHTS: tensors(known="[" * 20_000_000)},
        "state": {STATE: b'{"a":' * 4_000_000},
    }
    for name, files in bombs.items():
        forge(tmp_path / name, honest, files, edit(tag=name))
        store.mkdir(exist_ok=True)
        (tmp_path / name / "x").rename(store / name)
    forge(
        tmp_path / "sparse",
        honest,
        manifest=lambda content: with_part(WEIGHTS, size_bytes=1 << 40)({**content, "tag": "sparse"}),
    )
    (tmp_path / "sparse/x").rename(store / "sparse")
    os.truncate(store / "sparse" / WEIGHTS, 1 << 40)  # a sparse file, which takes no space on the disk
    (tmp_path / "wide.yaml").write_text(f"a: [{'1,' * 500_000}]")
    (tmp_path / "sparse.yaml").touch()
    os.truncate(tmp_path / "sparse.yaml", 1 << 40)
    names = [*bombs, "sparse", "wide.yaml", "sparse.yaml"]
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, *names], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    assert (process.returncode, process.stderr) == (0, "")
    messages = process.stdout.splitlines()
    assert len(messages) == len(names)
    for name, line in zip(names, messages, strict=True):
        assert line.startswith(name if name.endswith(".yaml") else f"c/{name}"), line
