"""What a run records of the process that trains it."""

import json
import shutil
import subprocess

import pytest
import torch
import yaml  # noqa: F401  # a package whose module has another name
from hypothesis import given
from hypothesis import strategies as st

import noether
from noether import Run, TrainState, open_run
from noether.effects.logs.summary_entries import read_summary
from noether.effects.provenance import process
from noether.effects.provenance.process import command_line, describe_process
from noether.session import provenance
from noether.session.provenance import record_process

SECRET_NAMES = ["--token", "--hub-token", "WANDB_API_KEY", "model.api_key", "--password", "secret", "data.access-key"]
PLAIN_NAMES = [
    "--max-tokens",
    "metric_key",
    "data.tokenizer",
    "--keyword",
    "monkey",
    "trainer.dataset_key",
    "secretary",
]
CONFIG = {
    "run": {"name": "digits", "seed": 5},
    "model": {"kind": "noether.examples.digits.ConvNet", "width": 2},
    "data": {"train": {"kind": "noether.examples.digits.Digits", "split": "val"}},
    "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
    "trainer": {"max_updates": 2, "effective_batch_size": 8, "loss": "noether.examples.digits.cross_entropy"},
}


@given(st.sampled_from(SECRET_NAMES), st.text("abcde/@:=' ", min_size=8), st.booleans())
def test_no_secret_is_in_the_command_line(name, secret, joined):
    secret = f"XYZ{secret}ZYX"
    words = [f"{name}={secret}"] if joined or not name.startswith("-") else [name, secret]
    text = command_line(["python3", "train.py", *words, "last"])
    assert "XYZ" not in text
    assert "ZYX" not in text
    assert text.startswith("python3 train.py ")
    assert text.endswith(" last")


@given(st.sampled_from(PLAIN_NAMES), st.text("abcde", min_size=8))
def test_other_settings_stay(name, value):
    assert command_line(["python3", f"{name}={value}"]) == f"python3 {name}={value}"


def test_the_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = describe_process([torch.device("cpu")], lambda content, suffix: "")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["git"] is None
    assert facts["directory"] == str(tmp_path)
    assert facts["packages"]["torch"] == torch.__version__
    assert {"noether", "numpy", "pytest", "hypothesis", "pyyaml"} <= facts["packages"].keys()
    assert list(facts["devices"]) == ["cpu"]


@pytest.fixture(autouse=True)
def read_again():
    """Forget what an earlier test read a moment ago."""
    process.read_code_and_packages.cache_clear()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("x = 1\n")
    names = ["-c", "user.name=me", "-c", "user.email=me@host"]
    git = shutil.which("git")
    for arguments in (["init"], ["add", "."], [*names, "commit", "-m", "first"]):
        subprocess.run([git, *arguments], check=True, capture_output=True)
    (tmp_path / "mine.py").write_text("x = 2\n")
    return tmp_path


def test_a_run_records_its_processes(repository):
    run = noether.train(CONFIG, output="out")
    first = read_summary(run.directory / "summary.json")["processes"]
    assert list(first) == ["E0_U0_S0"]
    facts = first["E0_U0_S0"]
    assert (facts["seed"], facts["samples"]) == (5, {"train": 296})
    assert facts["git"]["dirty"]
    assert b"+x = 2" in (run.directory / facts["git"]["diff"]).read_bytes()

    (repository / "mine.py").write_text("x = 1\n")
    process.read_code_and_packages.cache_clear()
    noether.train(resume=run.directory, overrides=["trainer.max_updates=4"])
    both = read_summary(run.directory / "summary.json")["processes"]
    assert list(both) == ["E0_U0_S0", "E0_U2_S16"]
    assert both["E0_U0_S0"] == facts
    assert (both["E0_U2_S16"]["git"]["dirty"], both["E0_U2_S16"]["git"]["diff"]) == (False, None)


def test_a_branch_records_the_process_that_continues_it(repository):
    run = noether.train(CONFIG, output="out")
    branch = noether.train(resume=run.directory, into="branch", overrides=["trainer.max_updates=3"])
    assert list(read_summary(branch.directory / "summary.json")["processes"]) == ["E0_U2_S16"]


def test_an_error_does_not_stop_the_run(repository, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError("no facts today")

    monkeypatch.setattr(provenance, "describe_process", fail)
    with open_run("run") as directory:
        record_process(directory, TrainState(), Run())
    assert "no facts today" in caplog.text


def test_only_rank_0_records(repository):
    with open_run("run", rank=1) as directory:
        record_process(directory, TrainState(), Run())
    assert not (repository / "run").exists()
