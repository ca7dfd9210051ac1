"""Bad input: the whole message, exit code 2, and nothing written."""

import pytest
from command import METRIC, WITH_METRIC, contents, invoke, noether, set_options

CONFIG = WITH_METRIC

BUILT_IN = "noether.core.callbacks"
MODEL_CLASS = "noether.examples.digits.ConvNet"
CALLBACK_CLASS = f"{BUILT_IN}.ProgressCallback"
INTERVAL = "every_n_updates: 10"


def entry(name):
    """Return the lines of one callback."""
    start = CONFIG.index(f"  - kind: {BUILT_IN}.{name}\n")
    end = CONFIG.find("  - kind:", start + 1)
    return CONFIG[start : end if end > 0 else None]


BEST = entry("BestMetricCallback")
ONE_INTERVAL = "exactly one of every_n_epochs, every_n_updates, every_n_samples"
NOT_WHOLE = "bad.yaml:25: callbacks[0].every_n_updates: {} is not a whole number of at least 1"
CALLBACK = "a callback: a subclass of CallbackBase, or a function (state, event) -> (state, effects)"
MODEL = "a model: a subclass of torch.nn.Module, or a function annotated to return one"
DATASET = "a dataset: a subclass of torch.utils.data.Dataset, or a function annotated to return one"

