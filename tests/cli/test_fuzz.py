"""Fuzzing: configurations, records and checkpoints with any value at any place never get a traceback."""

import copy
import json
from contextlib import contextmanager
from unicodedata import category

import pytest
from click.testing import CliRunner
from command import SMALL, only_run
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from yaml import safe_dump, safe_load

from noether.cli.main import main

EXAMPLES = 60
UNTIMED = settings(deadline=None, suppress_health_check=list(HealthCheck))
TEXT = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["", "val", "train", "loss", "accuracy", "E1_U2_S3", "U5", "1", "$tensor", "a/b", "\x1b[31m"]),
    st.sampled_from(["noether.core.callbacks.EmaCallback", "torch.nn.Linear", "torch.optim.SGD", "NaN", "a.b.c"]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 1e308, -1e308, 5e-324, -0.0]),
    st.floats(),
    TEXT,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


def paths_in(tree, path=()):
    """Yield the path of each node of a tree."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from paths_in(value, (*path, key))


def put(tree, path, value):
    """Return a copy of `tree` with the node at `path` replaced."""
    if not path:
        return value
    changed = copy.copy(tree)
    changed[path[0]] = put(tree[path[0]], path[1:], value)
    return changed


def run(*argv):
    """Run a command; return its exit code and what it wrote to the standard error. A traceback is a failure."""
    result = CliRunner().invoke(main, [str(word) for word in argv])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    controls = {each for each in result.output if category(each) in ("Cc", "Cs", "Zl", "Zp") or each in "\u202e\u2066"}
    assert controls <= {"\n", "\t"}, repr(result.output)
    return result.exit_code, result.stderr


def check_message(code, errors):
    """Check that a command has succeeded, or has said what is wrong."""
    event(f"exit code {code}")
    assert code in (0, 1, 2)
    assert "Traceback" not in errors
    assert code == 0 or "Error: " in errors or errors.startswith("Usage: ")


MORE = """\
run: {name: small, output: out, seed: 3, tensorboard: false}
optimizer:
  kind: torch.optim.AdamW
  lr: 2e-3
  weight_decay: 0.01
  betas: [0.9, 0.99]
  schedule: {kind: cosine, warmup_updates: 3, end_factor: 0.1}
  weight_decay_schedule: {kind: linear, end_factor: 0.1}
  groups: [{name: bias, match: ['*.bias'], lr: 0.1, weight_decay: 0.0}]
trainer:
  max_updates: 5
  effective_batch_size: 32
  max_batch_size: 16
  eval_batch_size: 8
  drop_last: true
  num_workers: 0
  precision: bfloat16
  device: cpu
  clip_grad_norm: 1.0
  nonfinite: skip
  record: events
  checkpoints: {asynchronous: true, on_error: warn}
  loss: noether.examples.digits.cross_entropy
  evaluate: {val: [loss, accuracy], every_n_epochs: 1}
"""
CONFIG = {**safe_load(SMALL), **safe_load(MORE)}
CONFIG_PATHS = list(paths_in(CONFIG))
WHOLE = st.one_of(st.integers(-3, 3), st.sampled_from([2**40, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400]))


def values_like(value):
    """Return a strategy of values of the same type, which more of the checks let pass, and of any other."""
    alike = {int: WHOLE, float: st.one_of(st.floats(), WHOLE), bool: st.booleans(), str: TEXT}
    return st.one_of(alike.get(type(value), VALUES), VALUES)


def value_at(tree, path):
    return value_at(tree[path[0]], path[1:]) if path else tree


CHANGES = st.sampled_from(CONFIG_PATHS).flatmap(
    lambda path: st.tuples(st.just(path), values_like(value_at(CONFIG, path)))
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@settings(UNTIMED, max_examples=EXAMPLES)
@given(change=CHANGES, command=st.sampled_from(["validate", "plan"]))
def test_any_value_in_a_configuration(folder, change, command):
    (folder / "fuzzed.yaml").write_text(safe_dump(put(CONFIG, *change)), errors="surrogatepass")
    check_message(*run(command, "fuzzed.yaml"))
    assert [each.name for each in folder.iterdir()] == ["fuzzed.yaml"]


RECORDED = {
    **safe_load(SMALL),
    "run": {"name": "small", "output": "out"},
    "trainer": {
        "max_updates": 3,
        "effective_batch_size": 32,
        "loss": "noether.examples.digits.cross_entropy",
        "record": "events",
        "checkpoints": {"asynchronous": False},
        "evaluate": {"val": ["loss", "accuracy"], "every_n_updates": 2},
    },
    "callbacks": [
        {"kind": f"noether.core.callbacks.{name}", "every_n_updates": 1, **more}
        for name, more in {
            "ProgressCallback": {},
            "NanGuardCallback": {"tolerance": 5},
            "OnlineLossCallback": {},
            "LrCallback": {},
            "EtaCallback": {},
            "TrainTimeCallback": {},
            "EmaCallback": {"target_factors": [0.9]},
            "BestMetricCallback": {"every_n_updates": 2, "metric_key": "val/accuracy"},
            "MetricEarlyStopping": {"every_n_updates": 2, "metric_key": "val/accuracy", "tolerance": 5},
            "CheckpointCallback": {"save_weights": True, "save_optim": True},
        }.items()
    ],
}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """The directory of a finished run with its record; an example replaces one file, and puts it back."""
    folder = tmp_path_factory.mktemp("recorded")
    settings = {**RECORDED, "run": {"name": "small", "output": str(folder / "out")}}
    (folder / "small.yaml").write_text(safe_dump(settings))
    assert run("train", folder / "small.yaml") == (0, "")
    return only_run(folder / "out/small")


@contextmanager
def replaced(path, content):
    """Replace the content of a file for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


