import logging
import sys

import pytest
from tiny_runs import MODULE


@pytest.fixture
def tiny_module(tmp_path, monkeypatch):
    """Change to a directory with a module of the user's, and remove the module from `sys.modules` afterwards."""
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(MODULE)
    yield
    sys.path[:] = path
    sys.modules.pop("tiny", None)


@pytest.fixture
def notes(caplog):
    """Return the lines that `train` has reported since the last call."""
    caplog.set_level(logging.INFO, logger="noether.training")

    def read():
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("noether.training")]
        caplog.clear()
        return lines

    return read
