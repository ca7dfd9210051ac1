"""Logs of several updates at once are those of an effect at each of them: same lines, same calls of services."""

import gc
import io
import json
import math
import weakref
from contextlib import redirect_stdout, suppress
from itertools import pairwise

import pytest
import torch
from faults import Faults, call_without_fsync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_files import BEGIN_S, at, read, update_at
from rich.console import Console as RichConsole

from noether import AfterUpdate, LogScalars, LogText, MeasurePeakMemory, Run, open_run
from noether.core.effect import LogUpdates, LogUpdateText, UpdateScalars
from noether.core.tensors.tree import FrozenDict
from noether.effects.console.console import Console
from noether.effects.disk.calls import Disk
from noether.effects.disk.json_numbers import to_plain
from noether.effects.interpreter import Interpreter, merge_effects, on_all_ranks
from noether.effects.logs.jsonl import LogCount
from noether.effects.logs.metrics import metrics_file

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.sampled_from([0, 0.0, -0.0, False, 1, 1.0, True, "text", None]),
    st.floats(width=32).map(torch.tensor),
    st.floats().map(lambda value: torch.tensor(value, dtype=torch.float64).numpy()[()]),
)
VALUES = st.dictionaries(st.sampled_from(["loss", "optim/lr", 'quo"te', "é"]), NUMBERS, min_size=1, max_size=3)
TIMES = st.one_of(st.just(0.0), st.floats(-2, 3).map(lambda seconds: BEGIN_S + seconds))


@st.composite
def updates(draw):
    """Rows of updates, in which neighbours often have the same object."""
    rows, values = [], FrozenDict()
    for update in range(1, 1 + draw(st.integers(1, 12))):
        if not values or draw(st.booleans()):
            values = draw(st.one_of(VALUES, VALUES.map(FrozenDict)))
        rows.append(UpdateScalars(at(update).iteration, AfterUpdate(samples=4, time_s=draw(TIMES)), values))
    return rows


def write_each(metrics, rows):
    for row in rows:
        metrics.write(LogScalars(row.values), at(row.iteration.update), row.event)


def write_together(metrics, rows):
    metrics.write_updates(LogUpdates(tuple(rows)), at(rows[-1].iteration.update), rows[-1].event)


def line_of(row):
    """Return the line of an update as the encoder of Python gives it."""
    counts = {"epoch": 0, "update": row.iteration.update, "sample": row.iteration.sample}
    line = {"run": 'r"', "event": "after_update", **counts, "time_s": row.event.time_s, "metrics": row.values}
    return json.dumps(to_plain(line), allow_nan=False) + "\n"


@UNTIMED
@given(updates(), st.sets(st.integers(1, 11)), st.booleans())
def test_several_updates_have_the_lines_of_single_ones(tmp_path_factory, rows, cuts, ends_with_single):
    folder, disk = tmp_path_factory.mktemp("log"), Disk(call_without_fsync)
    single, together = (metrics_file(folder / name, 'r"', disk) for name in ("single", "together"))
    bounds = [0, *(cut for cut in sorted(cuts) if cut < len(rows)), len(rows)]
    for index, (begin, end) in enumerate(pairwise(bounds)):
        write_each(single, rows[begin:end])
        (write_each if ends_with_single and index % 2 else write_together)(together, rows[begin:end])
        assert together.counts >= single.counts  # at least what single updates had flushed
    single.close()
    together.close()
    written = (folder / "together").read_text()
    assert written == (folder / "single").read_text() == "".join(map(line_of, rows))
    assert together.counts == single.counts == LogCount(len(rows))


class Recorder:
    """A log service that records the scalars it gets."""

    name = "recorder"

    def __init__(self):
        self.logged = []

    def log_text(self, effect, state, event):
        self.logged.append((effect, state.iteration, event))

    def log_scalars(self, effect, state, event):
        self.logged.append((effect.values, effect.quiet, state.iteration, event))

    def __getattr__(self, name):
        return lambda *_: None


def run_effects(path, calls):
    """Run the effects of each call; return the metrics lines, the lines of the console, and what a service got."""
    recorder, written = Recorder(), io.StringIO()
    with redirect_stdout(written), open_run(path, services=[recorder]) as directory:
        for effects, state, event in calls:
            directory.interpreter(effects, state, event)
    return (path / "metrics.jsonl").read_text().replace(path.name, ""), written.getvalue(), recorder.logged


