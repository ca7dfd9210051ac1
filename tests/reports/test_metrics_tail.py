"""`MetricsTail`: what is read in parts is the log, also if the run resumes meanwhile."""

from hypothesis import given
from hypothesis import strategies as st
from reading import write_lines

from noether.reports.metrics_tail import MetricsTail


@given(cuts=st.lists(st.floats(0, 1), max_size=6), count=st.integers(0, 8))
def test_parts_make_the_log_wherever_it_is_cut(tmp_path_factory, cuts, count):
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