# What is changed in CONFIG, as pairs of old and new text, and what is said about it.
CASES = {
    "does not parse": (
        [("run:\n  name", "run: [\n  name")],
        "bad.yaml:3: column 9: does not parse: while parsing a flow sequence, expected ',' or ']', but got ':'",
    ),
    "unknown kind": (
        [(CALLBACK_CLASS, f"{BUILT_IN}.ProgresCallback")],
        (
            f"bad.yaml:24: callbacks[0].kind: '{BUILT_IN}.ProgresCallback': '{BUILT_IN}' has no 'ProgresCallback'; "
            "did you mean 'ProgressCallback'?"
        ),
    ),
    "unknown module": (
        [(CALLBACK_CLASS, "neother.core.Progress")],
        (
            "bad.yaml:24: callbacks[0].kind: 'neother.core.Progress': there is no module 'neother'; "
            "did you mean 'noether'?"
        ),
    ),
    "kind without a dot": (
        [(CALLBACK_CLASS, "ProgressCallback")],
        "bad.yaml:24: callbacks[0].kind: 'ProgressCallback' is not a dotted path such as 'package.module.name'",
    ),
    "no kind": (
        [(f"kind: {CALLBACK_CLASS}\n    ", "")],
        (
            "bad.yaml:24: callbacks[0].kind: is missing; expected a subclass of CallbackBase, "
            "or a function (state, event) -> (state, effects)"
        ),
    ),
    "kind: os.system": (
        [(CALLBACK_CLASS, "os.system")],
        (
            "bad.yaml:24: callbacks[0].kind: 'os.system': 'os' is not an allowed prefix (noether, torch, modules under "
            "the working directory); to allow it, pass allow=('os',), or --allow os on the command line"
        ),
    ),
    "a model as a callback": (
        [(CALLBACK_CLASS, MODEL_CLASS)],
        f"bad.yaml:24: callbacks[0].kind: '{MODEL_CLASS}' is a model class, expected {CALLBACK}",
    ),
    "a callback as a model": (
        [(MODEL_CLASS, CALLBACK_CLASS)],
        f"bad.yaml:5: model.kind: '{CALLBACK_CLASS}' is a callback class, expected {MODEL}",
    ),
    "a model as a dataset": (
        [("noether.examples.digits.Digits", MODEL_CLASS)],
        f"bad.yaml:10: data.train.kind: '{MODEL_CLASS}' is a model class, expected {DATASET}",
    ),
    "a model as an optimizer": (
        [("torch.optim.AdamW", "torch.nn.Linear")],
        (
            "bad.yaml:17: optimizer.kind: 'torch.nn.Linear' is a model class, expected an optimizer: "
            "a subclass of torch.optim.Optimizer"
        ),
    ),
    "a model as a loss": (
        [("loss: noether.examples.digits.cross_entropy", f"loss: {MODEL_CLASS}")],
        (
            f"bad.yaml:22: trainer.loss: '{MODEL_CLASS}' is a model class, expected a function: "
            "a callable that is not a class, called with (outputs, batch)"
        ),
    ),
    "misspelt setting of a callback": (
        [("dataset_key", "dataset_kye")],
        (
            "bad.yaml:28: callbacks[2].dataset_key: is missing\n"
            "bad.yaml:30: callbacks[2].dataset_kye: unknown setting; did you mean 'dataset_key'?"
        ),
    ),
    "misspelt setting of a model": (
        [("width: 4", "widht: 4")],
        "bad.yaml:6: model.widht: unknown setting; did you mean 'width'?",
    ),
    "misspelt setting of the trainer": (
        [("max_epochs", "max_epoch")],
        (
            "bad.yaml:19: trainer: no end is given; expected exactly one of max_epochs, max_updates, max_samples\n"
            "bad.yaml:20: trainer.max_epoch: unknown setting; did you mean 'max_epochs'?"
        ),
    ),
    "misspelt section": (
        [("optimizer:", "optimiser:")],
        "bad.yaml:1: optimizer: is missing\nbad.yaml:16: optimiser: unknown setting; did you mean 'optimizer'?",
    ),
    "two intervals": (
        [(INTERVAL, f"{INTERVAL}\n    every_n_epochs: 1")],
        (
            "bad.yaml:25: callbacks[0].every_n_updates: every_n_epochs: 1 and every_n_updates: 10 are both set; "
            f"give {ONE_INTERVAL}"
        ),
    ),
    "no interval": (
        [(INTERVAL, "name: progress")],
        f"bad.yaml:24: callbacks[0]: no interval is set; give {ONE_INTERVAL}",
    ),
    "an interval of zero": ([(INTERVAL, "every_n_updates: 0")], NOT_WHOLE.format("0")),
    "a negative interval": ([(INTERVAL, "every_n_updates: -1")], NOT_WHOLE.format("-1")),
    "a float as an interval": ([(INTERVAL, "every_n_updates: 2.7")], NOT_WHOLE.format("2.7")),
    "a whole float as an interval": ([(INTERVAL, "every_n_updates: 2.0")], NOT_WHOLE.format("2.0")),
    "a boolean as an interval": ([(INTERVAL, "every_n_updates: true")], NOT_WHOLE.format("True")),
    "text as an interval": ([(INTERVAL, "every_n_updates: '3'")], NOT_WHOLE.format("'3'")),
    "unknown metric key": (
        [("metric_key: val/accuracy", "metric_key: vall/accuracy")],
        (
            "bad.yaml:32: callbacks[3]: BestMetricCallback/E1/vall/accuracy consumes 'vall/accuracy', which no "
            "callback produces; produced before it: loss/online/*/U5, val/accuracy; did you mean 'val/accuracy'?"
        ),
    ),
    "consumer before its producer": (
        [(METRIC + BEST, BEST + METRIC)],
        (
            "bad.yaml:28: callbacks[2]: BestMetricCallback/E1/val/accuracy consumes 'val/accuracy': "
            "list it after MetricCallback/E1/val/accuracy, which produces it"
        ),
    ),
    "consumer due where its producer is not": (
        [("every_n_epochs: 1\n    dataset_key", "every_n_epochs: 2\n    dataset_key")],
        (
            "bad.yaml:32: callbacks[3]: BestMetricCallback/E1/val/accuracy consumes 'val/accuracy' where "
            "MetricCallback/E2/val/accuracy does not produce it: E1 against E2; give both the same interval, "
            "or set missing: skip\n"
            "bad.yaml:39: callbacks[5]: BestCheckpointCallback/E1/val/accuracy consumes 'val/accuracy' where "
            "MetricCallback/E2/val/accuracy does not produce it: E1 against E2; give both the same interval, "
            "or set missing: skip"
        ),
    ),
    "two producers of one key": (
        [(METRIC, METRIC + METRIC.replace("epochs: 1", "epochs: 2"))],
        (
            "bad.yaml:32: callbacks[3]: MetricCallback/E2/val/accuracy and MetricCallback/E1/val/accuracy both produce "
            "'val/accuracy'; remove one"
        ),
    ),
    "two memories of one name": (
        [(METRIC, METRIC + entry("ProgressCallback"))],
        (
            "bad.yaml:32: callbacks[3]: 2 callbacks have a memory named 'ProgressCallback/U10'; "
            "give this one another id or name"
        ),
    ),
    "batch larger than the dataset": (
        [("effective_batch_size: 32", "effective_batch_size: 5000")],
        "bad.yaml:21: trainer.effective_batch_size: 5000 is larger than the training set, which has 1205 samples",
    ),
    "two ends": (
        [("max_epochs: 2", "max_epochs: 2\n  max_updates: 4")],
        (
            "bad.yaml:21: trainer.max_updates: max_epochs and max_updates are given; "
            "expected exactly one of max_epochs, max_updates, max_samples"
        ),
    ),
    "no end": (
        [("  max_epochs: 2\n", "")],
        "bad.yaml:19: trainer: no end is given; expected exactly one of max_epochs, max_updates, max_samples",
    ),
    "unknown dataset": (
        [("dataset_key: val", "dataset_key: vall")],
        "bad.yaml:30: callbacks[2].dataset_key: data has no 'vall', it has 'train', 'val'; did you mean 'val'?",
    ),
    "unknown dataset to evaluate": (
        [("max_epochs: 2", "max_epochs: 2\n  evaluate: {valid: [loss], every_n_epochs: 1}")],
        "bad.yaml:21: trainer.evaluate.valid: data has no 'valid', it has 'train', 'val'; did you mean 'val'?",
    ),
    "unknown metric": (
        [("metric: accuracy", "metric: acuracy")],
        (
            "bad.yaml:31: callbacks[2].metric: 'acuracy' is not 'accuracy', 'binary_accuracy', a function of "
            "outputs and batch, or a metric of torchmetrics; did you mean 'accuracy'?"
        ),
    ),
    "group that matches nothing": (
        [
            (
                "lr: 2e-3\n",
                (
                    "lr: 2e-3\n  groups:\n    - {name: no.decay, match: ['*.bias']}\n"
                    "    - name: no\n      lr: 0.1\n      match: ['haed.*']\n"
                ),
            )
        ],
        "bad.yaml:23: optimizer.groups[1].match: 'haed.*' matches no parameter; the nearest is 'head.1.bias'",
    ),
    "setting that the optimizer does not have": (
        [("lr: 2e-3", "lr: 2e-3\n  bettas: [0.9, 0.99]")],
        "bad.yaml:19: optimizer.bettas: unknown setting; did you mean 'betas'?",
    ),
    "value that the optimizer refuses": (
        [("lr: 2e-3", "lr: 2e-3\n  betas: [0.9, 1.99]")],
        "bad.yaml:16: optimizer: AdamW refuses: Invalid beta parameter at index 1: 1.99",
    ),
    "value that the model refuses": (
        [("dropout: 0.2", "dropout: 1.5")],
        "bad.yaml:4: model: dropout probability has to be between 0 and 1, but got 1.5",
    ),
    "value that the dataset refuses": (
        [("split: val", "split: vall")],
        "bad.yaml:15: data.val.split: 'vall' is not one of 'train', 'val', 'test'; did you mean 'val'?",
    ),
    "device that does not exist": (
        [("max_epochs: 2", "max_epochs: 2\n  device: meta:0x")],
        "bad.yaml:21: trainer.device: 'meta:0x' is not a device such as 'auto', 'cpu', 'cuda' or 'cuda:1'",
    ),
    "warm-up longer than the run": (
        [("lr: 2e-3", "lr: 2e-3\n  schedule:\n    kind: cosine\n    warmup_updates: 80")],
        (
            "bad.yaml:21: optimizer.schedule.warmup_updates: a warm-up of 80 updates takes all 76, leaving none for "
            "cosine: shorten it, or train longer"
        ),
    ),
    "no train dataset": (
        [("  train:\n", "  trian:\n")],
        "bad.yaml:8: data.train: is missing; training uses that dataset; did you mean 'trian'?",
    ),
    "weights that are not there": (
        [("output: out", "output: out\n  init_from: old/checkpoints/last")],
        (
            "bad.yaml:4: run.init_from: 'old/checkpoints/last': no checkpoint 'last' in old/checkpoints; "
            "there are: none; give a checkpoint like runs/NAME/RUN_ID/checkpoints/latest"
        ),
    ),
    "nothing to evaluate first": (
        [("max_epochs: 2", "max_epochs: 2\n  evaluate_first: true")],
        "bad.yaml:21: trainer.evaluate_first: needs the setting `evaluate`, which is missing",
    ),
    "negative number of workers": (
        [("max_epochs: 2", "max_epochs: 2\n  num_workers: -1")],
        "bad.yaml:21: trainer.num_workers: -1 is not a whole number of at least 0",
    ),
    "unknown effect": (
        [("output: out", "output: out\n  handlers:\n    noether.core.effect.LogScalar: builtins.print")],
        (
            "bad.yaml:5: run.handlers.noether.core.effect.LogScalar: 'noether.core.effect.LogScalar': "
            "'noether.core.effect' has no 'LogScalar'; did you mean 'LogScalars'?"
        ),
    ),
    "empty file": ([(CONFIG, "")], "bad.yaml:1: is empty; expected sections such as `trainer:`"),
    "several at once, in the order of their lines": (
        [
            ("effective_batch_size: 32", "effective_batch_size: 0"),
            ("max_epochs: 2", "max_epochs: true"),
            (INTERVAL, "every_n_updates: 2.5"),
            ("width: 4", "widht: 4"),
            ("metric: accuracy", "metric: acuracy"),
            ("lr: 2e-3", "lr: -1"),
        ],
        (
            "bad.yaml:6: model.widht: unknown setting; did you mean 'width'?\n"
            "bad.yaml:18: optimizer.lr: -1.0 is not a number of at least 0\n"
            "bad.yaml:20: trainer.max_epochs: True is not a whole number of at least 1\n"
            "bad.yaml:21: trainer.effective_batch_size: 0 is not a whole number of at least 1\n"
            "bad.yaml:25: callbacks[0].every_n_updates: 2.5 is not a whole number of at least 1\n"
            "bad.yaml:31: callbacks[2].metric: 'acuracy' is not 'accuracy', 'binary_accuracy', a function of "
            "outputs and batch, or a metric of torchmetrics; did you mean 'accuracy'?"
        ),
    ),
}


