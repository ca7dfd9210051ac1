import math

import noether
from noether import AfterUpdate, LogScalars, TrainState, open_run


def test_a_run_that_is_being_written_can_be_read(tmp_path):
    path = tmp_path / "run"
    values = [0.1, math.nan, math.inf, 1e-300]
    with open_run(path) as directory:
        (path / "config.yaml").write_text("run: {name: mine}\n")
        state = TrainState()
        for value in values:
            state = state.advance(samples=4)
            directory.interpreter([LogScalars({"loss": value, "step": state.iteration.update})], state, AfterUpdate())
        with (path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"run": "run", "event": "after_up')
        run = noether.read_run(path)
        assert repr(run.metrics["loss"].values.tolist()) == repr(values)
        assert run.metrics["step"].values.dtype == "int64"
        assert run.metrics["loss"].points.sample.tolist() == [4, 8, 12, 16]
        assert run.config == {"run": {"name": "mine"}}
