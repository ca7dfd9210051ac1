"""An ordinary report has at most 2 MB."""

import numpy as np
from example_runs import write_run

from noether.reports.html.report import render_report


def test_ten_metrics_of_ten_thousand_updates_fit_into_two_megabytes(tmp_path):
    run = write_run(tmp_path / "run", [])
    values = np.random.default_rng(0).normal(size=(10_000, 10)).tolist()
    point = '"run": "run", "event": "after_update", "epoch": 0, "update": {0}, "sample": {0}, "time_s": 1e9'
    with (run.path / "metrics.jsonl").open("w") as file:
        for update, row in enumerate(values, start=1):
            metrics = ", ".join(f'"metric/{key}": {value!r}' for key, value in enumerate(row))
            file.write("{" + point.format(update) + ', "metrics": {' + metrics + "}}\n")
    assert len(render_report([run]).encode()) < 2_000_000
