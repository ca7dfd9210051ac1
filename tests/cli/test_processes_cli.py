"""The command line as one of several processes."""

import pytest
from command import SMALL, contents, invoke

import noether
from noether.session.processes import ProcessesError


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("train small.yaml", True), ("train small.yaml --smoke", True), ("train --resume missing", True),
        ("eval missing", True), ("plan small.yaml", False), ("validate small.yaml", False), ("callbacks", False),
    ],
)  # fmt: skip
def test_only_commands_that_train_or_evaluate_are_refused_in_one_line(words, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "missing").mkdir()
    before = contents(tmp_path)
    said = invoke(*words.split(), cwd=tmp_path, code=int(refused))
    assert ("this is one of 2 processes (WORLD_SIZE=2, as torchrun sets it)" in said) == refused
    if refused:
        assert len(said.strip().splitlines()) == 1
        assert contents(tmp_path) == before


def test_train_is_refused_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(ProcessesError, match="start it without torchrun, or unset WORLD_SIZE"):
        noether.train(tmp_path / "small.yaml", output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
