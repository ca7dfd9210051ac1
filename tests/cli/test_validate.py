"""`noether validate`: checks a configuration and writes nothing."""

import pytest
from command import ROOT, SMALL, contents, invoke


@pytest.mark.parametrize(
    ("config", "callbacks", "updates"),
    [("configs/digits.yaml", 9, 30 * 38), ("configs/seed.yaml", 4, 10 * 19), ("configs/heat.yaml", 15, 20 * 128)],
)
def test_the_examples_are_valid(tmp_path, tmp_path_factory, monkeypatch, config, callbacks, updates):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    output = invoke("validate", ROOT / config, cwd=tmp_path)
    assert output == f"{ROOT / config} is valid: {callbacks} callbacks, {updates} updates\n"
    assert list(tmp_path.iterdir()) == []


def test_the_seed_configuration_passes_the_smoke_test(tmp_path):
    output = invoke("train", ROOT / "configs/seed.yaml", "--smoke", cwd=tmp_path)
    assert output.splitlines()[-1] == f"{ROOT / 'configs/seed.yaml'}: one update, one evaluation and one save succeeded"
    assert list(tmp_path.iterdir()) == []


def test_validate_takes_overrides(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    before = contents(tmp_path)
    assert invoke("validate", "small.yaml", cwd=tmp_path) == "small.yaml is valid: 6 callbacks, 76 updates\n"
    output = invoke("validate", "small.yaml", "--set", "trainer.max_samples=100", cwd=tmp_path)
    assert output == "small.yaml is valid: 6 callbacks, 4 updates\n"
    assert contents(tmp_path) == before
