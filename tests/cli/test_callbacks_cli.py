"""`noether callbacks`: the list of callbacks, and the description of each."""

from pathlib import Path

import pytest
from command import invoke

from noether.config import load_callbacks
from noether.config.descriptions import describe, known_kinds

MINE = '''
from typing import Literal

from noether import LogText, every_n_epochs
from noether.core.callbacks import PeriodicCallback


class Speak(PeriodicCallback):
    """Logs words.

    It logs them at each firing.

    Args:
        words: The logged words.
        tone: The tone of
            the words.
    """

    words: tuple[str, ...]
    tone: Literal["low", "high"] = "low"


class Bare(PeriodicCallback):
    pair: tuple[int, str] = (1, "a")

    def periodic_callback(self, state, event, interval):
        return state, ()


@every_n_epochs(1)
def shout(state, event, *, text: str, times: int = 2):
    """Log a text several times."""
    return state, (LogText(text * times),)
'''


def test_each_callback_is_listed_on_one_line(tmp_path):
    listed = invoke("callbacks", cwd=tmp_path).splitlines()
    for kind in known_kinds():
        (line,) = (line for line in listed if line.split()[:1] == [kind])
        assert line.split(maxsplit=1)[1] == describe(kind).summary
    assert listed[0] == "kind: noether.core.callbacks.NAME, with NAME one of"


@pytest.mark.parametrize("kind", known_kinds())
def test_a_callback_is_described_with_settings_documentation_and_valid_yaml(tmp_path, kind):
    shown = invoke("callbacks", kind, cwd=tmp_path)
    description = describe(kind)
    assert shown.startswith(f"noether.core.callbacks.{kind}")
    assert all(f"\n{setting.name} " in shown for setting in description.settings)
    assert f"\n\n{description.text}\n\n" in shown
    assert all(word not in description.text for word in ("Args:", "Raises:", "Example:", "```"))
    (tmp_path / "shown.yaml").write_text("callbacks:\n" + shown.partition("\ncallbacks:\n")[2])
    (member, *_) = load_callbacks(tmp_path / "shown.yaml").members
    assert type(member).__name__ == kind


def test_an_alias_is_described_like_the_callback(tmp_path):
    shown = invoke("callbacks", "MetricEarlyStopper", cwd=tmp_path)
    assert shown == invoke(
        "callbacks", "noether.core.callbacks.early_stopping.MetricEarlyStopping", cwd=tmp_path
    ).replace(
        "noether.core.callbacks.early_stopping.MetricEarlyStopping", "noether.core.callbacks.MetricEarlyStopping", 1
    )
    assert "noether.core.callbacks.MetricEarlyStopping  (also MetricEarlyStopper)" in shown
    shown = invoke("callbacks", "BestMetricCallback", cwd=tmp_path)
    assert "source_metric_key is an older name of metric_key" in shown


def test_classes_and_functions_of_users_are_described(tmp_path):
    (tmp_path / "own.py").write_text(MINE)
    shown = invoke("callbacks", "own.Speak", cwd=tmp_path)
    assert [line.rstrip() for line in shown.splitlines()][:7] == [
        "own.Speak",
        "",
        "Logs words.",
        "",
        "It logs them at each firing.",
        "",
        "setting          type           default   description",
    ]
    assert "words            list of text   required  The logged words." in shown
    assert "tone             low | high     low       The tone of the words." in shown
    assert shown.endswith("callbacks:\n  - kind: own.Speak\n    every_n_epochs: 1\n    words: <list of text>\n")
    shown = invoke("callbacks", "own.shout", cwd=tmp_path)
    assert "Log a text several times." in shown
    assert "text             text           required" in shown
    assert "times            whole number   2" in shown
    assert "Epochs between firings, >= 1." in shown
    assert shown.endswith("callbacks:\n  - kind: own.shout\n    text: <text>\n")  # the decorator sets its interval
    bare = invoke("callbacks", "own.Bare", cwd=tmp_path)
    assert bare.startswith("own.Bare\n\n\n\n")
    assert "list of whole number, text" in bare


PREFIXES = "(noether, torch, modules under the working directory)"
ALLOWS = "to allow it, pass allow=('os',), or --allow os on the command line"
EXPECTED = "expected a callback: a subclass of CallbackBase, or a function (state, event) -> (state, effects)"
ROOT = "noether.core.callbacks"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LrCalback", f"'{ROOT}.LrCalback': '{ROOT}' has no 'LrCalback'; did you mean 'LrCallback'?"),
        ("os.system", f"'os.system': 'os' is not an allowed prefix {PREFIXES}; {ALLOWS}"),
        ("torch.nn.Linear", f"'torch.nn.Linear' is a model class, {EXPECTED}"),
        ("", f"'{ROOT}.' is not a dotted path such as 'package.module.name'"),
    ],
)
def test_other_objects_than_callbacks_are_refused(tmp_path, kind, message):
    assert invoke("callbacks", kind, cwd=tmp_path, code=2) == f"Error: noether callbacks: {message}\n"
    assert list(Path(tmp_path).iterdir()) == []
