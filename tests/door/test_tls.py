"""TLS and mTLS on both protocols, with certificates that are replaced while the server runs."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import pytest
from tests.e2e.servers import Server, expertd, serving
from tests.waiting import until

from expertd_client import Client

DAYS = "2"


class Pair(NamedTuple):
    certificate: Path
    key: Path


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


class Authority:
    """A CA made for one test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pair = Pair(directory / "ca.pem", directory / "ca.key")
        subject = ("-subj", "/CN=expertd test CA")
        files = ("-keyout", str(self.pair.key), "-out", str(self.pair.certificate))
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", DAYS, *subject, *files)

    def issue(self, name: str, serial: int) -> Pair:
        pair = Pair(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        request, extra = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extra.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        subject = ("-subj", f"/CN={name}")
        openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", *subject),
            *("-keyout", str(pair.key), "-out", str(request)),
        )
        ca = ("-CA", str(self.pair.certificate), "-CAkey", str(self.pair.key))
        openssl(
            *("x509", "-req", "-in", str(request), *ca, "-days", DAYS),
            *("-set_serial", str(serial), "-extfile", str(extra), "-out", str(pair.certificate)),
        )
        return pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def secure(home: Path, authority: Authority) -> Iterator[Server]:
    """A server that wants clients' certificates."""
    pair = authority.issue("server", 1)
    flags = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key))
    ca = ("--tls-client-ca", str(authority.pair.certificate))
    with serving(home, "--identity", "echo=8", *flags, *ca) as running:
        yield running


def context(authority: Authority, client: Pair | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(authority.pair.certificate))
    if client is not None:
        made.load_cert_chain(client.certificate, client.key)
    return made


def credentials(authority: Authority, client: Pair | None) -> grpc.ChannelCredentials:
    ca = authority.pair.certificate.read_bytes()
    if client is None:
        return grpc.ssl_channel_credentials(ca)
    key, certificate = client.key.read_bytes(), client.certificate.read_bytes()
    return grpc.ssl_channel_credentials(ca, key, certificate)


def test_mutual_tls_on_both(secure: Server, authority: Authority) -> None:
    client = authority.issue("client", 2)
    url = f"https://{secure.http}"
    with httpx.Client(verify=context(authority, client), trust_env=False) as web:
        assert web.get(f"{url}/healthz").status_code == 200
    with Client(secure.grpc, credentials=credentials(authority, client)) as connected:
        assert connected.health()
        assert [layer.model for layer in connected.layers()] == ["echo"]


def test_without_a_certificate_nobody_comes_in(secure: Server, authority: Authority) -> None:
    with (
        httpx.Client(verify=context(authority, None), trust_env=False) as web,
        pytest.raises(httpx.TransportError),
    ):
        web.get(f"https://{secure.http}/healthz")
    with Client(secure.grpc, credentials=credentials(authority, None)) as connected:
        assert not connected.health(timeout=2)
    with httpx.Client(trust_env=False) as plain, pytest.raises(httpx.TransportError):
        plain.get(f"http://{secure.http}/healthz")


CALLS = {
    "health": (),
    "call": ("--model", "demo", "--layer", "0"),
    "counts": ("--model", "demo"),
    "bench": (*("--model", "demo", "--layer", "0", "--tokens", "1", "--concurrency", "1"),)
    + ("--duration", "0.2", "--processes", "1"),
}


@pytest.fixture(scope="module")
def guarded(home: Path, authority: Authority) -> Iterator[Server]:
    """One that wants a token, too."""
    pair = authority.issue("guarded", 4)
    (home / "guard").write_text("infer secret-and-long-enough\n")
    flags = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key))
    ca = ("--tls-client-ca", str(authority.pair.certificate))
    with serving(home, "--demo", *flags, *ca, "--tokens", str(home / "guard")) as running:
        yield running


@pytest.mark.parametrize("command", CALLS)
def test_commands_are_let_in(
    command: str, guarded: Server, authority: Authority, home: Path
) -> None:
    client = authority.issue(command, 5)
    (home / "token").write_text("secret-and-long-enough\n")
    files = {
        "--tls-ca": authority.pair.certificate,
        "--tls-cert": client.certificate,
        "--tls-key": client.key,
        "--token-file": home / "token",
    }
    flags = [str(word) for pair in files.items() for word in pair]
    done = expertd(home, command, guarded.grpc, *CALLS[command], *flags)
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
    if command != "health":  # which is open to everybody who is who he says
        (home / "other").write_text("another-and-long-enough\n")
        refused = expertd(
            home, command, guarded.grpc, *CALLS[command], *flags[:-1], str(home / "other")
        )
        assert refused.returncode == 1 and "expertd: " in refused.stderr
        assert "another" not in refused.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tls-cert", __file__), "--tls-key"),
        (("--tls-cert", __file__, "--tls-key", __file__), "--tls-ca"),
        (("--tls-ca", "nowhere"), "'nowhere' given; it cannot be read: No such file"),
    ],
)
def test_files_that_do_not_belong_together(home: Path, flags: tuple[str, ...], says: str) -> None:
    ended = expertd(home, "health", "127.0.0.1:1", *flags)
    assert ended.returncode == 2 and says in ended.stderr


def served_serial(address: str, made: ssl.SSLContext) -> str:
    """The serial number of the certificate that a fresh connection is shown."""
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), 5) as raw,
        made.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        shown = wrapped.getpeercert()
    assert shown is not None
    return str(shown["serialNumber"])


def test_replaced_certificates_are_served_and_broken_ones_are_not(
    secure: Server, authority: Authority
) -> None:
    client = authority.issue("client", 3)
    made = context(authority, client)
    made.set_alpn_protocols(["h2"])
    before = served_serial(secure.http, made)
    pair = authority.issue("server", 77)  # the same files, another certificate
    for address in (secure.http, secure.grpc):
        until(lambda address=address: int(served_serial(address, made), 16) == 77)
    assert int(before, 16) != 77
    kept = pair.certificate.read_text()
    pair.certificate.write_text("no certificate")
    time.sleep(2.5)
    for address in (secure.http, secure.grpc):
        assert int(served_serial(address, made), 16) == 77
    pair.certificate.write_text(kept)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tls-cert", "nowhere"), "--tls-key"),
        (("--tls-client-ca", "nowhere"), "--tls-cert"),
        (("--tls-cert", "nowhere", "--tls-key", "nowhere"), "No such file"),
    ],
)
def test_bad_tls_flags_are_refused(home: Path, flags: tuple[str, ...], says: str) -> None:
    ended = expertd(home, "serve", "--identity", "echo=8", *flags)
    assert ended.returncode == 2
    assert says in ended.stderr
