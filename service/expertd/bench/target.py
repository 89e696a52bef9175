"""A server that a command asks: where it is, and what it wants to see."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from expertd_client import Client


@dataclass(frozen=True, slots=True)
class Target:
    """An address; with authorities (PEM) over TLS, with a certificate and its key over mTLS."""

    address: str
    token: str | None = field(default=None, repr=False)
    authorities: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    def client(self) -> Client:
        """A client of its own; raises InvalidArgument."""
        return Client(self.address, token=self.token, credentials=self._credentials())

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.authorities is None:
            return None
        return grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate)
