"""A plan for several ranks: their shares, and warnings where ranks have nothing to do or a save would be cut short."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import noether.planning.rank_shares
from noether.cli.main import main
from noether.config import load
from noether.planning.plan import make_plan

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"


def plan_digits(world_size, *settings):
    return make_plan(load(DIGITS, settings), world_size=world_size)


def rank_lines(world_size, *settings):
    """Return the notes and warnings that one process does not have."""
    alone, together = plan_digits(1, *settings), plan_digits(world_size, *settings)
    notes, warnings = together.notes[len(alone.notes) :], together.warnings[len(alone.warnings) :]
    return [str(each) for each in (*notes, *warnings)]


def test_when_callbacks_fire_does_not_depend_on_the_ranks():
    alone, together = plan_digits(1), plan_digits(3)
    assert [each.firings for each in together.callbacks] == [each.firings for each in alone.callbacks]
    assert together.checkpoints == alone.checkpoints


def test_notes_say_what_each_rank_trains_on():
    assert rank_lines(3) == ["each of 3 ranks trains on 10 or 11 of 32 samples of an update"]
    assert rank_lines(2, "trainer.effective_batch_size=50") == [
        "each of 2 ranks trains on 25 of 50 samples of an update"
    ]


def test_ranks_without_samples_are_named():
    (note, warning, *_) = rank_lines(64)
    assert note == "each of 64 ranks trains on 0 or 1 of 32 samples of an update"
    assert "an update has 32 samples, so 32 of 64 ranks train on nothing; write at least 64" in warning
    assert warning.startswith(f"{DIGITS}:")


def test_evaluations_with_fewer_batches_than_ranks_are_named():
    (warning,) = [each for each in rank_lines(8, "trainer.eval_batch_size=100") if "wait during" in each]
    assert "data.val has 3 batches of 100 samples, so 5 of 8 ranks wait during its evaluations" in warning
    assert "trainer.eval_batch_size" in warning


def test_a_save_that_a_launcher_cuts_short_is_named(monkeypatch):
    monkeypatch.setattr(noether.planning.rank_shares, "_SAVED_BYTES_PER_S", 1000)
    (warning,) = [each for each in rank_lines(2) if "SIGTERM" in each]
    assert "torchrun kills its processes 30 s after a SIGTERM" in warning
    assert "--shutdown-timeout=" in warning


@pytest.mark.parametrize("ranks", ["0", "two"])
def test_the_number_of_ranks_is_checked(ranks):
    result = CliRunner().invoke(main, ["plan", str(DIGITS), "--ranks", ranks])
    assert result.exit_code == 2
    assert "--ranks" in result.output


def test_the_command_line_plans_for_ranks():
    result = CliRunner().invoke(main, ["plan", str(DIGITS), "--ranks", "2", "--json"])
    assert json.loads(result.stdout)["ranks"] == 2
    assert "; 2 ranks" in CliRunner().invoke(main, ["plan", str(DIGITS), "--ranks", "2"]).stdout
