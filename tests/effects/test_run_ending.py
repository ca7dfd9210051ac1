"""What is saved after an exception ends a run, and what the notes on the exception say."""

import json

import pytest

from noether.core.effect import LogScalars, SaveCheckpoint
from noether.core.event import AfterEpoch, AfterTraining
from noether.core.reducer import compose
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict
from noether.effects import open_run
from noether.effects.run_ending import record_failure
from noether.effects.run_files import TRACEBACK_FILE


def log_epoch(state, event):
    return state, (LogScalars(FrozenDict(epoch=state.iteration.epoch)),)


def fail(state, event):
    raise IndexError("a bug of the user's")


def failed_epoch(directory, settled):
    """Raise an exception at the end of an epoch, record it, and return it."""
    state, event = settled.next_epoch(), AfterEpoch()
    with pytest.raises(IndexError) as raised:
        compose(log_epoch, fail)(state, event)
    record_failure(raised.value, directory, settled, (state, event), directory.interpreter)
    return raised.value


def test_the_settled_state_and_the_logs_of_the_event_are_written(tmp_path):
    settled = TrainState().advance(samples=4)
    with open_run(tmp_path) as directory:
        error = failed_epoch(directory, settled)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["metrics"] for line in lines] == [{"epoch": 1}]
    written = (tmp_path / TRACEBACK_FILE).read_text()
    assert "in fail" in written
    assert "raised by the callback 'fail' at E1_U1_S4, AfterEpoch" in written
    assert error.__notes__ == [
        "raised by the callback 'fail' at E1_U1_S4, AfterEpoch",
        f"the state at E0_U1_S4 is saved in {tmp_path}",
        f"the traceback is in {tmp_path / TRACEBACK_FILE}",
    ]
    with open_run(tmp_path) as directory:
        assert directory.resume().iteration == settled.iteration
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # the resumed run logs the event again


def test_an_update_that_was_not_completed_has_no_state_to_save(tmp_path):
    with open_run(tmp_path) as directory:
        error = ValueError("out of memory")
        for state in (TrainState(), TrainState().advance(samples=4)):
            record_failure(error, directory, None, (state, AfterEpoch()), directory.interpreter)
        assert directory.load() is None
    assert error.__notes__[::2] == [
        "no update was completed: a resumed run begins at update 0",
        "nothing is saved at E0_U1_S4, because the run could not continue exactly from there",
    ]


def test_an_earlier_error_of_a_background_save_does_not_prevent_the_save(tmp_path):
    settled = TrainState().advance(samples=4)
    with open_run(tmp_path, asynchronous=True) as directory:
        (tmp_path / "checkpoints").write_text("in the way")
        directory.interpreter((SaveCheckpoint(),), settled, AfterTraining())
        (tmp_path / "checkpoints").unlink()
        failed_epoch(directory, settled)
        assert directory.load().iteration == settled.iteration


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_failed_save_is_a_note_on_the_exception(tmp_path, on_error):
    with open_run(tmp_path, on_error=on_error) as directory:
        (tmp_path / "checkpoints").write_text("in the way")
        error = failed_epoch(directory, TrainState().advance(samples=4))
    assert str(error) == "a bug of the user's"
    assert error.__notes__[1].startswith("the state at E0_U1_S4 could not be saved: ")
    assert error.__notes__[2] == f"the traceback is in {tmp_path / TRACEBACK_FILE}"
