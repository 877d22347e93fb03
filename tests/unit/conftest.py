"""A folder that a job could start in, and the clients of an S3 server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from objectstore import Choose, Proxy, Server, be


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: it holds train.csv and val.csv, and no hub cache is near."""
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text("path,text\na.wav,hello there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub-cache"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def client(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of one who may write, and a cache of its own."""
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "cache"))
    be(server.writer, server.endpoint, monkeypatch)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A folder of the bucket for this test alone."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:10]


@pytest.fixture
def through(server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Choose], Proxy]]:
    """Makes the storage go through a proxy that breaks calls."""
    proxies = []

    def start(choose: Choose) -> Proxy:
        proxies.append(Proxy(server.port, choose))
        be(server.writer, proxies[-1].endpoint, monkeypatch)
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()
