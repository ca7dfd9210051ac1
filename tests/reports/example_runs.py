"""Writes example runs with the code that writes real runs, among them ones with hostile names."""

import json

import noether

HOSTILE = "loss/</script><img src=x onerror=alert(1)> & 'quotes' \""


def write_run(path, metrics, *, config="run: {name: mine}\n", summary=None, epochs=2):
    """Write a run with one line of metrics at each update and a checkpoint after each epoch; return its record.

    Args:
        path: The run directory.
        metrics: For each update, the metrics of its line.
        config: The text of its configuration; None for none.
        summary: Further entries of its summary.
        epochs: Number of epochs.
    """
    with noether.open_run(path) as directory:
        if config is not None:
            (path / "config.yaml").write_text(config)
        state = noether.TrainState()
        per_epoch = max(1, len(metrics) // epochs)
        for number, values in enumerate(metrics, start=1):
            state, event = state.advance(samples=4), noether.AfterUpdate(time_s=1e9 + number)
            directory.interpreter([noether.LogScalars(values)], state, event)
            if number % per_epoch == 0:
                state = state.next_epoch()
                save = noether.SaveCheckpoint(pointers=("latest",))
                directory.interpreter([save], state, noether.AfterEpoch(time_s=1e9 + number))
        if summary is not None:
            directory.interpreter([noether.SetSummary(summary)], state, noether.AfterTraining())
    return noether.read_run(path)


def write_evaluation(run, name, metrics):
    """Write the results of a standalone evaluation of a run."""
    (run.path / "eval").mkdir(exist_ok=True)
    (run.path / "eval" / f"{name}.json").write_text(json.dumps(metrics))


def add_artifact(run, key, kind, content, suffix, update):
    """Add an artifact to the log of a run, as a run writes it."""
    name = f"artifacts/{key}{update}{suffix}"
    (run.path / "artifacts").mkdir(exist_ok=True)
    (run.path / name).write_bytes(content)
    entry = {key: {"kind": kind, "file": name, "bytes": len(content), "caption": f"at {update} <b>"}}
    line = {"run": "r", "event": "after_update", "epoch": 0, "update": update, "sample": 4, "time_s": 1e9}
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "metrics": {}, "artifacts": entry}) + "\n")
