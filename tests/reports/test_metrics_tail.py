"""`MetricsTail` reads the whole log in parts, also if the run resumes meanwhile."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import write_lines

from noether import read_run
from noether.reports.reading.metrics_tail import MetricsTail
from noether.reports.run_table import make_rows


@given(cuts=st.lists(st.floats(0, 1), max_size=6), count=st.integers(0, 8))
def test_the_parts_that_a_tail_reads_add_up_to_the_log(tmp_path_factory, cuts, count):
    path = tmp_path_factory.mktemp("run")
    log = path / "metrics.jsonl"
    write_lines(path / "whole", [{"loss": float(update), "step": update} for update in range(count)])
    content = (path / "whole").read_bytes() if count else b""
    tail, found = MetricsTail(path), []
    for size in sorted(int(cut * len(content)) for cut in (*cuts, 1.0)):
        log.write_bytes(content[:size])
        new = tail.read()
        assert not new.rewound
        found += new.metrics["step"].values.tolist() if len(new.metrics) else []
        assert len(found) == content[:size].count(b"\n")
    assert found == list(range(count))
    assert len(tail.read().metrics) == 0


def test_a_log_that_a_resume_replaced_is_read_from_its_start(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"loss": value} for value in (1.0, 2.0, 3.0)])
    tail = MetricsTail(tmp_path)
    assert tail.read().metrics["loss"].values.tolist() == [1.0, 2.0, 3.0]
    for values, rewound, new in (
        ([1.0, 2.0], True, [1.0, 2.0]),
        ([1.0, 2.0, 4.0], False, [4.0]),
        ([1.0, 2.0, 4.5, 5.0], True, [1.0, 2.0, 4.5, 5.0]),
        ([], True, []),
        ([1.0], False, [1.0]),
    ):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        if values:
            write_lines(tmp_path / "metrics.jsonl", [{"loss": value} for value in values])
        found = tail.read()
        assert found.rewound == rewound
        assert (found.metrics["loss"].values.tolist() if new else list(found.metrics)) == new
        assert tail.read().rewound is False


def test_reread_gives_the_whole_log_and_reads_only_its_new_lines(tmp_path):
    log = tmp_path / "metrics.jsonl"
    write_lines(log, [{"loss": 1.0}, {"loss": 2.0, "extra": 5}])
    run = read_run(tmp_path)
    assert run.metrics["loss"].values.tolist() == [1.0, 2.0]
    first, last = log.read_bytes().splitlines(keepends=True)
    write_lines(tmp_path / "other", [{"loss": 3.0, "extra": 6}])
    log.write_bytes(b"x" * (len(first) - 1) + b"\n" + last + (tmp_path / "other").read_bytes())
    again = run.reread()
    assert run.metrics["loss"].values.tolist() == [1.0, 2.0]
    assert again.metrics["loss"].values.tolist() == [1.0, 2.0, 3.0]
    assert again.metrics["extra"].lines.tolist() == [1, 2]
    log.unlink()
    write_lines(log, [{"loss": 7.0}])  # the run was resumed
    assert again.reread().metrics["loss"].values.tolist() == [7.0]


@settings(max_examples=30)
@given(st.lists(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)), max_size=4), max_size=4))
def test_rereading_in_parts_is_reading_at_once(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("run")
    (path / "summary.json").write_text("{}")
    run = read_run(path)
    for number, _ in enumerate(parts, 1):
        (path / "metrics.jsonl").unlink(missing_ok=True)
        write_lines(path / "metrics.jsonl", [line for part in parts[:number] for line in part])
        run = run.reread()
        whole = read_run(path).metrics
        assert run.metrics.keys() == whole.keys()
        for key, series in whole.items():
            assert run.metrics[key].values.tolist() == series.values.tolist()
            assert run.metrics[key].points.update.tolist() == series.points.update.tolist()


@pytest.mark.parametrize("end", ["", '{"event": "after_up', "not json\n"], ids=["whole", "torn", "damaged"])
def test_start_and_iteration_of_a_run_are_read_from_the_ends_of_its_log(tmp_path, monkeypatch, end):
    log = tmp_path / "metrics.jsonl"
    write_lines(log, [{"loss": 0.5, "text " + "long" * 20: 1}] * 2000)
    with log.open("a") as file:
        file.write(end)
    monkeypatch.setattr(MetricsTail, "read_all", lambda self: pytest.fail("the whole log was read"))
    (row,) = make_rows([read_run(tmp_path)], [])
    assert (row.started, row.update) == (0.25, 2000)
