import shutil

import pytest
from command import MODULE, PAPER, SMALL, noether, only_run


@pytest.fixture(scope="session")
def trained_small(tmp_path_factory):
    """Folder and output of a finished run of `SMALL`, trained in a separate process; no test writes to it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL)
    return folder, noether("train", "small.yaml", cwd=folder)


@pytest.fixture
def finished_run(trained_small, tmp_path):
    """A copy of the finished run, in a separate working directory."""
    shutil.copytree(trained_small[0], tmp_path, dirs_exist_ok=True)
    return only_run(tmp_path / "out/small")


@pytest.fixture(scope="session")
def paper(tmp_path_factory):
    """A working directory with a user's module and a finished run of `PAPER`; other runs are written elsewhere."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "paper.py").write_text(MODULE)
    (folder / "paper.yaml").write_text(PAPER)
    noether("train", "paper.yaml", cwd=folder)
    return folder
