# ruff: noqa: E501 - a payload stays in one piece
"""A malicious configuration is refused with its place, and no code in it runs."""

import sys
from pathlib import Path

import pytest
from audit import dangerous_events, imported_modules, record_audit

from noether.config import ConfigError, load, load_callbacks
from noether.config.objects.import_policy import import_path

EVIL = """
from pathlib import Path
import torch
Path("executed").touch()
class Net(torch.nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
"""

# A valid configuration; a test replaces one of its sections by a payload.
BASE = {
    "top": "",
    "run": "{name: hostile}",
    "model": "{kind: shop.Net}",
    "data": "{train: {kind: shop.Digits, split: train}, val: {kind: shop.Digits, split: val}}",
    "optimizer": "{kind: torch.optim.SGD, lr: 0.1}",
    "trainer": "{max_epochs: 1, effective_batch_size: 4, loss: shop.loss}",
    "callbacks": "[{kind: shop.say}]",
}


@pytest.fixture(autouse=True)
def folder(shop, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # importing the shop would write files, too
    (shop / "hostile").mkdir()
    (shop / "hostile/evil.py").write_text(EVIL)
    yield shop
    for name in [name for name in sys.modules if name.partition(".")[0] in ("hostile", "evil", "linked")]:
        del sys.modules[name]


def config(folder, **sections):
    text = "\n".join(f"{name}: {section}" for name, section in {**BASE, **sections}.items() if name != "top")
    path = folder / "hostile/config.yaml"
    path.write_text(f"{sections.get('top', '')}{text}\n")
    return str(path)


def refusal(path, *args, **options):
    """Return the message that refuses a file; loading it may have no effect and import no module of the attacker."""
    with record_audit() as events, pytest.raises(ConfigError) as error:
        load(path, *args, **options)
    assert dangerous_events(events) == []
    assert not {name.rpartition(".")[2] for name in imported_modules(events)} & {"evil", "this", "antigravity"}
    assert not Path("executed").exists()
    assert all(line.startswith((path, "--set ")) for line in str(error.value).splitlines())
    return str(error.value)


def test_the_harmless_configuration_loads(folder):
    assert load(config(folder)).model.path == "shop.Net"


TAGS = [
    "!!python/object/apply:os.system [touch executed]",
    "!!python/object/apply:os.mkdir [executed]",
    "!!python/object/new:os.mkdir [executed]",
    "!!python/object:shop.Net {}",
    "!!python/name:os.system",
    "!!python/module:this",
    "!!python/tuple [1]",
    "!!python/none",
    "!!python/bytes aGk=",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [executed]",
    "!apply:os.mkdir [executed]",
    "!!binary aGk=",
    "!!timestamp 2020-01-01",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!merge <<",
    "!!float x",
    "!!bool on",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    "place", ["run: {name: x, output: %s }", "model: {kind: %s }", "callbacks: [%s ]", "x: {? %s : 1}"]
)
def test_a_tag_constructs_no_object(folder, tag, place):
    section, _, text = place.partition(": ")
    message = refusal(config(folder, **{section: text % tag}))
    assert any(
        each in message for each in ("the tag !", "does not fit its tag !!", "is not text", "`<<` is not part of")
    )


def test_a_tag_behind_a_tag_directive_is_refused(folder):
    top = "%TAG !y! tag:yaml.org,2002:python/object/apply:\n---\n"
    message = refusal(config(folder, top=top, model="!y!os.mkdir [executed]"))
    assert "model: the tag !!python/object/apply:os.mkdir is refused" in message


def test_a_tag_in_an_override_is_refused(folder):
    message = refusal(config(folder), ["model=!!python/object/apply:os.mkdir [executed]"])
    assert "the tag !!python/object/apply:os.mkdir is refused" in message


DEEP, MANY = "is nested too deeply", "has more than 20000 values once its aliases are expanded"
BOMBS = {
    "laughs": ("\n".join([f"l0: &l0 [{'x, ' * 9}x]", *(f"l{n}: &l{n} [{f'*l{n - 1}, ' * 9}x]" for n in range(1, 30))]), MANY),
    "laughs in mappings": ("\n".join(["l0: &l0 {a: x, b: x}", *(f"l{n}: &l{n} {{a: *l{n - 1}, b: *l{n - 1}}}" for n in range(1, 60))]), MANY),
    "many values": ("a: [" + "1," * 45_000 + "]", MANY),
    "many keys": ("a: {" + "".join(f"k{n}: 1," for n in range(25_000)) + "}", MANY),
    "lists without end": ("a: " + "[" * 100_000, DEEP),
    "mappings without end": ("a: " + "{a: " * 100_000, DEEP),
    "blocks without end": ("\n".join(" " * n + "a:" for n in range(1, 1200)), DEEP),
    "lists that end": ("a: " + "[" * 150 + "]" * 150, DEEP),
    "itself": ("a: &a [*a]", "recursive alias: it is part of the value it refers to"),
    "itself in a mapping": ("a: &a {b: {c: *a}}", "recursive alias: it is part of the value it refers to"),
    "more than a file may have": ("# " + "x" * (1 << 20), "has more than 1048576 bytes, too large for a configuration"),
    "too many digits": (f"a: {'1' * 5000}", "does not fit its tag !!int"),
    "too many hexadecimal digits": (f"a: 0x{'f' * 5000}", "does not fit its tag !!int"),
    "too many octal digits": (f"a: 0o{'7' * 9000}", "does not fit its tag !!int"),
    "half a character": ('a: "\\ud800"', "does not fit its tag !!str"),
    "half a character as a key": ('"\\ud800": a', "is not text"),
    "another document": ("a: 1\n---\na: 2", "expected a single document"),
    "an alias of nothing": ("a: &a 1\nb: *b", "found undefined alias 'b'"),
    "a NUL": ("a: \0", "the character '\\x00' is not allowed"),
    "UTF-16": ("a: 1".encode("utf-16"), "is not UTF-8 text"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.", "is not UTF-8 text"),
    "nothing": ("", "is empty"),
    "a list": ("[1]", "is not a mapping"),
    "a key that is a list": ("? [a, b]\n: 1", "the key '[...]' is not text"),
    "a key that says that it is text": ("? !!str [a, b]\n: 1", "the key '[...]' is not text"),
    "a key that is code": ("? !!python/object/apply:os.mkdir [executed]\n: 1", "the key '[...]' is not text"),
    "a key twice": ("run: {name: a}\nrun: {name: b}", "is given twice"),
    "a merge": ("a: &a {kind: os.system}\nmodel: {<<: *a}", "`<<` is not part of YAML 1.2"),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_a_document_that_exhausts_resources_is_refused(folder, what):
    text, reason = BOMBS[what]
    path = folder / "hostile/bomb.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(str(path))
    assert reason in message
    assert len(message) < 500 + len(str(folder))  # a message quotes only the start of a large value


ROLES = {
    "a model": "model: {kind: %s}",
    "a dataset": "data: {train: {kind: %s}}",
    "an optimizer": "optimizer: {kind: %s, lr: 0.1}",
    "a loss": "trainer: {max_epochs: 1, effective_batch_size: 4, loss: %s}",
    "a metric": "trainer: {max_epochs: 1, effective_batch_size: 4, loss: shop.loss, evaluate: {val: [%s], every_n_epochs: 1}}",
    "a callback": "callbacks: [{kind: %s, every_n_epochs: 1}]",
    "a setting that is a function": "callbacks: [{kind: shop.Watch, every_n_epochs: 1, tolerance: 1, metric: %s}]",
    "an effect": "run: {name: x, handlers: {%s: shop.loss}}",
    "a handler": "run: {name: x, handlers: {noether.core.effect.LogText: %s}}",
}
FORBIDDEN = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.run",
    "builtins.eval",
    "builtins.exec",
    "__main__.exit",
    "importlib.import_module",
    "runpy.run_path",
    "pickle.loads",
    "yaml.unsafe_load",
    "code.interact",
    "pdb.run",
    "this.s",
    "antigravity.geohash",
    "torch.os.system",
    "torch.sys.exit",
    "torch.importlib.import_module",
    "torch.hub.os.system",
    "torch.hub.urlopen",  # torch only re-exports it
    "torch.hub.ZipFile",
    "torch.utils.cpp_extension.subprocess.run",
    "torch.nn.modules.module.torch.os.system",
    "torch.serialization.pickle.loads",
    "noether.effects.disk.calls.os.system",
    "noether.effects.disk.calls.sys.modules",
    "noether.config.objects.import_policy.importlib.import_module",
    "noether.config.yaml_values.yaml.unsafe_load",
    "shop.torch.os.system",
    "shop.Net.__init__.__globals__",
    "shop.Net.__subclasses__",
    "shop.__builtins__.eval",
    "torch.__builtins__.eval",
    "torch.nn.Linear.__class__.__base__.__subclasses__",
    "noether.__main__.main",
    "noether..effects",
    ".os.system",
    "os.system ",
    '"os.system()"',
    '"torch.nn.Linear(3, 3)"',
    '"shop:Net.x"',
    '"../hostile/evil.Net"',
    '"hostile/evil.Net"',
    '"/hostile.evil.Net"',
    "evil.Net",
    "no\u017fuch.thing",
    '"shop\\0.Net"',
    "torch." + "x." * 3000 + "y",
    "torch." + "x" * 50_000,
]


# Each path in two roles and every sixth in all roles, because one function walks the paths of all roles.
@pytest.mark.parametrize(
    ("role", "path"),
    [(role, path) for role in ROLES for path in (FORBIDDEN if role in ("a model", "a loss") else FORBIDDEN[::6])],
    ids=lambda value: value[:40],
)
def test_a_forbidden_path_is_refused_in_every_role(folder, role, path):
    section, _, text = ROLES[role].partition(": ")
    assert refusal(config(folder, **{section: text % path}))


@pytest.mark.parametrize("kind", ["[os.system]", "{kind: os.system}", "null", "3", "true", "[]"])
@pytest.mark.parametrize("role", ROLES)
def test_a_kind_that_is_not_text_is_refused(folder, role, kind):
    section, _, text = ROLES[role].partition(": ")
    assert refusal(config(folder, **{section: text % kind}))


OTHER_ROLES = {
    "a model": [
        "torch.load",
        "torch.save",
        "torch.hub.load",
        "torch.jit.load",
        "torch.optim.SGD",
        "torch.utils.data.Dataset",
        "torch.utils.cpp_extension.load",
        "torch.utils.collect_env.run",
        "torch.ops.load_library",
        "torch.classes.load_library",
        "torch.float32",
        "torch.nn",
        "noether.config.objects.kinds.resolve",
        "noether.effects.disk.files.remove_tree",
        "noether.examples.digits.Digits",
    ],
    "a dataset": ["torch.load", "torch.hub.load", "torch.nn.Linear", "torch.from_file", "noether.effects.open_run"],
    "an optimizer": ["torch.load", "torch.hub.load", "torch.nn.Linear", "torch.optim.lr_scheduler.StepLR", "shop.Net"],
    "a loss": ["torch.nn.Linear", "torch.float32", "torch.nn", "shop.number", "noether.effects.CheckpointStore"],
    "a callback": [
        "torch.nn.Linear",
        "torch.hub.list",
        "torch.utils.collect_env.run",
        "noether.effects.CheckpointStore",
    ],
    "an effect": ["torch.load", "torch.nn", "torch.hub.load"],
}


@pytest.mark.parametrize(("role", "path"), [(role, path) for role, paths in OTHER_ROLES.items() for path in paths])
def test_a_kind_that_fits_another_role_is_refused(folder, role, path):
    section, _, text = ROLES[role].partition(": ")
    assert (
        f"expected {'a function' if role == 'a loss' else 'a type of effect' if role == 'an effect' else role}"
        in refusal(config(folder, **{section: text % path}))
    )


CODE = {
    "source code": '{kind: torch.fx.graph_module.reduce_graph_module, import_block: "import os; os.mkdir(\'executed\')\\n", body: {_code: "def forward(self): pass"}}',
    "source code of a package": "{kind: torch.fx.graph_module.reduce_package_graph_module, importer: x, body: {}, generated_module_name: evil}",
    "a function and its arguments": '{kind: torch.fx.experimental.proxy_tensor.get_isolated_graphmodule, func: torch.utils.collect_env.run, args: ["mkdir executed"], kwargs: {}}',
    "another one": '{kind: torch._higher_order_ops.associative_scan.materialize_as_graph, fn: torch.utils.collect_env.run, args: ["mkdir executed"]}',
    "a script": "{kind: torch.jit.load, f: evil.pt}",
    "a repository": "{kind: torch.hub.load, repo_or_dir: attacker/repository, model: evil, trust_repo: true}",
}


@pytest.mark.parametrize("what", CODE)
def test_a_model_made_from_code_in_the_file_is_refused(folder, what):
    assert "model.kind: " in refusal(config(folder, model=CODE[what]))


PIPES = {
    "a function": '{kind: torch.utils.data.datapipes.iter.Mapper, datapipe: ["mkdir executed"], fn: torch.utils.collect_env.run}',
    "a class": '{kind: torch.utils.data.datapipes.iter.Sampler, datapipe: ["mkdir executed"], sampler: torch.utils.collect_env.run}',
}


@pytest.mark.parametrize("what", PIPES)
def test_a_dataset_that_runs_a_named_function_is_refused(folder, what):
    assert "data.train.datapipe: " in refusal(config(folder, data=f"{{train: {PIPES[what]}}}"))


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("allow", "[hostile, os]"),
        ("--allow", "[os]"),
        ("run", "{name: x, allow: [os]}"),
        ("trainer", "{max_epochs: 1, effective_batch_size: 4, loss: shop.loss, allow: [os]}"),
        ("callbacks", "[{kind: shop.Watch, every_n_epochs: 1, tolerance: 1, allow: [os]}]"),
        ("model", "{kind: os.system, allow: [os]}"),
        ("model", "{kind: os.system, ALLOWED: [os]}"),
    ],
)
def test_a_file_cannot_allow_its_own_imports(folder, section, text):
    assert refusal(config(folder, **{section: text}))


