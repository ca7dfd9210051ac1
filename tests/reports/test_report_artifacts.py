import json

import numpy as np
import pytest
from example_runs import add_artifact, write_run

import noether
from noether.reports.html.histograms import draw_histograms
from noether.reports.html.sections.artifacts import artifacts_section

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def make_section(tmp_path, *artifacts):
    run = write_run(tmp_path / "run", [{"loss": 1.0}])
    for artifact in artifacts:
        add_artifact(run, *artifact)
    return artifacts_section([noether.read_run(run.path)]).html


def test_the_newest_picture_comes_first_and_large_ones_are_left_out(tmp_path):
    pictures = [("figure", "figure", SVG, ".svg", 1), ("figure", "figure", bytes(500_000), ".png", 2)]
    html = make_section(tmp_path, *pictures, ("figure", "figure", b"\x89PNG", ".png", 3))
    assert html.index("update 3") < html.index("update 1: at 1 &lt;b&gt;")
    assert "1 picture of 500 kB" in html
    assert "<script" not in html


def test_tables_and_texts_are_shown(tmp_path):
    table = json.dumps({"columns": ["image", "loss"], "rows": [["<i>", 0.5]]}).encode()
    html = make_section(tmp_path, ("worst", "table", table, ".json", 1), ("note", "text", b"<u>", ".txt", 2))
    assert '&lt;i&gt;</th><td class="number">0.5</td>' in html
    assert "&lt;u&gt;</pre>" in html


def test_a_file_outside_of_the_run_is_not_read(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    run = write_run(tmp_path / "run", [{"loss": 1.0}])
    add_artifact(run, "a", "text", b"x", ".txt", 1)
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text().replace("artifacts/a1.txt", "../secret.txt"))
    html = artifacts_section([noether.read_run(run.path)]).html
    assert "secret</pre>" not in html
    assert "is missing or cannot be shown" in html


def test_histograms_share_one_scale():
    wide = {"counts": [1, 1], "edges": [-1.0, 0.0, 1.0], "nan": 2, "infinite": 0}
    narrow = {"counts": [5], "edges": [0.0, 0.25], "nan": 0, "infinite": 0}
    html = draw_histograms("w", [(1, wide), (2, narrow)])
    assert "values from -1 (bottom) to 1 (top), at updates 1 (left) to 2 (right); 2 values not finite" in html
    cells = [line.split('"') for line in html.split("<rect")[1:]]
    columns = [float(each[1]) for each in cells]
    assert columns.count(0.0) == 40
    assert columns.count(50.0) == pytest.approx(5, abs=1)


def test_histograms_that_shrink_are_drawn_on_a_logarithmic_scale():
    """Each of these histograms would fill one row of the linear scale of the one before."""
    histograms = [(at, {"counts": [1] * 8, "edges": np.linspace(-1, 1, 9) / 100**at}) for at in range(3)]
    html = draw_histograms("g", [(at, {**each, "edges": each["edges"].tolist()}) for at, each in histograms])
    assert "values from -1 (bottom) to 1 (top)" in html
    assert "beyond 0.0001 above and below 0, the scale is logarithmic" in html
    columns = [float(cell.split('"')[1]) for cell in html.split("<rect")[1:]]
    assert min(columns.count(x) for x in set(columns)) >= 3


def test_histograms_of_one_event_are_in_the_order_of_the_layers(tmp_path):
    content = json.dumps({"counts": [1], "edges": [0, 1], "nan": 0, "infinite": 0}).encode()
    logged = [(layer, "histogram", content, ".json", at) for at in (1, 2) for layer in ("first", "then")]
    html = make_section(tmp_path, *logged)
    assert html.index("<h3>first") < html.index("<h3>then")


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_a_histogram_without_values_says_so(counts):
    edges = np.arange(len(counts) + 1.0).tolist()
    assert "no finite values" in draw_histograms("w", [(1, {"counts": counts, "edges": edges})])
