"""The JSON schema of a configuration: what the loader accepts is valid, and unknown keys and wrong types are not."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from noether.cli.main import main
from noether.config import ConfigError
from noether.config.descriptions import PREFIX, describe, known_kinds
from noether.config.json_schema import make_schema
from noether.config.loading import from_source
from noether.config.source import parse, read

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
README = Path(__file__).parents[2] / "README.md"
SCHEMA = make_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def digits() -> dict:
    return copy.deepcopy(read(CONFIGS[0].parent / "digits.yaml").data)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_are_valid_in_yaml_1_1_and_1_2(path):
    VALIDATOR.validate(read(path).data)
    assert yaml.safe_load(path.read_text()) == read(path).data  # PyYAML would read 3e-3 as text


@pytest.mark.parametrize("name", known_kinds())
def test_the_example_of_each_callback_is_valid(name):
    VALIDATOR.validate(digits() | {"callbacks": yaml.safe_load(describe(f"{PREFIX}.{name}").yaml)})


def test_the_yaml_of_the_readme_is_valid():
    examples = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    assert examples
    for example in map(yaml.safe_load, examples):
        run = digits()["run"] | example.get("run", {})
        VALIDATOR.validate(digits() | example | {"run": run})


LOADED = {
    "default callbacks": ("callbacks", "default"),
    "default in a list": (
        "callbacks",
        ["default", {"kind": "noether.core.callbacks.EtaCallback", "every_n_epochs": 1}],
    ),
    "alias": ("callbacks", [{"kind": "noether.core.callbacks.LR", "every_n_epochs": 1}]),
    "no limit": ("trainer.max_batch_size", None),
    "reference": ("trainer.max_batch_size", "${trainer.effective_batch_size}"),
    "evaluate": ("trainer.evaluate", {"val": ["loss", "accuracy"], "every_n_epochs": 1}),
    "older precision": ("trainer.precision", "bf16"),
    "older name": ("trainer.use_torch_compile", True),
    "without effect": ("trainer.static_graph", True),
    "async": ("trainer.checkpoints", {"async": False}),
    "path alone": ("run.init_from", "pre.pt"),
    "init_from": ("run.init_from", {"path": "pre.pt", "leave_out": ["head.*"]}),
    "class setting": ("optimizer.betas", [0.9, 0.95]),
    "group": ("optimizer.groups", [{"name": "bias", "match": ["*.bias"], "weight_decay": 0.0}]),
    "sampler": ("trainer.sampler", {"kind": "torch.utils.data.RandomSampler"}),
    "wandb": ("run.wandb", {"mode": "offline"}),
    "whole number as number": ("trainer.clip_grad_norm", 1),
}
REFUSED = {
    "unknown section": ("trainr", {}),
    "unknown setting": ("trainer.max_epoch", 3),
    "unknown setting of a schedule": ("optimizer.schedule.warmup", 3),
    "unknown setting of a callback": ("callbacks", [{"kind": "noether.core.callbacks.LrCallback", "every_n_epoch": 1}]),
    "wrong type of a callback": ("callbacks", [{"kind": "noether.core.callbacks.LrCallback", "every_n_epochs": "x"}]),
    "text for a number": ("trainer.max_epochs", "many"),
    "number for text": ("run.name", 3),
    "fraction": ("trainer.effective_batch_size", 2.5),
    "zero": ("trainer.effective_batch_size", 0),
    "not above zero": ("trainer.max_hours", 0),
    "unknown choice": ("trainer.nonfinite", "ignore"),
    "null": ("trainer.donate", None),
    "metrics without a list": ("trainer.evaluate", {"val": "loss", "every_n_epochs": 1}),
    "replaced": ("trainer.tracker", {"kind": "wandb"}),
    "no kind": ("model", {"width": 3}),
}


def change(case: tuple[str, object]) -> dict:
    data = digits()
    *sections, key = case[0].split(".")
    section = data
    for each in sections:
        section = section[each]
    section[key] = case[1]
    return data


@pytest.mark.filterwarnings("ignore::noether.config.compatibility.ConfigWarning")
@pytest.mark.parametrize("name", LOADED)
def test_what_the_loader_accepts_is_valid(name):
    data = change(LOADED[name])
    from_source(parse(json.dumps(data), "changed.yaml"))
    VALIDATOR.validate(data)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loader_refuses_is_invalid(name):
    data = change(REFUSED[name])
    with pytest.raises(ConfigError):
        from_source(parse(json.dumps(data), "changed.yaml"))
    assert not VALIDATOR.is_valid(data)


def test_every_setting_has_a_description():
    for name in ("run", "trainer", "optimizer"):
        section = next(form for form in SCHEMA["properties"][name]["anyOf"] if "properties" in form)
        assert all(each.get("description") or each.get("deprecated") for each in section["properties"].values())


def test_the_command_writes_the_schema(tmp_path):
    result = CliRunner().invoke(main, ["schema", "--to", str(tmp_path / "schema.json")])
    assert result.exit_code == 0
    assert "yaml-language-server" in result.output
    assert json.loads((tmp_path / "schema.json").read_text()) == SCHEMA


def test_the_schema_never_replaces_a_configuration(tmp_path):
    for name, fix in (("mine.yaml", "write mine.json"), ("absent/a.json", "does not exist; create it first")):
        result = CliRunner().invoke(main, ["schema", "--to", str(tmp_path / name)])
        assert result.exit_code == 2
        assert fix in result.stderr
