"""Log files on resume: the lines that a resumed run logs again are removed, and no others."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_files import at, read, update_at

from noether import (
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    LogScalars,
)
from noether.effects import LogError
from noether.effects.logs.jsonl import LogCount
from noether.effects.logs.metrics import metrics_file

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_all(path, *lines):
    metrics = metrics_file(path)
    for state, event in lines:
        metrics.write(LogScalars({"x": state.iteration.update}), state, event)
    metrics.close()


def test_truncate_removes_lines_that_a_resumed_run_logs_again(path):
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in range(1, 6)))
    assert metrics_file(path).truncate(at(3)) == 2
    assert [line["update"] for line in read(path)] == [1, 2, 3]
    assert metrics_file(path).truncate(at(3)) == 0


def test_truncate_removes_the_end_of_an_epoch_that_had_not_ended(path):
    update = (at(3), AfterUpdate(samples=4))
    write_all(path, update, (at(3, epoch=1), AfterEpoch()))
    intact = path.read_text()
    assert metrics_file(path).truncate(at(3, epoch=1)) == 0
    assert path.read_text() == intact
    assert metrics_file(path).truncate(at(3)) == 1
    assert [line["event"] for line in read(path)] == ["after_update"]


def test_truncate_removes_the_end_of_training_unless_the_state_has_ended(path):
    lines = [(at(3, epoch=1), AfterEpoch()), (at(3, epoch=1), AfterTraining())]
    write_all(path, *lines)
    assert metrics_file(path).truncate(at(3, epoch=1, ended=True)) == 0
    assert metrics_file(path).truncate(at(3, epoch=1)) == 1
    assert [line["event"] for line in read(path)] == ["after_epoch"]
    # An earlier end stays, if the run was then extended.
    write_all(path, lines[1], (at(4, epoch=1), AfterUpdate(samples=4)))
    assert metrics_file(path).truncate(at(4, epoch=1)) == 0


def test_truncate_removes_all_lines_for_a_new_run(path):
    write_all(path, (at(0), AfterUpdate(samples=4)), (at(1), AfterUpdate(samples=4)))
    assert metrics_file(path).truncate(None) == 2
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ['{"event": "after', "{", "\x00\x00", "[]\n", '{"event": "after_update"}\n'])
def test_truncate_removes_a_partial_last_line(path, torn):
    write_all(path, (at(1), AfterUpdate(samples=4)))
    intact = path.read_text()
    path.write_text(intact + torn)
    assert metrics_file(path).truncate(at(9)) == 1
    assert path.read_text() == intact


def test_truncate_removes_a_last_line_without_line_end(path):
    write_all(path, (at(1), AfterUpdate(samples=4)), (at(2), AfterUpdate(samples=4)))
    path.write_text(path.read_text().rstrip("\n"))
    metrics_file(path).truncate(at(2))
    write_all(path, (at(3), AfterUpdate(samples=4)))
    assert [line["update"] for line in read(path)] == [1, 3]


def test_a_foreign_line_is_reported_with_its_number(path):
    write_all(path, (at(1), AfterUpdate(samples=4)))
    path.write_text("hello\n" + path.read_text())
    before = path.read_text()
    with pytest.raises(LogError) as error:
        metrics_file(path).truncate(at(1))
    assert str(error.value) == f"{path}:1: not a log line: 'hello\\n'; remove this line, and resume again"
    assert path.read_text() == before


@UNTIMED
@given(written=st.integers(1, 8), cut_at=st.integers(0, 8), torn=st.integers(0, 60))
def test_a_log_truncated_anywhere_and_continued_equals_the_uncut_log(tmp_path_factory, written, cut_at, torn):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    events = [(at(update), AfterUpdate(samples=4)) for update in range(1, 10)]
    write_all(path, *events)
    intact = path.read_text()
    path.unlink()
    write_all(path, *events[:written])
    last_start = path.read_text()[:-1].rfind("\n") + 1
    kept = min(cut_at, written - 1)  # the last line may be partial, so the state is older
    path.write_text(path.read_text()[: last_start + torn])
    metrics_file(path).truncate(at(kept))
    write_all(path, *events[kept:])
    assert path.read_text() == intact


def test_truncate_without_a_file_is_a_no_op(path):
    assert metrics_file(path).truncate(at(1)) == 0
    assert not path.exists()


def test_a_damaged_line_that_was_saved_is_an_error_and_not_a_partial_line(path):
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in (1, 2)))
    damaged = path.read_text()[:-9] + "\n"
    path.write_text(damaged)
    with pytest.raises(LogError, match=f"^{path}:2: not a log line: "):
        metrics_file(path).truncate(at(2), LogCount(2))
    assert path.read_text() == damaged
    assert metrics_file(path).truncate(at(2), LogCount(1, lost=1)) == 1


def test_missing_saved_lines_are_reported_and_counted_as_lost(path, caplog):
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in (1, 3)))
    metrics = metrics_file(path)
    assert metrics.truncate(at(3), LogCount(4, lost=2)) == 0
    assert f"{path} misses 2 of its 4 saved lines" in caplog.text
    assert metrics.fsync(metrics.counts) == LogCount(2, lost=4)


@UNTIMED
@given(cut_at=st.integers(0, 10_000), zeros=st.integers(0, 3))
def test_a_log_cut_off_anywhere_within_its_saved_lines_continues(tmp_path_factory, cut_at, zeros):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in range(1, 6)))
    content = path.read_bytes()
    content = content[: cut_at % len(content)]
    whole = content.count(b"\n")
    path.write_bytes(content + bytes(zeros))
    metrics = metrics_file(path)
    metrics.truncate(at(5), LogCount(5))
    assert metrics.fsync(metrics.counts) == LogCount(whole, lost=5 - whole)
    metrics.write(LogScalars({"x": 6}), at(6), AfterUpdate(samples=4))
    metrics.close()
    assert [line["update"] for line in read(path)] == [*range(1, whole + 1), 6]


def test_a_log_cut_off_within_its_saved_lines_is_reported_in_one_line(path, caplog):
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in range(1, 6)))
    path.write_text(path.read_text()[:-200])
    metrics_file(path).truncate(at(5), LogCount(5))
    assert caplog.messages == [f"{path} misses 2 of its 5 saved lines; its last line was cut off, and is removed"]


def test_a_file_whose_saved_lines_are_unknown_reports_that_it_was_cut_off(path, caplog):
    """As `events.jsonl`."""
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in range(1, 4)))
    path.write_text(path.read_text()[:-20])
    assert metrics_file(path).truncate(at(5)) == 1
    assert caplog.messages == [f"{path} has 2 whole lines; its last line was cut off, and is removed"]


def test_lines_counted_as_lost_that_are_found_are_no_longer_counted_as_lost(path):
    """As after a failed fsync without a power loss."""
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in (1, 2, 3)))
    metrics = metrics_file(path)
    assert metrics.truncate(at(3), LogCount(1, lost=2)) == 0
    assert metrics.fsync(metrics.counts) == LogCount(3, lost=0)


def test_truncate_applies_to_buffered_lines(path):
    metrics = metrics_file(path)
    for update in range(6):
        metrics.write(LogScalars({"x": 1}), at(update), update_at(update / 10))
    assert metrics.truncate(at(3)) == 2
    assert [line["update"] for line in read(path)] == [0, 1, 2, 3]
