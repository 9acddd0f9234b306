"""Servers that end with their test, and an environment in which nothing of the machine's own zoo is seen."""

import pytest
from faulty_server import FaultyServer

CONTENT = bytes(range(256)) * 400  # 102,400 bytes


@pytest.fixture
def serve():
    """`serve({name: bytes}, plan)` starts a server; several may run."""
    servers = []

    def start(files: dict[str, bytes], plan: tuple[str, ...] = ("whole",)) -> FaultyServer:
        servers.append(FaultyServer(files, plan))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """An empty cache, no mirror, no Hub but loopback's, and no proxy between us and loopback."""
    for name in (
        "VISFT_OFFLINE",
        "HF_HUB_OFFLINE",
        "VISFT_ZOO_MIRROR",
        "HF_TOKEN",
        "FVCORE_CACHE",
        "HF_ENDPOINT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VISFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return tmp_path / "cache"


@pytest.fixture
def content() -> bytes:
    return CONTENT