def write(folder, changes=()):
    text = CONFIG
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "bad.yaml").write_text(text)


@pytest.mark.parametrize("command", ["train", "validate"])
@pytest.mark.parametrize(("changes", "message"), CASES.values(), ids=CASES)
def test_bad_configuration(tmp_path, changes, message, command):
    write(tmp_path, changes)
    before = contents(tmp_path)
    assert invoke(command, "bad.yaml", cwd=tmp_path, code=2) == f"Error: {message}\n"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.max_epohcs=3"], "trainer.max_epohcs: unknown setting; did you mean 'max_epochs'?"),
        (["trainr.max_epochs=3"], "trainr: unknown setting; did you mean 'trainer'?"),
        (["run.name.first=x"], "run.name: is 'small', which has no settings inside"),
        (["callbacks.9.every_n_epochs=3"], "callbacks[9]: there is no such element; the list has 6, numbered from 0"),
        (["trainer.max_epochs"], "is not of the form key=value, such as trainer.max_epochs=20"),
        (["trainer.max_epochs=0.5"], "trainer.max_epochs: 0.5 is not a whole number of at least 1"),
        (["trainer.max_epochs=ten"], "trainer.max_epochs: 'ten' is not a whole number of at least 1"),
        (
            ["model.width=[1"],
            "does not parse: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        (
            ["trainer.device=cuda:99"],
            "trainer.device: 'cuda:99' cannot be used here: {reason}; write 'auto' to take a GPU if there is one",
        ),
    ],
)
def test_bad_override(tmp_path, settings, message):
    write(tmp_path)
    before = contents(tmp_path)
    output = invoke("train", "bad.yaml", *set_options(settings), cwd=tmp_path, code=2)
    reason = output.partition("used here: ")[2].partition("; write 'auto'")[0]
    assert output == f"Error: --set {settings[0]}: {message.format(reason=reason)}\n"
    assert contents(tmp_path) == before


