"""`python -m noether.testing` counts the acts of every shipped callback under every law."""

import pytest

from noether import AfterUpdate, on, when
from noether.core.callbacks.registry import SHIPPED
from noether.testing import __main__ as command
from noether.testing.shipped import LAWS, law_example


def test_a_line_for_each_law_has_runs_acts_and_effects(capsys):
    assert command.main(["LrCallback", "--examples", "3"]) == 0
    rows = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0].split(maxsplit=1) for row in rows] == [["LrCallback", law] for law in LAWS]
    for _, runs, acts, effects, result in rows:
        assert int(runs) >= 1
        assert int(acts) >= 1
        assert int(effects) == int(acts)  # it logs whenever it fires
        assert result == "holds"


@pytest.mark.parametrize(
    ("tested", "message"),
    [
        (when(lambda state, event: False)(lambda state, event: (state, ())), "never acted in 3 runs"),
        (on(AfterUpdate)(lambda state, event: 1 / 0), "ZeroDivisionError"),
    ],
    ids=["never acts", "raises"],
)
def test_a_law_that_fails_gives_status_1(tested, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "law_example", lambda *_: tested)
    assert command.main(["LrCallback", "--examples", "3"]) == 1
    written = capsys.readouterr().out
    assert written.count(" fails") == len(LAWS)
    assert message in written


@pytest.mark.parametrize(("arguments", "message"), [
    (["LrCalback"], "did you mean 'LrCallback'"), (["--examples", "0"], "not a whole number of at least 1"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_callback_has_an_example(name):
    assert any(isinstance(member, SHIPPED[name].load()) for member in law_example(name, "every_n_updates", 2).members)
