"""`trainer.donate` and `trainer.compile` from the command line: the same run, to the bit or nearly."""

from command import SMALL, noether, only_run, saved, timeless, weights

from noether.testing import same

FILES = ("weights.safetensors", "optimizer.safetensors")


def trained(folder, *settings):
    folder.mkdir()
    (folder / "small.yaml").write_text(SMALL)
    written = noether("train", "small.yaml", *(f"--set={setting}" for setting in settings), cwd=folder)
    return only_run(folder / "out/small"), written.stdout + written.stderr


def test_donation_changes_no_bit(tmp_path):
    (donated, _), (pure, _) = trained(tmp_path / "a"), trained(tmp_path / "b", "trainer.donate=false")
    assert saved(donated, *FILES) == saved(pure, *FILES)
    assert timeless(donated) == timeless(pure)


def test_a_compiled_run_goes_on_with_the_bits_of_one_that_was_not_stopped(tmp_path):
    compiled = ("trainer.compile=true", "model.dropout=0.1")
    (uncut, said), (cut, _) = (
        trained(tmp_path / "a", *compiled),
        trained(tmp_path / "b", *compiled, "trainer.max_epochs=1"),
    )
    assert "not compiled" not in said
    noether("train", "--resume", str(cut), "--set", "trainer.max_epochs=2", cwd=tmp_path / "b")
    assert same(weights(cut), weights(uncut))


def test_what_cannot_be_compiled_trains_and_says_why(tmp_path):
    run, said = trained(tmp_path / "a", "trainer.compile=true", "trainer.nonfinite=skip", "trainer.max_epochs=1")
    assert "updates are not compiled: nonfinite: skip decides in the middle of an update" in said
    assert (run / "summary.json").is_file()
