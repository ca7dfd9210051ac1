"""Fixtures for the tests of log services."""

import socket

import pytest
import wandb


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    """Without a login; requests to the service would reach a local socket, and there must be none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        yield
        wandb.teardown()  # ends the process of wandb
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