@settings(UNTIMED, max_examples=30)
@given(updates(), st.integers(1, 12), st.frozensets(st.sampled_from(["loss", "optim/lr"])), st.sets(st.integers(1, 12)))
def test_every_log_of_a_run_gets_several_updates_as_single_ones(tmp_path_factory, rows, size, quiet, lines):
    rows = [row._replace(values=FrozenDict(to_plain(row.values))) for row in rows]  # comparable, without tensors
    folder = tmp_path_factory.mktemp("runs")
    text = LogText("half", is_progress=True)

    def texts_of(row):
        return [LogUpdateText(row.iteration, row.event, text)] if row.iteration.update in lines else []

    single = [
        (
            (*(each.text for each in texts_of(row)), LogScalars(row.values, quiet & row.values.keys())),
            at(row.iteration.update),
            row.event,
        )
        for row in rows
    ]
    parts = [tuple(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
    together = [
        (
            (LogUpdates(part, quiet), *(text for row in part for text in texts_of(row))),
            at(part[-1].iteration.update),
            part[-1].event,
        )
        for part in parts
    ]
    assert run_effects(folder / "together", together) == run_effects(folder / "single", single)


# ------------------------------------------------------------------------------------------------ lines


def rows_of(*values, seconds=0.1):
    """Return a row for each dict of values, at updates 1, 2, ... with the given seconds between them."""
    return [
        UpdateScalars(at(update).iteration, update_at(seconds * update), each) for update, each in enumerate(values, 1)
    ]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_buffered_rows_hold_no_tensors_and_keep_the_values_of_their_update(path):
    metrics, value = metrics_file(path), torch.tensor(0.5)
    metrics.write(LogScalars({"x": 0}), at(0), update_at(0))
    changed = {"x": 1.0}
    write_together(metrics, rows_of({"x": value}, changed, {"x": value}))
    changed["x"] = 2.0
    value.zero_()  # as in a donated buffer
    weak = weakref.ref(value)
    del value
    gc.collect()
    assert weak() is None
    metrics.close()
    assert [line["metrics"]["x"] for line in read(path)] == [0, 0.5, 1.0, 0.5]


def test_an_object_that_changed_between_two_lines_is_encoded_again(path):
    metrics, values = metrics_file(path), {"x": 1.0}
    for update in (1, 2):
        metrics.write(LogScalars(values), at(update), update_at(update))
        values["x"] = 2.0
    assert [line["metrics"]["x"] for line in read(path)] == [1.0, 2.0]


def test_equal_numbers_of_different_types_are_not_confused(path):
    metrics, values = metrics_file(path), [0, 0.0, -0.0, False, 1, 1.0, True]
    write_together(metrics, rows_of(*[FrozenDict(x=value) for value in values]))
    assert [str(line["metrics"]["x"]) for line in read(path)] == list(map(str, values))


def test_a_live_display_gets_the_metrics_of_every_update(monkeypatch):
    for name in ("CI", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    written = io.StringIO()
    written.isatty = lambda: True
    console = Console(RichConsole(file=written, force_terminal=True, width=80, height=24))
    assert console.has_display
    rows = rows_of({"loss/x": 3.0}, {"loss/x": 1.0}, {"loss/x": 2.0})
    console.write_updates(LogUpdates(tuple(rows)), at(3), update_at(0.3))
    console.close()
    metric = console.view.metrics["loss/x"]
    assert (metric.value, metric.best, metric.best_at) == (2.0, 1.0, "E0_U2_S8")


def test_a_row_that_cannot_be_read_is_lost_and_the_others_are_written(path):
    metrics = metrics_file(path)
    with pytest.raises(RuntimeError, match="cannot be converted to Scalar"):
        write_together(metrics, rows_of({"x": 1}, {"x": torch.ones(2)}, {"x": 3}))
    assert [line["metrics"]["x"] for line in read(path)] == [1, 3]
    assert metrics.counts == LogCount(2, lost=1)


def test_a_row_that_is_not_json_is_lost_and_the_others_are_written(path):
    metrics, bad = metrics_file(path), FrozenDict(x=object())
    with pytest.raises(TypeError, match="not JSON"):
        write_together(metrics, rows_of({"x": 1}, bad, bad, {"x": 4}))
    assert [line["metrics"]["x"] for line in read(path)] == [1, 4]
    assert metrics.counts == LogCount(2, lost=2)


@pytest.mark.parametrize("kind", ["short", "ENOSPC once"])
def test_rows_that_a_full_disk_refuses_are_lost_together(path, kind):
    faults = Faults()
    metrics = metrics_file(path, disk=Disk(faults))
    metrics.write(LogScalars({"x": 0}), at(0), update_at(0))
    faults.arm(0, kind)
    with pytest.raises(OSError, match="No space left on device"):
        write_together(metrics, rows_of({"x": 1}, {"x": 2}, seconds=1.0))
    faults.armed = False
    assert metrics.counts == LogCount(1, lost=2)
    write_together(metrics, [UpdateScalars(at(3).iteration, update_at(9), {"x": 3})])
    assert [line["update"] for line in read(path)] == [0, 3]


def test_a_resume_removes_the_rows_after_its_state(path):
    metrics = metrics_file(path)
    write_together(metrics, rows_of(*[{"x": 1}] * 5))
    assert metrics_file(path).truncate(at(3)) == 2
    assert [line["update"] for line in read(path)] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ interpreter

SCALARS = st.dictionaries(st.sampled_from("abcd"), st.integers(), max_size=2).map(FrozenDict)
EVENTS = [update_at(update) for update in range(6)]
REQUESTS = st.lists(
    st.builds(
        lambda rows, quiet: LogUpdates(
            tuple(UpdateScalars(at(update).iteration, EVENTS[update], rows[update]) for update in sorted(rows)),
            quiet & frozenset().union(*rows.values()),
        ),
        st.dictionaries(st.integers(0, 5), SCALARS, max_size=6),
        st.frozensets(st.sampled_from("abcd")),
    ),
    min_size=1,
    max_size=4,
)


@UNTIMED
@given(REQUESTS)
def test_rows_of_one_update_are_united_as_the_scalars_of_its_event(requests):
    (merged,) = merge_effects(requests)
    found = [[row for effect in requests for row in effect.rows if row.event is event] for event in EVENTS]
    expected = [merge_effects([LogScalars(row.values) for row in rows])[0].values for rows in found if rows]
    assert [row.values for row in merged.rows] == expected
    assert [row.iteration.update for row in merged.rows] == [index for index, rows in enumerate(found) if rows]
    assert merge_effects([*requests[:1], *merge_effects(requests[1:])]) == (merged,)
    last = {key: key in effect.quiet for effect in requests for row in effect.rows for key in row.values}
    assert merged.quiet == {key for key, is_quiet in last.items() if is_quiet}


def test_united_rows_of_the_same_objects_are_one_object():
    first, second = FrozenDict(a=1), FrozenDict(b=2)
    (merged,) = merge_effects([LogUpdates(tuple(rows_of(*[each] * 3))) for each in (first, second)])
    assert [row.values for row in merged.rows] == [{"a": 1, "b": 2}] * 3
    assert len({id(row.values) for row in merged.rows}) == 1


def test_handlers_get_the_rows_with_numbers_instead_of_tensors():
    calls, same = [], FrozenDict(x=torch.tensor(0.5), y=1)
    interpreter = Interpreter({LogUpdates: [lambda effect, state, event: calls.append(effect)]})
    interpreter([LogUpdates(tuple(rows_of(same, same, {"x": 2.0})))], at(3), update_at(0.3))
    first, second, third = (row.values for row in calls[0].rows)
    assert (first, second, third) == ({"x": 0.5, "y": 1}, {"x": 0.5, "y": 1}, {"x": 2.0})
    assert type(first["x"]) is float
    assert first is second


def test_with_a_handler_added_for_single_scalars_several_updates_are_not_handled(tmp_path):
    with open_run(tmp_path) as directory:
        interpreter = directory.interpreter.with_handlers(LogScalars, lambda *_: None)
        assert directory.interpreter.handles(LogUpdates)
        assert not directory.interpreter.with_handlers(LogText, lambda *_: None).handles(LogUpdates)
        assert not interpreter.handles(LogUpdates)
        assert not interpreter.with_handlers(MeasurePeakMemory, lambda *_: None).handles(LogUpdates)
        assert interpreter.interpret_stretch is None
        with pytest.raises(LookupError, match="no handler for the effect LogUpdates"):
            interpreter([LogUpdates(tuple(rows_of({"x": 1})))], at(1), update_at(0))


def test_other_ranks_drop_rows_and_have_the_same_handlers(tmp_path):
    calls = []
    event = AfterUpdate(samples=4, run=Run(rank=1, world_size=2))
    with open_run(tmp_path, rank=1) as directory:
        interpreter = directory.interpreter
        assert interpreter.handles(LogUpdates)
        interpreter([LogUpdates(tuple(rows_of({"x": 1})))], at(1), event)
        marked = on_all_ranks(lambda effect, state, event: calls.append(effect))
        assert not interpreter.with_handlers(LogScalars, marked).handles(LogUpdates)
        interpreter.with_handlers(LogUpdates, marked)([LogUpdates(tuple(rows_of({"x": 1})))], at(1), event)
    assert len(calls) == 1
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("mark", [on_all_ranks, lambda handler: handler])
def test_other_ranks_call_marked_handlers_for_the_texts_of_updates(mark):
    calls, (row,) = [], rows_of({"x": 1})
    record = mark(lambda effect, state, event: calls.append((effect, state.iteration, event)))
    text = LogUpdateText(row.iteration, row.event, LogText("half"))
    Interpreter({LogText: [record]})([text], at(3), AfterUpdate(samples=4, run=Run(rank=1, world_size=2)))
    assert calls == ([(text.text, row.iteration, row.event)] if mark is on_all_ranks else [])


def test_a_service_that_fails_at_one_update_gets_the_others(tmp_path, caplog):
    class Failing(Recorder):
        def log_scalars(self, effect, state, event):
            super().log_scalars(effect, state, event)
            raise ConnectionError("no route to host")

    failing = Failing()
    with suppress(OSError), open_run(tmp_path, services=[failing]) as directory:
        directory.interpreter([LogUpdates(tuple(rows_of({"x": 1}, {"x": math.nan})))], at(2), update_at(0.2))
    assert [iteration.update for *_, iteration, _ in failing.logged] == [1, 2]
    assert caplog.messages[-1] == "recorder failed 2 times in total"
    assert len(read(tmp_path / "metrics.jsonl")) == 2
