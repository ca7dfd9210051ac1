from example_runs import write_run

from noether.reports.firings import count_firings

CONFIG = """
run: {name: mine}
trainer: {max_epochs: 4, effective_batch_size: 4, evaluate: {every_n_epochs: 2, val: [loss]}}
callbacks:
  - {kind: noether.core.callbacks.LrCallback, every_n_updates: 3}
  - {kind: noether.core.callbacks.ProgressCallback, every_n_samples: 8}
  - {kind: my_module.Mine, every_n_epochs: 1}
  - {kind: noether.core.callbacks.ParamCountCallback}
"""
PRODUCES = {
    "trainer.evaluate.val": ["loss/val/*", "val/*"],
    "callbacks.0": ["optim/lr", "optim/lr/*"],
    "callbacks.2": ["other", "checkpoints/best"],
}


def test_firings_are_planned_to_the_end_due_to_the_last_line_and_counted_in_the_log(tmp_path):
    lines = [{"optim/lr": 0.1} if update % 3 == 0 else {"other": 1.0} for update in range(1, 7)]
    run = write_run(
        tmp_path / "run", lines, config=CONFIG, summary={"samples/train": 12, "produces": PRODUCES}, epochs=2
    )
    counts = [(each.callback, each.planned, each.due, each.logged) for each in count_firings(run)]
    assert counts == [
        ("trainer.evaluate", 2, 0, 0),
        ("LrCallback", 4, 2, 2),
        ("ProgressCallback", 6, 3, None),
        ("my_module.Mine", 4, 1, 4),
    ]


def test_without_the_length_of_an_epoch_only_the_log_is_counted(tmp_path):
    run = write_run(tmp_path / "run", [{"optim/lr": 0.1}] * 3, config=CONFIG, summary={"produces": PRODUCES})
    lr = count_firings(run)[1]
    assert (lr.planned, lr.due, lr.logged) == (None, None, 3)


def test_a_run_that_has_not_recorded_what_callbacks_log_has_no_count(tmp_path):
    run = write_run(tmp_path / "run", [{"optim/lr": 0.1}] * 3, config=CONFIG, summary={"produces": {"callbacks.0": 3}})
    assert [each.logged for each in count_firings(run)] == [None] * 4
