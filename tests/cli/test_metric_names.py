"""Metric keys as people write them: trained, listed, evaluated and resumed under names that any file system takes."""

import json
import shutil
import unicodedata

import pytest
from command import invoke, only_run, pointer

from noether.core.file_names import best_pointer
from noether.effects import CheckpointError, CheckpointStore

KEYS = [
    *(
        "val/recall@10",
        "val/f1 (macro)",
        "a.b",
        "a/b",
        "top/1/5",
        'val/+<acc>:"|?*',
        "nul.",
        "val/x",
        "val/x/tolerance=2",
    ),
    *("验证/准确率 🚀", unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
    "val/" + "a" * 300,
]
MODULE = """
import torch
from noether import SaveTensors, every_n_epochs, log

class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return torch.ones(2) * index

def loss(outputs, batch): return {"square": outputs.square().mean()}

@every_n_epochs(1)
def measure(state, event, *, keys: list[str]):
    state, effects = log(state, event, {key: float(number + state.iteration.epoch) for number, key in enumerate(keys)})
    return state, (*effects, SaveTensors(name="../worst 10%/val", tensors={"x": torch.ones(1)}))
"""


def make_config(folder, keys=KEYS):
    (folder / "mine.py").write_text(MODULE)
    callbacks = "noether.core.callbacks"
    best = {"kind": f"{callbacks}.BestCheckpointCallback", "every_n_epochs": 1, "mode": "higher", "tolerances": [2]}
    config = {
        "run": {"name": "names", "output": "out"},
        "model": {"kind": "torch.nn.Linear", "in_features": 2, "out_features": 1},
        "data": {"train": {"kind": "mine.Data"}, "val": {"kind": "mine.Data"}, "../shifted 10%": {"kind": "mine.Data"}},
        "optimizer": {"kind": "torch.optim.SGD", "lr": 0.01},
        "trainer": {"effective_batch_size": 4, "loss": "mine.loss", "max_epochs": 2,
                    "evaluate": {"val": ["loss"], "every_n_epochs": 1}},
        "callbacks": [
            {"kind": "mine.measure", "keys": keys},
            *({**best, "metric_key": key} for key in keys),
            {"kind": f"{callbacks}.CheckpointCallback", "every_n_epochs": 1},
        ],
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def run_of_all_keys(tmp_path_factory):
    folder = make_config(tmp_path_factory.mktemp("names"))
    invoke("train", "config.yaml", cwd=folder)
    return only_run(folder / "out/names")


def test_lightning_4012_4468_a_monitored_metric_of_any_name_is_saved_and_found(run_of_all_keys):
    store = CheckpointStore(run_of_all_keys / "checkpoints", "names")
    names = {best_pointer(key, tolerance) for key in KEYS for tolerance in (None, 2)}
    assert store.pointers().keys() == {"latest", "last", *names}
    for key in KEYS:
        assert store.find(f"best_model.{key}") == store.find(best_pointer(key))
        assert store.find(f"best_model.{key}").tag == "E2_U4_S16"
        assert store.find(f"best_model.{key}.tolerance=2").tag == pointer(run_of_all_keys, best_pointer(key, 2))


def test_a_checkpoint_that_does_not_exist_is_answered_with_names_and_keys(run_of_all_keys):
    store = CheckpointStore(run_of_all_keys / "checkpoints", "names")
    with pytest.raises(CheckpointError, match=r"best_model\.val\.recall%4010 \(best_model\.val/recall@10\)"):
        store.find("best_model.val/recall@11")


def test_tensors_of_any_name_stay_inside_of_the_run(run_of_all_keys):
    found = [path.relative_to(run_of_all_keys) for path in run_of_all_keys.rglob("val.safetensors")]
    assert list(map(str, found)) == ["tensors/.%2E/worst%2010%25/val.safetensors"]


def test_eval_takes_the_key_of_the_metric_and_any_name_of_a_dataset(run_of_all_keys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run_of_all_keys.parents[2], folder)
    run = only_run(folder / "out/names").relative_to(folder)
    invoke("eval", run, "--checkpoint", "best_model.val/recall@10", "--data", "../shifted 10%", cwd=folder)
    (file,) = (folder / run / "eval").glob("*.json")
    assert file.name == "E2_U4_S16.%2E%2E.shifted%2010%25.json"


def test_a_run_whose_pointers_have_names_of_an_earlier_version_resumes(tmp_path):
    """There, `a.b` and `a/b` had one name, and no key had another character."""
    folder = make_config(tmp_path, ["a.b"])
    invoke("train", "config.yaml", cwd=folder)
    run = only_run(folder / "out/names")
    checkpoints = run / "checkpoints"
    for tolerance, name in ((None, "best_model.a.b"), (2, "best_model.a.b.tolerance=2")):
        (checkpoints / best_pointer("a.b", tolerance)).rename(checkpoints / name)
    assert CheckpointStore(checkpoints, "names").find("best_model.a.b").tag == "E2_U4_S16"
    invoke("train", "--resume", run, "--set", "trainer.max_epochs=3", cwd=folder)
    assert pointer(run, "best_model.a%2Eb") == "E3_U6_S24"


def test_an_empty_key_is_refused_before_training(tmp_path):
    folder = make_config(tmp_path, [""])
    assert "metric_key: is empty" in invoke("validate", "config.yaml", cwd=folder, code=2)
