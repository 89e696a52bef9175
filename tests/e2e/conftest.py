"""Servers that live as long as the session: starting one takes more than a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.e2e.local import FLAGS, Local
from tests.e2e.servers import Server, expertd, in_process, serving

from expertd_client import Client


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home directory of every process started here."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def deep(home: Path) -> Path:
    """A deepseek_v3 demo in bf16, as the command line writes it."""
    path = home / "deep"
    args = ("--family", "deepseek_v3", "--quant", "bf16", "--seed", "5")
    made = expertd(home, "demo-model", "--out", str(path), *args)
    assert made.returncode == 0, made.stderr
    return path


@pytest.fixture(scope="session")
def server(home: Path, deep: Path) -> Iterator[Server]:
    """The demo, the deepseek_v3 demo and an identity layer."""
    models = ("--demo", "--identity", "echo=64", "--model", f"deep={deep}")
    with serving(home, *models) as running:
        yield running


@pytest.fixture(scope="session")
def part(home: Path, server: Server) -> Iterator[Server]:
    """The demo's experts 8-23 only, of layer 1 only, on the reference by default."""
    flags = ("--demo", "--experts", "8-23", "--layers", "1", "--backend", "reference")
    with serving(home, *flags) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc) as connected:
        yield connected


@pytest.fixture(scope="session")
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as connected:
        yield connected


@pytest.fixture
def local() -> Iterator[Local]:
    """An App in this process, ready."""
    with in_process(*FLAGS) as (app, addresses):
        assert app.wait_ready()
        yield Local(app, addresses)
