"""Commands that need no torch do not import it; tested by the imports of a fresh process, not by time."""

import os
import subprocess
import sys

import pytest
from command import PATIENCE_S, ROOT

from noether.cli.main import main

# As the installed script does; `-m` would change the name that shell completion uses.
START = "from noether.cli.main import main; main(prog_name='noether')"
REPORTED = "import time:"


def run_and_list_imports(*argv, cwd, code=0, **environment):
    """Run the command line in a separate process; return the modules that it imported, and its output."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", START, *map(str, argv)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith(REPORTED)}
    errors = [line for line in lines if not line.startswith(REPORTED)]
    return modules, "\n".join([*done.stdout.splitlines(), *errors])


def assert_light(modules):
    assert "noether.cli.main" in modules
    assert modules & {"torch", "numpy", "rich", "safetensors", "noether.core.state"} == set()


@pytest.mark.parametrize(
    "argv", [("--help",), ("--version",), *((name, "--help") for name in sorted(main.commands))], ids=" ".join
)
def test_help_needs_no_torch(tmp_path, argv):
    modules, output = run_and_list_imports(*argv, cwd=tmp_path)
    assert output.startswith("noether, version" if argv == ("--version",) else "Usage: noether")
    assert_light(modules)
    assert "noether.config" not in modules


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("no-such-command",), "No such command"),
        (("validate",), "Missing argument 'CONFIG'"),
        (("train", "--smoke"), "give either CONFIG or --resume RUN_DIR"),
        (("plan", "a.yaml", "--at", "E1", "--between", "E1", "E2"), "give either --at or --between"),
    ],
)
def test_usage_needs_no_torch(tmp_path, argv, message):
    modules, output = run_and_list_imports(*argv, cwd=tmp_path, code=2)
    assert message in output
    assert_light(modules)


@pytest.mark.parametrize(
    ("words", "found"), [("noether va", "validate"), ("noether validate --se", "--set"), ("noether plan --p", "--png")]
)
def test_completion_needs_no_torch(tmp_path, words, found):
    environment = {"_NOETHER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    modules, output = run_and_list_imports(cwd=tmp_path, **environment)
    assert output == f"plain,{found}"
    assert_light(modules)


def test_the_completion_script_needs_no_torch(tmp_path):
    modules, output = run_and_list_imports(cwd=tmp_path, _NOETHER_COMPLETE="zsh_source")
    assert "#compdef noether" in output
    assert_light(modules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "does not parse"),
        ("a: 1\na: 2\n", "is given twice"),
        ("- 1\n", "is not a mapping"),
        ("modle: {}\n", "modle: unknown setting; did you mean 'model'?"),
        ("run: 3\n", "run: 3 is not a mapping"),
        ("run: {name: a/b}\n", "'a/b' is not the name of a folder"),
        ("model: 3\n", "model: 3 is not a mapping with a `kind`"),
        ("model: {width: 3}\n", "model.kind: is missing"),
        ("model: {kind: ConvNet}\n", "'ConvNet' is not a dotted path"),
        ("model: {kind: os.system}\n", "'os' is not an allowed prefix"),
        ("callbacks: [{kind: no_such_module.Callback}]\n", "there is no module 'no_such_module'"),
        ("trainer: {loss: no_such_module.loss}\n", "there is no module 'no_such_module'"),
    ],
)
def test_mistakes_outside_of_classes_are_found_without_torch(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    modules, output = run_and_list_imports("validate", "bad.yaml", cwd=tmp_path, code=2)
    assert message in output
    assert_light(modules)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(("missing.yaml",), "no such file"), ((".",), "is a directory"), (("a.yaml", "--set", "x"), "form key=value")],
)
def test_unreadable_files_are_found_without_torch(tmp_path, argv, message):
    (tmp_path / "a.yaml").write_text("run: {}\n")
    modules, output = run_and_list_imports("validate", *argv, cwd=tmp_path, code=2)
    assert message in output
    assert_light(modules)


def test_a_valid_configuration_needs_torch(tmp_path):
    modules, output = run_and_list_imports("validate", ROOT / "configs/digits.yaml", cwd=tmp_path)
    assert "is valid" in output
    assert {"torch", "noether.core.state", "noether.training.runs.services"} <= modules


def test_importing_the_commands_does_not_import_the_compiler():
    commands = "callbacks, evaluate, replay, report, train"
    code = f"from noether.cli.commands import {commands}; import noether.cli.plan.command, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch.optim" in done.stdout.split()
    assert "torch._dynamo" not in done.stdout.split()
