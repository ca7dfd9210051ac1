"""`trainer.max_hours`: a run that has taken its time is saved and left, and resumes exactly."""

import json
import re
from functools import partial
from itertools import count

import pytest
from command import check_equal, contents, invoke, only_run, set_options

from noether.config import ConfigError, load
from noether.session.timing import Clock
from noether.training.runs.interruption import Interruption


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Let an hour pass from each look at the clock to the next."""
    seconds = count(0, 3600)
    clock = Clock(elapsed_s=lambda: next(seconds))
    monkeypatch.setattr("noether.cli.commands.train.Interruption", partial(Interruption, clock=clock))


def limit(output, hours, *settings):
    return set_options([f"run.output={output}", f"trainer.max_hours={hours}", *settings])


def test_a_job_script_resumes_a_run_until_it_ends(paper, tmp_path):
    """Exit code 75 asks for another process; each has the whole time again."""
    shown = invoke("train", "paper.yaml", *limit(tmp_path, 20.5), cwd=paper, code=75).splitlines()
    run = only_run(tmp_path / "paper")
    (place,) = re.findall(r"^saved (E1_U\d+_S\d+)$", "\n".join(shown), flags=re.MULTILINE)
    ending = f"interrupted at {place}: trainer.max_hours (20.5) has passed"
    assert shown[-2:] == [f"{ending}; the run is in {run}", f"resume with: noether train --resume {run}"]
    assert json.loads((run / "summary.json").read_text())["ending"] == ending
    again = invoke("train", "--resume", run, cwd=paper, code=75).splitlines()
    assert again[0] == f"resuming at {place}"
    assert again[-1] == shown[-1]
    last = invoke("train", "--resume", run, "--set", "trainer.max_hours=100", cwd=paper)  # it may change
    assert last.splitlines()[-1] == f"ended at E3_U45_S180; the run is in {run}"
    check_equal(run, only_run(paper / "out/paper"))


def test_a_run_that_ends_in_its_time_ends_as_without_a_limit(paper, tmp_path):
    assert "resume with" not in invoke("train", "paper.yaml", *limit(tmp_path, 1000), cwd=paper)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_time_in_which_a_run_gets_no_further_is_an_error(paper, tmp_path, evaluates):
    """A job script would resume it without end."""
    settings = ["trainer.evaluate_first=true"] if evaluates else []
    shown = invoke("train", "paper.yaml", *limit(tmp_path, 0.5 + evaluates, *settings), cwd=paper, code=1).splitlines()
    assert ("nothing is saved: the first update was not completed" if evaluates else "saved E0_U0_S0") in shown
    assert shown[-1] == (
        f"Error: trainer.max_hours: {0.5 + evaluates} is too short: the process ends where it began, at E0_U0_S0, and "
        "so would one that resumes the run; give it more hours"
    )


def test_a_resumed_run_that_gets_no_further_is_left_as_it_was(paper, tmp_path):
    invoke("train", "paper.yaml", *limit(tmp_path, 8), cwd=paper, code=75)
    run = only_run(tmp_path / "paper")
    before = contents(run / "checkpoints")
    shown = invoke("train", "--resume", run, "--set", "trainer.max_hours=1e-9", cwd=paper, code=1)
    assert "trainer.max_hours: 1e-09 is too short: the process ends where it began, at E0_U" in shown
    assert contents(run / "checkpoints") == before


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "true", "12h"])
def test_a_limit_that_is_no_time_is_refused(paper, value):
    with pytest.raises(ConfigError, match=r"trainer.max_hours: .* is not a number"):
        load(paper / "paper.yaml", [f"trainer.max_hours={value}"], ["paper"])


def test_the_setting_of_another_framework_is_answered(paper):
    with pytest.raises(ConfigError, match=r"trainer.max_time: is no setting here: write max_hours, such as 11.5"):
        load(paper / "paper.yaml", ["trainer.max_time=00:12:00:00"], ["paper"])


def test_a_limit_changes_no_plan(paper):
    planned = [invoke("plan", "paper.yaml", *set_options(each), cwd=paper) for each in ([], ["trainer.max_hours=1e-9"])]
    assert planned[0] == planned[1]
    assert "45 updates" in invoke("validate", "paper.yaml", "--set", "trainer.max_hours=2", cwd=paper)
