"""Every method and every route is refused without the right token, but the three that are open."""

from __future__ import annotations

from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.door.conftest import TOKENS
from tests.e2e.servers import Server, expertd, in_process

from expertd.errors import InvalidArgument
from expertd.transport.auth import Scope, read_tokens
from expertd_client import Client, PermissionDenied, Unauthenticated
from expertd_wire.v1 import experts_pb2

SERVICES = ("expertd_wire.v1.Experts", "expertd_wire.v1.Admin")
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
NEEDED = {"expertd_wire.v1.Experts": "infer", "expertd_wire.v1.Admin": "admin", REFLECTION: "infer"}
OPEN_ROUTES = ("/healthz", "/readyz")


def methods() -> list[MethodDescriptor]:
    assert experts_pb2.DESCRIPTOR and health_pb2.DESCRIPTOR and reflection_pb2.DESCRIPTOR
    services = [Default().FindServiceByName(name) for name in (*SERVICES, HEALTH, REFLECTION)]
    return [method for service in services for method in service.methods]


def code(server: Server, method: MethodDescriptor, token: str | None) -> str:
    """The status of one empty call of a method, whatever it streams."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    path = f"/{method.containing_service.full_name}/{method.name}"
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=5)
        try:
            next(call, None)  # a Watch answers once and then waits
            call.cancel()
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.full_name)
def test_every_method_wants_its_scope(guarded: Server, method: MethodDescriptor) -> None:
    service = method.containing_service.full_name
    asked = {scope: token for scope, token in TOKENS.items() if not ends_it(method, scope)}
    answers = {scope: code(guarded, method, token) for scope, token in asked.items()}
    nobody, stranger = code(guarded, method, None), code(guarded, method, "x" * 20)
    if service == HEALTH:
        assert {nobody, stranger, *answers.values()} <= {"OK", "NOT_FOUND", "UNIMPLEMENTED"}
        return
    assert (nobody, stranger) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    for scope, answer in answers.items():
        if scope != NEEDED[service]:
            assert answer == "PERMISSION_DENIED", scope
        else:
            assert answer not in ("UNAUTHENTICATED", "PERMISSION_DENIED"), scope


def ends_it(method: MethodDescriptor, scope: str) -> bool:
    """Drain with its scope ends the session's server: test_admin does it with one of its own."""
    return bool(method.name == "Drain" and scope == "admin")


def test_the_server_serves_what_it_describes(guarded: Server) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    metadata = (("authorization", f"Bearer {TOKENS['infer']}"),)
    with grpc.insecure_channel(guarded.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=5)
    served = {service.name for service in reply.list_services_response.service}
    assert served == {*SERVICES, HEALTH, REFLECTION}


def routes() -> list[tuple[str, str]]:
    """Every route of the application itself, so that a new one cannot be forgotten."""
    with in_process("--identity", "echo=8") as (app, _):
        found = app.http_application.routes
    return [
        (method, route.path.replace("{model:path}", "demo").replace("{layer}", "0"))
        for route in found
        for method in sorted(getattr(route, "methods", None) or {"GET"})
    ]


def needed(path: str) -> str | None:
    if path in OPEN_ROUTES:
        return None
    return "metrics" if path == "/metrics" else "infer"


def test_every_route_wants_its_scope(guarded: Server) -> None:
    found = routes()
    assert ("POST", "/v1/forward") in found and ("GET", "/metrics") in found
    with httpx.Client(base_url=guarded.url, trust_env=False, timeout=10) as web:
        for method, path in found:
            scope = needed(path)
            statuses = {
                name: web.request(method, path, headers={"authorization": f"Bearer {token}"})
                for name, token in {**TOKENS, "stranger": "x" * 20}.items()
            }
            nobody = web.request(method, path)
            if scope is None:
                assert nobody.status_code == 200
                continue
            assert (nobody.status_code, statuses.pop("stranger").status_code) == (401, 401), path
            assert nobody.headers["www-authenticate"] == "Bearer"
            for name, response in statuses.items():
                assert (response.status_code == 403) == (name != scope), (path, name)


def test_an_unknown_route_wants_the_admin_scope(guarded: Server) -> None:
    with httpx.Client(base_url=guarded.url, trust_env=False) as web:
        headers = {"authorization": f"Bearer {TOKENS['infer']}"}
        assert web.get("/anything", headers=headers).status_code == 403
        headers = {"authorization": f"Bearer {TOKENS['admin']}"}
        assert web.get("/anything", headers=headers).status_code == 404


def test_the_clients_say_what_was_wrong(guarded: Server) -> None:
    with Client(guarded.grpc) as client, pytest.raises(Unauthenticated, match="authorization"):
        client.layers()
    token = TOKENS["metrics"]
    with Client(guarded.grpc, token=token) as client:
        with pytest.raises(PermissionDenied, match="infer"):
            client.layers()
        assert client.health()
    with Client(guarded.grpc, token=TOKENS["infer"]) as client:
        assert {layer.model for layer in client.layers()} == {"demo", "echo"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9"}, 400),
        ({}, 400),
    ],
)
def test_a_post_checks_host_and_origin(
    guarded: Server, headers: dict[str, str], status: int
) -> None:
    headers = {"authorization": f"Bearer {TOKENS['infer']}"} | headers
    with httpx.Client(base_url=guarded.url, trust_env=False) as web:
        assert web.post("/v1/forward", headers=headers).status_code == status


def test_who_posts_to_an_address_of_this_machine_need_not_be_told_of(home: Path) -> None:
    """Names are: a foreign page may give its own name our address."""
    tokens = home / "tokens-everywhere"
    tokens.write_text(f"infer {TOKENS['infer']}\n")
    flags = ("--identity", "echo=8", "--host", "0.0.0.0", "--tokens", str(tokens))
    with in_process(*flags) as (_, addresses):
        url = f"http://127.0.0.2:{addresses.http.split(':')[1]}/v1/forward"
        bearer = {"authorization": f"Bearer {TOKENS['infer']}"}
        with httpx.Client(headers=bearer, trust_env=False) as web:
            assert web.post(url).status_code == 400
            foreign = web.post(url, headers={"host": "evil.example"})
            assert foreign.status_code == 403 and "--allow-host" in foreign.text
            origin = web.post(url, headers={"origin": "http://127.0.0.3"})
            assert origin.status_code == 403


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no tokens"),
        ("infer\n", "line 1"),
        ("# x\nroot 0123456789abcdef\n", "line 2: scopes"),
        ("infer 0123456789abcdef extra\n", "line 1"),
        ("infer 0123456789abcdé\n", "ASCII"),
    ],
)
def test_a_bad_token_file_names_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=says):
        read_tokens(path)
    with pytest.raises(InvalidArgument, match="nowhere"):
        read_tokens(tmp_path / "nowhere")


def test_a_token_that_is_easily_guessed_is_taken_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text("infer 0123456789abcdef\nadmin secret\n")
    guard = read_tokens(path)
    assert guard.allow(Scope.ADMIN, "Bearer secret") == "token 1"
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"--tokens {path}, line 2"
    ]
    assert "secret" not in caplog.text


def test_a_token_with_several_scopes_and_no_token_in_the_log(guarded: Server) -> None:
    log = guarded.log.read_text()
    assert not any(token in log for token in TOKENS.values())


def test_without_tokens_only_the_loopback_is_bound(home: Path) -> None:
    ended = expertd(home, "serve", "--identity", "echo=8", "--host", "0.0.0.0")
    assert ended.returncode == 2
    assert "--tokens" in ended.stderr
