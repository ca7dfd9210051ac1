"""What a run records of the git repository that contains the working directory."""

import subprocess
import threading

import pytest

from noether.effects.provenance import git
from noether.effects.provenance.git import GitState, read_git_state

NAMES = ("-c", "user.name=me", "-c", "user.email=me@host", "-c", "init.defaultBranch=main")


def run_git(folder, *arguments):
    command = ["git", *NAMES, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    run_git(folder, "init")
    for name in ("a.py", "b.py"):
        (folder / name).write_text(f"{name} = 1\n" * 5)
    run_git(folder, "add", ".")
    run_git(folder, "commit", "-m", "first")
    return folder


def put_git(folder, monkeypatch, script):
    """Put a program named git before all others."""
    program = folder / "bin/git"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_a_clean_repository(repository):
    commit = run_git(repository, "rev-parse", "HEAD")
    assert read_git_state(repository) == GitState(commit=commit, branch="main", dirty=False)


def test_changes_of_tracked_files_are_a_diff_that_git_applies(repository):
    (repository / "a.py").write_text("a.py = 2\n")
    run_git(repository, "mv", "b.py", "? c.py")
    (repository / "sub").mkdir()
    (repository / "sub/new.py").write_text("")
    run_git(repository, "config", "diff.noprefix", "true")
    run_git(repository, "config", "diff.relative", "true")
    state = read_git_state(repository / "sub")
    assert state.dirty
    assert state.untracked == ("sub/",)
    run_git(repository, "reset", "--hard")
    (repository.parent / "changes.diff").write_bytes(state.diff)
    run_git(repository, "apply", "../changes.diff")
    assert (repository / "a.py").read_text() == "a.py = 2\n"
    assert (repository / "? c.py").exists()
    assert not (repository / "b.py").exists()


def test_untracked_files_alone_do_not_make_it_dirty(repository):
    (repository / "new.py").write_text("")
    state = read_git_state(repository)
    assert (state.dirty, state.diff, state.untracked) == (False, b"", ("new.py",))


def test_many_untracked_files_are_counted(repository):
    for number in range(git.MAX_UNTRACKED + 7):
        (repository / f"{number}.txt").touch()
    state = read_git_state(repository)
    assert len(state.untracked) == git.MAX_UNTRACKED
    assert state.problem == "7 more untracked files are left out"


def test_a_commit_without_a_branch(repository):
    run_git(repository, "checkout", "--detach")
    state = read_git_state(repository)
    assert (state.branch, len(state.commit)) == (None, 40)


def test_no_commit_yet(tmp_path):
    run_git(tmp_path, "init")
    (tmp_path / "a.py").write_text("a")
    run_git(tmp_path, "add", ".")
    assert read_git_state(tmp_path) == GitState(branch="main", dirty=True)


def test_no_repository(tmp_path):
    assert read_git_state(tmp_path) is None


def test_no_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert read_git_state(repository) == GitState(problem="git cannot be run: No such file or directory")


def test_a_repository_of_another_user(repository, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    state = read_git_state(repository)
    assert (state.commit, state.dirty) == (None, None)
    assert state.problem.startswith("git status: fatal: detected dubious ownership")


def test_a_git_that_hangs_is_left(repository, tmp_path, monkeypatch):
    put_git(tmp_path, monkeypatch, "exec tail -f /dev/null")
    state = read_git_state(repository, timeout_s=0.05)
    assert state == GitState(problem="git status took too long")
    for thread in threading.enumerate():  # it was killed
        if thread.daemon and "_run" in thread.name:
            thread.join()


def test_a_diff_that_hangs_leaves_the_commit(repository, tmp_path, monkeypatch):
    (repository / "a.py").write_text("a.py = 2\n")
    put_git(tmp_path, monkeypatch, 'case "$*" in *diff*) exec tail -f /dev/null;; esac\nexec /usr/bin/git "$@"')
    state = read_git_state(repository, timeout_s=2)
    assert (state.dirty, state.branch, state.diff) == (True, "main", b"")
    assert state.problem == "git diff took too long"


def test_a_long_diff_is_cut(repository, monkeypatch):
    monkeypatch.setattr(git, "MAX_DIFF_BYTES", 1 << 20)
    (repository / "a.py").write_text("line\n" * (1 << 19))
    state = read_git_state(repository)
    assert len(state.diff) == 1 << 20
    assert state.problem == "the diff is cut after 1 MiB"


def test_no_program_that_the_repository_names_is_run(repository):
    """It could wait for a terminal or take minutes."""
    for setting in ("diff.external", "core.fsmonitor", "diff.mine.command", "diff.mine.textconv", "core.pager"):
        run_git(repository, "config", setting, f"touch {repository / 'ran'}; cat")
    (repository / ".git/hooks/post-index-change").write_text(f"#!/bin/sh\ntouch {repository / 'ran'}\n")
    (repository / ".git/hooks/post-index-change").chmod(0o755)
    (repository / ".gitattributes").write_text("*.py diff=mine\n")
    (repository / "a.py").write_text("a.py = 2\n")
    state = read_git_state(repository)
    assert b"+a.py = 2" in state.diff
    assert not (repository / "ran").exists()


def test_a_file_marked_in_gitattributes_is_not_in_the_diff(repository):
    (repository / ".gitattributes").write_text("a.py -diff\n")
    (repository / "a.py").write_text("secret\n")
    state = read_git_state(repository)
    assert state.dirty
    assert b"a.py" in state.diff
    assert b"secret" not in state.diff
