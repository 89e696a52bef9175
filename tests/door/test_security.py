"""SECURITY.md names tests that exist; tokens are compared in constant time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from expertd.errors import PermissionDenied, Unauthenticated
from expertd.transport import auth
from expertd.transport.auth import Scope

ROOT = Path(__file__).parents[2]


def test_every_proof_named_in_security_md_exists() -> None:
    named = re.findall(r"((?:\w+/)+test_\w+\.py)::(test_\w+)", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 25
    missing = [f"{file}::{name}" for file, name in named if not defines(file, name)]
    assert not missing


def defines(file: str, name: str) -> bool:
    return re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M) is not None


def test_every_token_is_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ["a" * 20, "b" * 20, "c" * 20]
    path = tmp_path / "tokens"
    path.write_text("".join(f"infer {token}\n" for token in tokens))
    guard = auth.read_tokens(path)
    assert not any(token.encode() in known for token in tokens for known, _ in guard.tokens)
    compared: list[tuple[bytes, bytes]] = []
    plain = auth.hmac.compare_digest

    def compare(known: bytes, presented: bytes) -> bool:
        compared.append((known, presented))
        return plain(known, presented)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    for token in (*tokens, "d" * 20, "a" * 19):
        compared.clear()
        if token in tokens:
            guard.allow(Scope.INFER, f"Bearer {token}")
        else:
            with pytest.raises(Unauthenticated):
                guard.allow(Scope.INFER, f"Bearer {token}")
        assert [known for known, _ in compared] == [known for known, _ in guard.tokens]
        assert {len(presented) for _, presented in compared} == {32}
    with pytest.raises(PermissionDenied, match="admin"):
        guard.allow(Scope.ADMIN, f"bearer {tokens[0]}")
    with pytest.raises(Unauthenticated):
        guard.allow(Scope.INFER, f"Basic {tokens[0]}")
