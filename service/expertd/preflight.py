"""What can be told of settings before anything heavy is imported: do they fit together?"""

from __future__ import annotations

from pathlib import Path

from expertd.capability.rows import BACKENDS
from expertd.config import Settings
from expertd.errors import InvalidArgument
from expertd.transport.tls import TlsFiles, check_tls

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_settings(settings: Settings) -> None:
    """Raises InvalidArgument for settings that cannot be served together."""
    for check in (
        _check_simulate,
        _check_host,
        _check_ports,
        _check_backend,
        _check_models,
        _check_ingress,
        _check_tls,
    ):
        check(settings)


def _check_simulate(settings: Settings) -> None:
    """Nobody must take a simulation for a server."""
    if settings.simulate and not (settings.demo or settings.testing):
        raise InvalidArgument(
            f"--simulate {settings.simulate}: it is for --demo, and for tests (EXPERTD_TESTING=1)"
        )


def _check_host(settings: Settings) -> None:
    if settings.host not in LOOPBACK and settings.tokens is None:
        raise InvalidArgument(
            f"--host {settings.host}: without --tokens only {', '.join(LOOPBACK)} are accepted, "
            "because callers could not be told apart"
        )


def _check_ports(settings: Settings) -> None:
    if settings.http_port and settings.http_port == settings.grpc_port:
        raise InvalidArgument(
            f"--http-port and --grpc-port {settings.http_port}: each needs a port of its own"
        )


def _check_backend(settings: Settings) -> None:
    if settings.backend not in ("auto", *BACKENDS):
        accepted = ", ".join(("auto", *BACKENDS))
        raise InvalidArgument(f"--backend {settings.backend}: accepted: {accepted}")


def _check_models(settings: Settings) -> None:
    if not (settings.model or settings.demo or settings.identity):
        raise InvalidArgument("nothing to serve; give --model NAME=PATH, --demo or --identity")
    names = [named.name for named in (*settings.model, *settings.identity)]
    names += ["demo"] if settings.demo else []
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidArgument(f"model names are given twice: {', '.join(twice)}")


def _check_ingress(settings: Settings) -> None:
    """gRPC holds one message for each running call: all of them must fit."""
    most = settings.max_concurrent_calls * settings.max_message_bytes
    if most > settings.ingress_bytes:
        raise InvalidArgument(
            f"--max-concurrent-calls {settings.max_concurrent_calls} of --max-message-bytes "
            f"{settings.max_message_bytes} may take {most} bytes, more than --ingress-bytes "
            f"{settings.ingress_bytes}; lower the first two or raise the last"
        )


def _check_tls(settings: Settings) -> None:
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise InvalidArgument("--tls-cert and --tls-key belong together; give both or neither")
    if settings.tls_client_ca and not settings.tls_cert:
        raise InvalidArgument("--tls-client-ca needs --tls-cert and --tls-key")
    if tls := tls_files(settings):
        check_tls(tls)


def tls_files(settings: Settings) -> TlsFiles | None:
    """The certificates to serve with, if any."""
    if not (settings.tls_cert and settings.tls_key):
        return None
    ca = Path(settings.tls_client_ca) if settings.tls_client_ca else None
    return TlsFiles(Path(settings.tls_cert), Path(settings.tls_key), ca)
