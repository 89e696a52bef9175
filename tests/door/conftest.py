"""A server with tokens, and one without, for every test of the door."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.servers import Server, serving

TOKENS = {scope: f"{scope}-token-0123456789" for scope in ("infer", "metrics", "admin")}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("door")


@pytest.fixture(scope="session")
def guarded(home: Path) -> Iterator[Server]:
    """The demo and an identity layer behind tokens."""
    tokens = home / "tokens"
    tokens.write_text("# scopes token\n" + "\n".join(f"{s} {t}" for s, t in TOKENS.items()) + "\n")
    with serving(home, "--demo", "--identity", "echo=64", "--tokens", str(tokens)) as running:
        yield running