def test_a_prefix_that_the_user_allows_is_imported(folder):
    path = config(folder, trainer=BASE["trainer"].replace("shop.loss", "torch.hub.urlopen"))
    assert "'urllib' is not an allowed prefix" in refusal(path)
    assert import_path(load(path, allow=["urllib"]).trainer.loss).__module__ == "urllib.request"


def test_an_allowed_prefix_ends_at_a_dot(folder):
    (folder / "hostile/torchevil.py").write_text(EVIL)
    assert "there is no module 'torchevil'" in refusal(config(folder, model="{kind: torchevil.Net}"))
    message = refusal(config(folder, model="{kind: os.system}"), allow=("o", "os.path", "osx"))
    assert "'os' is not an allowed prefix" in message


@pytest.mark.parametrize(
    "layout", ["below", "a package", "inside", "a link to it", "a package of the user's with a link"]
)
def test_no_module_of_a_run_is_imported_wherever_the_run_lies(folder, monkeypatch, layout):
    run = folder / "hostile"
    kind = "hostile.evil.Net"
    if layout in ("a package", "a package of the user's with a link"):
        (run / "__init__.py").touch()
    if layout == "inside":  # as after `cd RUN_DIR; noether train --resume .`
        monkeypatch.chdir(run)
        kind = "evil.Net"
        (run / "shop.py").write_text((folder / "shop.py").read_text())
    elif layout == "a link to it":
        (folder / "linked").symlink_to("hostile")
        kind = "linked.evil.Net"
    elif layout == "a package of the user's with a link":
        (folder / "linked").mkdir()
        (folder / "linked/__init__.py").touch()
        (folder / "linked/inner").symlink_to("../hostile")
        kind = "linked.inner.evil.Net"
    path = config(folder, model=f"{{kind: {kind}}}")
    head = kind.partition(".")[0]
    message = refusal(path, run_dir=run)
    assert (
        f"model.kind: '{kind}' is in {run}, the directory of the run itself; to import it, add --allow {head} on the command line"
        in message
    )
    # Only `run_dir` makes the difference: with the module allowed, it is imported.
    assert load(path, allow=(head, "shop"), run_dir=run).model.path == kind
    assert Path("executed").exists()


