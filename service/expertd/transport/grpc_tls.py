"""TLS of the gRPC server."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from expertd.transport.tls import Reload, TlsFiles


def grpc_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of the gRPC server that follow the files."""
    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls), _fetcher(tls), require_client_authentication=bool(tls.client_ca)
    )


def _configuration(tls: TlsFiles) -> grpc.ServerCertificateConfiguration:
    certificate, key, ca = tls.read()
    return grpc.ssl_server_certificate_configuration(((key, certificate),), root_certificates=ca)


def _fetcher(tls: TlsFiles) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """Called at each handshake: the new configuration if a file changed, else None."""
    reload = Reload(tls)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return _configuration(tls) if reload.due() else None

    return fetch
