"""`validate`, `plan` and `--smoke` of a configuration that lists no callbacks."""

import json

import pytest
import yaml
from command import SMALL, invoke

LISTED = ["OnlineLossCallback", "LrCallback", "ProgressCallback", "BestCheckpointCallback", "CheckpointCallback"]


@pytest.fixture
def folder(tmp_path):
    config = yaml.safe_load(SMALL.replace("2e-3", "2.0e-3"))
    del config["callbacks"]
    (tmp_path / "default.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "none.yaml").write_text(yaml.safe_dump({**config, "callbacks": []}))
    return tmp_path


def test_validate_names_the_default_callbacks(folder):
    lines = invoke("validate", "default.yaml", cwd=folder).splitlines()
    assert lines == ["default.yaml is valid: 6 callbacks, 76 updates", f"default callbacks: {', '.join(LISTED)}"]
    assert "default callbacks" not in invoke("validate", "none.yaml", cwd=folder)


def test_the_plan_lists_the_default_callbacks(folder):
    plan = json.loads(invoke("plan", "default.yaml", "--json", cwd=folder))
    names = [each["name"].partition("/")[0] for each in plan["callbacks"]]
    assert names == [*LISTED[:3], "EvaluateCallback", *LISTED[3:]]


@pytest.mark.parametrize("settings", [[], ["--set", "trainer.evaluate=null"], ["--set", "trainer.max_samples=100"]])
def test_a_smoke_test_passes_with_default_callbacks(folder, settings):
    invoke("train", "default.yaml", "--smoke", *settings, cwd=folder)
