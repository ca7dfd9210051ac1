"""`noether help`: sections and settings of a configuration, and the names that it does not know."""

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from noether.cli.main import main
from noether.config.changes import MAY_CHANGE
from noether.config.reference import find_entry, read_sections, walk

ENTRIES = {each.name: each for each in walk()}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["help", *arguments])


def show(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ENTRIES)
def test_every_setting_has_a_text_and_a_type(name):
    setting = find_entry(name).setting
    assert setting.text.endswith(".")
    assert re.fullmatch(r"[a-z0-9_'`| -]+(: [a-z` ]+)?", setting.type)


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_settings_that_a_resumed_run_may_change_exist_and_are_described_so(name):
    assert "A resumed run may change it." in show(name)


def test_the_list_has_every_section():
    assert [line.split()[0] for line in show().splitlines()[2:9]] == [each.name for each in read_sections()]


def test_a_section_lists_its_settings_with_type_range_and_default():
    text = show("trainer")
    assert re.search(r"^max_batch_size +whole number, at least 1 +null ", text, re.MULTILINE)
    assert re.search(r"^loss .* required ", text, re.MULTILINE)


def test_a_setting_has_range_yaml_and_override():
    text = show("trainer.max_batch_size")
    assert text.startswith("trainer.max_batch_size: whole number, at least 1, default null")
    assert "trainer:\n  max_batch_size: 10\n" in text
    assert "--set trainer.max_batch_size=10" in text
    assert "A resumed run keeps it" in text


def test_a_setting_in_a_list_has_the_yaml_of_an_item():
    assert "optimizer:\n  groups:\n    - lr: <number>" in show("optimizer.groups.lr")
    assert "--set" not in show("optimizer.groups.0.lr")


def test_a_callback_and_its_settings_are_described():
    assert "noether.core.callbacks.LrCallback" in show("callbacks.LrCallback")
    assert "Epochs between firings" in show("callbacks.LrCallback.every_n_epochs")


def test_an_object_of_torch_is_described_by_its_signature():
    text = show("torch.optim.AdamW")
    assert re.search(r"^weight_decay +number +0.01 +weight decay coefficient", text, re.MULTILINE)
    assert not re.search(r"^params ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trainer.max_bacth_size", "did you mean 'trainer.max_batch_size'?"),
        ("max_batch_size", "did you mean 'trainer.max_batch_size'?"),
        ("trainer.use_torch_compile", "it is an older name of trainer.compile"),
        ("seed", "write run.seed"),
        ("callbacks.LrCallback.every_n_epoch", "did you mean 'every_n_epochs'?"),
        ("os.system", "not an allowed prefix"),
        ("trainer..loss", "no setting 'trainer..loss'"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one_and_exit_code_2(name, message):
    result = invoke(name)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("columns", [80, 200])
def test_words_are_wrapped_and_not_cut(columns, monkeypatch):
    monkeypatch.setattr("noether.cli.setting_table.output_width", lambda: columns)
    for name in ("trainer", "run", "optimizer.schedule"):
        text = show(name)
        assert max(map(len, text.splitlines())) <= columns
        assert "…" not in text


def test_settings_of_the_schema_are_described_without_torch():
    code = (
        "import sys; from noether.cli.main import main; main(['help', 'trainer'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