def test_bad_overrides_are_reported_with_problems_of_the_file(tmp_path):
    write(tmp_path, [("width: 4", "widht: 4")])
    settings = ["trainer.max_epochs=0", "runn.seed=1", "trainer.max_updates=3"]
    output = invoke("train", "bad.yaml", *set_options(settings), cwd=tmp_path, code=2)
    assert output == (
        "Error: bad.yaml:6: model.widht: unknown setting; did you mean 'width'?\n"
        "--set trainer.max_epochs=0: trainer.max_epochs: 0 is not a whole number of at least 1\n"
        "--set trainer.max_updates=3: trainer.max_updates: max_epochs and max_updates are given; "
        "expected exactly one of max_epochs, max_updates, max_samples\n"
        "--set runn.seed=1: runn: unknown setting; did you mean 'run'?\n"
    )


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_file_that_cannot_be_read(tmp_path, command):
    write(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"run: \xff")
    expected = {
        "baad.yaml": "no such file; did you mean 'bad.yaml'?",
        "nowhere/x.yaml": "no such file",
        ".": "is a directory",
        "binary.yaml": "is not UTF-8 text (byte 5)",
    }
    output = {name: invoke(command, name, cwd=tmp_path, code=2) for name in expected}
    assert output == {name: f"Error: {name}: {message}\n" for name, message in expected.items()}


