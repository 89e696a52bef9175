"""One server per test, and both clients as one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from tests.clients.fleets import FakeFleet
from tests.clients.servers import Server, serving

from expertd_client import AsyncClient, AsyncExpertPool, Client, ExpertPool, dispatch, replicas


class Blocking:
    """An AsyncClient with Client's methods, so that one test covers both."""

    def __init__(self, target: Any, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(target, **settings)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **options: self._runner.run(method(*args, **options))

    def __enter__(self) -> Blocking:
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(self, *failure: Any) -> None:
        self._runner.run(self._client.__aexit__(*failure))
        self._runner.close()


class BlockingPool(Blocking):
    """An AsyncExpertPool with ExpertPool's methods."""

    def __init__(self, targets: Any, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncExpertPool(targets, **settings)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(server: Server, connect: Any) -> Iterator[Any]:
    with connect(server.target) as connected:
        yield connected


@pytest.fixture(params=[ExpertPool, BlockingPool], ids=["sync", "async"])
def pool_of(request: pytest.FixtureRequest) -> Any:
    """Makes a pool over a fake fleet, of either kind."""

    def make(fleet: FakeFleet, **settings: Any) -> Any:
        return request.param(fleet.targets, connect=fleet.connect, **settings)

    return make


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stalls are seen soon, though a busy machine's pauses are none; changes at once."""
    monkeypatch.setattr(dispatch, "STALL_SECONDS", 0.25)
    monkeypatch.setattr(dispatch, "UNMEASURED_STALL_SECONDS", 0.25)
    monkeypatch.setattr(replicas, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(replicas, "REREAD_SECONDS", 0.02)
