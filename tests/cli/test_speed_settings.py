"""`trainer.donate` and `trainer.compile` from the command line do not change what a run computes."""

import pytest
from command import EXACT, SMALL, last_files, noether, only_run, timeless, weights

from noether.testing import same


def train(folder, *settings):
    folder.mkdir()
    (folder / "small.yaml").write_text(SMALL)
    done = noether("train", "small.yaml", *(f"--set={setting}" for setting in settings), cwd=folder)
    return only_run(folder / "out/small"), done.stdout + done.stderr


def test_donation_does_not_change_results(tmp_path):
    (donated, _), (pure, _) = train(tmp_path / "a"), train(tmp_path / "b", "trainer.donate=false")
    assert last_files(donated, *EXACT) == last_files(pure, *EXACT)
    assert timeless(donated) == timeless(pure)


@pytest.mark.slow
def test_a_resumed_compiled_run_equals_the_uncut_run(tmp_path):
    compiled = ("trainer.compile=true", "model.dropout=0.1")
    (uncut, output), (cut, _) = (
        train(tmp_path / "a", *compiled),
        train(tmp_path / "b", *compiled, "trainer.max_epochs=1"),
    )
    assert "not compiled" not in output
    noether("train", "--resume", str(cut), "--set", "trainer.max_epochs=2", cwd=tmp_path / "b")
    assert same(weights(cut), weights(uncut))


def test_training_without_compilation_says_why(tmp_path):
    run, output = train(tmp_path / "a", "trainer.compile=true", "trainer.nonfinite=skip", "trainer.max_epochs=1")
    assert "updates are not compiled: nonfinite: skip decides in the middle of an update" in output
    assert (run / "summary.json").is_file()