def test_a_module_outside_of_the_run_directory_is_imported(folder):
    assert load(config(folder, model="{kind: hostile.evil.Net}")).model.path == "hostile.evil.Net"
    assert load(config(folder, model="{kind: shop.Net}"), run_dir=folder / "hostile").model.path == "shop.Net"


def test_invalid_names_of_files_are_refused(folder):
    assert "cannot be the name of a file" in refusal(config(folder, run='{name: x, output: "a\\0b"}'))
    for name in ("../x", "/x", "", ".", "..", "a/b", "a\\\\b", "a\\0b", "a\\nb"):
        assert "is not the name of a folder" in refusal(config(folder, run=f'{{name: "{name}"}}'))


@pytest.mark.parametrize("what", ["a directory", "a link to itself", "nothing"])
def test_files_that_cannot_be_read(folder, what):
    path = folder / "hostile/x.yaml"
    if what == "a directory":
        path.mkdir()
    elif what == "a link to itself":
        path.symlink_to("x.yaml")
    assert refusal(str(path))


def test_an_endless_file_is_read_up_to_the_size_limit(folder):
    (folder / "hostile/x.yaml").symlink_to("/dev/zero")
    assert "has more than 1048576 bytes" in refusal(str(folder / "hostile/x.yaml"))


def test_callbacks_for_other_loops_are_refused_alike(folder):
    path = config(folder, callbacks="[{kind: torch.hub.os.system}]")
    with (
        record_audit() as events,
        pytest.raises(ConfigError, match=r"callbacks\[0\].kind: .*'os' is not an allowed prefix"),
    ):
        load_callbacks(path)
    assert dangerous_events(events) == []
    assert not Path("executed").exists()
