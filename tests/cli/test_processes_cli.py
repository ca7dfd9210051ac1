"""The command line as one of several processes."""

import pytest
from command import SMALL, contents, invoke

import noether
from noether.distributed.launch import LaunchError

UNSET = (
    "WORLD_SIZE is set to 2, but not RANK, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_RUN_ID: start the processes with "
    "torchrun"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train small.yaml", UNSET), ("train small.yaml --smoke", UNSET),
        ("plan small.yaml", None), ("validate small.yaml", None), ("callbacks", None),
    ],
)  # fmt: skip
def test_commands_that_train_are_refused_in_one_line_without_a_launcher(words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "missing").mkdir()
    before = contents(tmp_path)
    said = invoke(*words.split(), cwd=tmp_path, code=int(message is not None))
    if message is not None:
        assert message in said
        assert len(said.strip().splitlines()) == 1
        assert contents(tmp_path) == before


def test_train_is_refused_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(LaunchError, match="start the processes with torchrun, or unset WORLD_SIZE"):
        noether.train(tmp_path / "small.yaml", output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
