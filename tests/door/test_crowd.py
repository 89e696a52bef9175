"""More calls than threads: refused at once with the flag's name, while health checks pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import save
from tests.e2e.local import Local
from tests.e2e.servers import in_process
from tests.service.engine.parts import Gate
from tests.waiting import until

from expertd.app import App
from expertd_client import Client, Overloaded, Unauthenticated

CALLS = 3
ROWS = np.ones((1, 8), np.float32)
FLAGS = ("--identity", "echo=8", "--max-concurrent-calls", str(CALLS))
TOKENS = {"infer,metrics": "a-token-for-calls", "infer": "another-callers-token"}


class Crowd(NamedTuple):
    """A server all of whose threads wait for the gate, and a client with its token."""

    app: App
    local: Local
    gate: Gate
    client: Client
    headers: dict[str, str]


@pytest.fixture(params=["without tokens", "with tokens"])
def crowd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Crowd]:
    token, flags = None, FLAGS
    if request.param == "with tokens":
        token = TOKENS["infer,metrics"]
        lines = (f"{scopes} {token}\n" for scopes, token in TOKENS.items())
        (tmp_path / "tokens").write_text("".join(lines))
        flags = (*FLAGS, "--tokens", str(tmp_path / "tokens"))
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with ExitStack() as stack:
        app, addresses = stack.enter_context(in_process(*flags))
        assert app.wait_ready()
        local, gate = Local(app, addresses), Gate()
        local.script(gate)
        client = stack.enter_context(Client(addresses.grpc, token=token))
        threads: list[threading.Thread] = []
        for _ in range(CALLS):
            threads.append(threading.Thread(target=client.forward, args=("echo", 0, ROWS)))
            threads[-1].start()
            assert gate.entered.wait(10)
        until(lambda: local.echo.queued_tokens == CALLS - 1)
        yield Crowd(app, local, gate, client, headers)
        gate.opened.set()
        for thread in threads:
            thread.join(10)
        until(lambda: bool((client.forward("echo", 0, ROWS) == ROWS).all()))


def test_one_more_call_is_refused_with_the_flag_and_a_hint(crowd: Crowd) -> None:
    for _ in range(20):
        with pytest.raises(Overloaded, match="--max-concurrent-calls") as caught:
            crowd.client.forward("echo", 0, ROWS, timeout=5)
        assert caught.value.retry_seconds == 0.1
    with pytest.raises(Overloaded, match="--max-concurrent-calls"):
        crowd.client.layers()
    url = f"http://{crowd.local.addresses.http}/metrics"
    shown = httpx.get(url, headers=crowd.headers, trust_env=False).text
    assert 'expertd_rejected_total{reason="queue_full"} 21.0' in shown


def test_health_is_told_however_many_calls_there_are(crowd: Crowd) -> None:
    serving = health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING")
    asked = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(crowd.local.addresses.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(asked, timeout=20) for _ in range(20)]
        assert [next(watch).status for watch in watches] == [serving] * 20
        checks = [stub.Check.future(asked, timeout=20) for _ in range(50)]
        assert {check.result().status for check in checks} == {serving}
        for watch in watches:
            watch.cancel()
    assert crowd.client.health()


def test_a_stranger_is_told_so_even_then(crowd: Crowd) -> None:
    if not crowd.headers:
        return
    with (
        Client(crowd.local.addresses.grpc, token="not-a-token-of-ours") as stranger,
        pytest.raises(Unauthenticated),
    ):
        stranger.forward("echo", 0, ROWS, timeout=5)


def test_a_call_that_waits_belongs_to_its_token_or_its_host(crowd: Crowd) -> None:
    batcher = crowd.app.engine._batcher
    expected = "token 0" if crowd.headers else "ipv4:127.0.0.1"
    assert set(batcher._ledger.clients) == {expected}
    url = f"http://{crowd.local.addresses.http}/v1/forward?model=echo&layer=0"
    headers = crowd.headers | {"Host": "127.0.0.1"}
    if crowd.headers:
        headers["Authorization"] = f"Bearer {TOKENS['infer']}"
    body = save({"hidden_states": ROWS})
    web = threading.Thread(
        target=lambda: httpx.post(url, content=body, headers=headers, trust_env=False)
    )
    web.start()
    until(lambda: crowd.local.echo.queued_tokens == CALLS)
    by_http = {"token 1"} if crowd.headers else set()
    assert set(batcher._ledger.clients) == {expected} | by_http
    crowd.gate.opened.set()
    web.join(10)