@pytest.mark.parametrize("run", ["nowhere", ".", "bad.yaml"])
def test_resume_refuses_a_directory_without_a_run(tmp_path, run):
    write(tmp_path)
    before = contents(tmp_path)
    output = invoke("train", "--resume", run, cwd=tmp_path, code=2)
    message = "is not the directory of a run: it has no config.yaml; give one like runs/NAME/RUN_ID"
    assert output == f"Error: {run}: {message}\n"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either CONFIG or --resume RUN_DIR"),
        (["bad.yaml", "--resume", "out"], "give either CONFIG or --resume RUN_DIR"),
        (["--resume", "out", "--smoke"], "--smoke needs CONFIG, not --resume"),
        (["bad.yaml", "--drop-memory", "x"], "--drop-memory needs --resume"),
    ],
)
def test_incompatible_arguments_are_refused(tmp_path, arguments, message):
    write(tmp_path)
    before = contents(tmp_path)
    output = invoke("train", *arguments, cwd=tmp_path, code=2)
    assert output.splitlines()[-1] == f"Error: {message}"
    assert contents(tmp_path) == before


def test_unwritable_output(tmp_path):
    write(tmp_path)
    (tmp_path / "out").write_text("a file")
    output = invoke("train", "bad.yaml", cwd=tmp_path, code=1)
    assert output == "Error: [Errno 20] Not a directory: 'out/small'\n"


def test_no_traceback_in_a_real_process(tmp_path):
    write(tmp_path, CASES["several at once, in the order of their lines"][0])
    before = contents(tmp_path)
    done = noether("train", "bad.yaml", cwd=tmp_path, code=2)
    assert done.stderr == f"Error: {CASES['several at once, in the order of their lines'][1]}\n"
    assert done.stdout == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", [["train"], ["train", "--resume"], ["validate"], ["plan"], ["eval"], ["replay"]])
def test_control_characters_in_an_error_are_written_as_escapes(tmp_path, command):
    """On a terminal they would move the cursor, or hide the message."""
    output = invoke(*command, "a\x1b[2J\r.yaml", cwd=tmp_path, code=2)
    assert not {"\x1b", "\r"} & set(output)
    assert r"a\x1b[2J\r.yaml" in output
