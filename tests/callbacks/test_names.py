"""Names of the shipped callbacks: in Python, in YAML, in the registry, in the README."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from noether.config.descriptions import describe, known_kinds
from noether.config.objects.kinds import CALLBACK, resolve
from noether.core import callbacks
from noether.core.callbacks.registry import ALIASES, CATEGORIES, EXPORTS, SHIPPED

ROOT = "noether.core.callbacks"
FOLDER = Path(callbacks.__file__).parent
README = Path(__file__).parents[2] / "README.md"

# The names that published YAML uses. They never change.
ALIASES_OF = {
    "ProgressCallback": ("Progress",),
    "EtaCallback": ("ETA", "ETACallback"),
    "LrCallback": ("LR",),
    "PeakMemoryCallback": ("PeakMemory",),
    "OnlineLossCallback": ("OnlineLoss",),
    "EMACallback": ("EmaCallback",),
    "MetricEarlyStopping": ("MetricEarlyStopper",),
    "FixedUpdateEarlyStopping": ("FixedEarlyStopper",),
    "TrackOutputsCallback": ("TrackAdditionalOutputsCallback",),
}
NAMES = [(name, name) for name in SHIPPED] + [(alias, name) for name, found in ALIASES_OF.items() for alias in found]
PATHS = [
    *((f"{ROOT}.{name}", canonical) for name, canonical in NAMES),
    *((f"{EXPORTS[canonical].module}.{name}", canonical) for name, canonical in NAMES),
    ("noether.training.callbacks.OfflineLossCallback", "OfflineLossCallback"),
]


@pytest.mark.parametrize(("path", "canonical"), PATHS)
def test_a_name_resolves_in_yaml_and_in_python(path, canonical):
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert resolve(path, CALLBACK) is kind is getattr(callbacks, canonical)
    assert kind.__name__ == canonical


@pytest.mark.parametrize(
    ("name", "module"),
    [("CallbackBase", "base"), ("PeriodicCallback", "periodic"), ("PeriodicDataIteratorCallback", "periodic")],
)
def test_a_base_class_keeps_its_path(name, module):
    assert getattr(importlib.import_module(f"{ROOT}.{module}"), name) is getattr(callbacks, name)


def test_every_callback_of_the_package_is_in_the_registry():
    modules = [f"{ROOT}.{file.stem}" for file in sorted(FOLDER.glob("*.py")) if file.stem != "__init__"]
    defined = {
        f"from {module} import {name} as {name}"
        for module in modules
        for name, kind in vars(importlib.import_module(module)).items()
        if CALLBACK.fits(kind)
        and getattr(kind, "__final__", False)
        and (kind.__module__, kind.__name__) == (module, name)
    }
    lines = {f"from {export.module} import {name} as {name}" for name, export in SHIPPED.items()}
    assert defined - lines == set(), "add these lines to noether/core/callbacks/shipped.pyi, under a category"
    assert lines - defined == set(), "these lines of noether/core/callbacks/shipped.pyi name no callback"


def test_every_callback_has_a_category():
    assert {name: export.heading for name, export in SHIPPED.items() if export.heading not in CATEGORIES} == {}


def test_the_aliases_are_those_of_published_yaml():
    assert known_kinds() == {name: ALIASES_OF.get(name, ()) for name in sorted(SHIPPED)}
    assert set(ALIASES) == {alias for aliases in ALIASES_OF.values() for alias in aliases}


def test_the_readme_shows_callbacks_under_their_category():
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", README.read_text(), re.MULTILINE))
    for category in CATEGORIES:
        shown = re.findall(r"`(\w+)`", rows[category])
        assert shown, f"the README's table of callbacks shows none of {category!r}"
        assert [SHIPPED[name].heading for name in shown] == [category] * len(shown)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match="has no attribute 'LrCalback'; did you mean 'LrCallback'"):
        callbacks.LrCalback  # noqa: B018  # the access is tested


@pytest.mark.parametrize("canonical", SHIPPED)
def test_a_callback_is_documented_with_all_its_settings_and_its_yaml(canonical):
    description = describe(canonical)
    kind = getattr(callbacks, canonical)
    assert [setting.name for setting in description.settings if not setting.text] == []
    assert {setting.name for setting in description.settings} == set(inspect.signature(kind).parameters)
    assert f"- kind: {description.kind}\n" in f"{description.yaml}\n"
    assert ">>>" in inspect.getdoc(kind)
    assert description.summary.endswith((".", ")."))
    assert len(description.summary) < 120
