"""Who may do what: bearer tokens with scopes, and the scope that each method and route needs.

What is not in a table needs the admin scope, so that a new method cannot be left open by mistake.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from expertd.errors import InvalidArgument, PermissionDenied, Unauthenticated
from expertd_wire.methods import SERVICE

log = logging.getLogger(__name__)

SAFE_TOKEN_LENGTH = 16


class Scope(StrEnum):
    INFER = "infer"
    METRICS = "metrics"
    ADMIN = "admin"


OPEN = None
"""The scope of what anybody may ask."""

GRPC_SCOPES: dict[str, Scope | None] = {
    "/grpc.health.v1.Health/": OPEN,
    "/grpc.reflection.": Scope.INFER,
    f"/{SERVICE}/": Scope.INFER,
}
HTTP_SCOPES: dict[str, Scope | None] = {
    "/healthz": OPEN,
    "/readyz": OPEN,
    "/metrics": Scope.METRICS,
    "/v1/": Scope.INFER,
    "/docs": Scope.INFER,
    "/openapi.json": Scope.INFER,
}


def scope_for(table: Mapping[str, Scope | None], path: str) -> Scope | None:
    """The scope of a method or route: that of the prefix it begins with, else admin."""
    return next((scope for prefix, scope in table.items() if path.startswith(prefix)), Scope.ADMIN)


@dataclass(frozen=True, slots=True)
class Guard:
    """The tokens of a process, as digests; without any, whoever reaches it may do everything."""

    tokens: tuple[tuple[bytes, frozenset[Scope]], ...] = ()

    def allow(self, scope: Scope | None, authorization: str) -> str:
        """The name of the token presented, "" if none is needed.

        Raises Unauthenticated without a known token, PermissionDenied without the scope.
        """
        if scope is OPEN or not self.tokens:
            return ""
        number = self._find(authorization)
        if number is None:
            raise Unauthenticated("send 'authorization: Bearer TOKEN' with a token of this server")
        if scope not in self.tokens[number][1]:
            raise PermissionDenied(f"this token lacks the scope {scope}")
        return f"token {number}"

    def _find(self, authorization: str) -> int | None:
        """Which token is presented; every known token is compared, in constant time."""
        kind, _, token = authorization.partition(" ")
        presented = _digest(token.strip())
        found = None
        for number, (known, _) in enumerate(self.tokens):
            if hmac.compare_digest(known, presented):
                found = number
        return found if kind.lower() == "bearer" else None


def read_tokens(path: Path) -> Guard:
    """The tokens of a file: lines `scope[,scope] token`; raises InvalidArgument naming the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--tokens {path}: {error}") from None
    found = [
        _parse(path, number, line)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if not found:
        raise InvalidArgument(f"--tokens {path}: no tokens; lines are 'scope[,scope] token'")
    return Guard(tuple(found))


def _parse(path: Path, number: int, line: str) -> tuple[bytes, frozenset[Scope]]:
    where = f"--tokens {path}, line {number}"
    parts = line.split()
    if len(parts) != 2:
        raise InvalidArgument(f"{where}: 'scope[,scope] token' is accepted")
    names, token = parts
    if unknown := set(names.split(",")) - set(Scope):
        raise InvalidArgument(f"{where}: scopes {sorted(unknown)}; accepted: {', '.join(Scope)}")
    if not token.isascii():
        raise InvalidArgument(f"{where}: a token is of ASCII characters")
    if len(token) < SAFE_TOKEN_LENGTH:
        log.warning(
            "%s: a token of fewer than %d characters can be guessed", where, SAFE_TOKEN_LENGTH
        )
    return _digest(token), frozenset(Scope(name) for name in names.split(","))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
