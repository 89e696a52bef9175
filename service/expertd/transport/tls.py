"""TLS from files that may be replaced while they are in use."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from expertd.errors import InvalidArgument

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate chain, its key, and the CA that clients must be signed by (mTLS), in PEM."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """The bytes of all files; raises OSError."""
        ca = None if self.client_ca is None else self.client_ca.read_bytes()
        return self.certificate.read_bytes(), self.key.read_bytes(), ca

    def version(self) -> tuple[int, ...]:
        """Changes when a file does."""
        files = (self.certificate, self.key, self.client_ca)
        return tuple(path.stat().st_mtime_ns for path in files if path is not None)


def check_tls(tls: TlsFiles) -> None:
    """Raises InvalidArgument for files that cannot be served."""
    try:
        ssl_context(tls)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(f"--tls-cert, --tls-key, --tls-client-ca: {error}") from None


def ssl_context(tls: TlsFiles) -> ssl.SSLContext:
    """The context of the HTTP server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Reload:
    """Notices that certificates were replaced by others that work; bad ones keep the old in use."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._version = tls.version()

    def due(self) -> bool:
        try:
            version = self._tls.version()
            if version == self._version:
                return False
            ssl_context(self._tls)
        except (OSError, ssl.SSLError) as error:
            log.warning("the new certificates are not usable yet, the old stay in use: %s", error)
            return False
        self._version = version
        return True
