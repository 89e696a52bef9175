"""One server per test, and both clients as one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from tests.clients.servers import Server, serving

from expertd_client import AsyncClient, Client


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