ENCODED = [
    {"$number": "NaN"},
    {"$number": []},
    {"$torch.float32": "x"},
    {"$torch.float32": 10**400},
    {"$torch.int64": 1.5},
    {"$shape.torch.float32": [2**40, 2**40]},
    {"$shape.torch.float32": [-1]},
    {"$tuple": 5},
    {"$tuple": [1]},
]


@settings(UNTIMED, max_examples=EXAMPLES)
@given(data=st.data(), options=st.sampled_from([[], ["--log"], ["--at", "U2"], ["--at", "E0", "--log"]]))
def test_any_value_in_a_record(recorded, data, options):
    path = recorded / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    where = data.draw(st.sampled_from([each for each in paths_in(lines) if each]))
    value = data.draw(st.one_of(values_like(value_at(lines, where)), st.sampled_from(ENCODED)))
    content = b"".join(json.dumps(line).encode() + b"\n" for line in put(lines, where, value))
    with replaced(path, content):
        code, errors = run("replay", recorded, *options)
    check_message(code, errors)
    assert errors.count("\n") <= 1


@settings(UNTIMED, max_examples=EXAMPLES)
@given(data=st.data())
def test_any_bytes_in_a_record(recorded, data):
    content = (recorded / "events.jsonl").read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    noise = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"[" * 10_000, b'{"a":' * 10_000, b"\n", b"1" * 5000]))
    )
    with replaced(recorded / "events.jsonl", content[:start] + noise + content[min(end, start + 9) :]):
        check_message(*run("replay", recorded))


@pytest.mark.parametrize("value", [5, 0.5, "max_epochs", [1], True, None])
@pytest.mark.parametrize("section", ["run", "model", "data", "optimizer", "trainer", "callbacks"])
def test_a_section_of_the_wrong_shape_is_named(folder, section, value):
    (folder / "bad.yaml").write_text(safe_dump({**CONFIG, section: value}))
    for command in ("validate", "plan", "train"):
        code, errors = run(command, "bad.yaml")
        if (section, value) == ("callbacks", None):
            continue
        assert (code, errors.startswith("Error: bad.yaml:")) == (2, True)
        assert f" {section}" in errors


def test_text_from_files_sends_no_commands_to_the_terminal(folder, recorded):
    text = "\x1b[31m[/bold]\u202e"
    callback = {"kind": "noether.core.callbacks.ProgressCallback", "every_n_updates": 1, "id": text}
    (folder / "escape.yaml").write_text(safe_dump({**CONFIG, "callbacks": [callback]}))
    result = CliRunner().invoke(main, ["plan", "escape.yaml"])
    assert result.exit_code == 0
    assert "\\x1b[31m[/bold]\\u202e" in result.output
    line = json.loads((recorded / "events.jsonl").read_text().splitlines()[0]) | {"event": text}
    with replaced(recorded / "events.jsonl", json.dumps(line).encode() + b"\n"):
        code, errors = run("replay", recorded)
    assert code == 1
    assert "not a recorded event" in errors
