"""Loads, unloads and drains at run time, under load; a rolling restart loses no accepted call."""

from __future__ import annotations

import argparse
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from tests.door.conftest import TOKENS
from tests.door.probing import demo_call
from tests.e2e.servers import MINUTE, Server, expertd, in_process, serving
from tests.waiting import until

from expertd.config import Settings, add_flags, resolve
from expertd.errors import InvalidArgument
from expertd.sources import model_sources
from expertd_client import Client, ExpertdError, LayerFailed, Unavailable
from expertd_wire.methods import ADMIN_SERVICE
from expertd_wire.v1 import experts_pb2 as pb

REQUESTS = {
    "LoadLayers": pb.LoadLayersRequest,
    "UnloadLayers": pb.UnloadLayersRequest,
    "Drain": pb.DrainRequest,
}


def admin(address: str, method: str, token: str = "", **fields: Any) -> dict[int, str]:
    """The states that an admin method answers, by layer."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    request = REQUESTS[method](**fields).SerializeToString()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/{ADMIN_SERVICE}/{method}")
        data = call(request, timeout=20, metadata=metadata)
    return {status.layer: status.state for status in pb.LayerStatesReply.FromString(data).layers}


def refused(address: str, method: str, **fields: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        admin(address, method, **fields)
    error: Any = caught.value
    return error.code().name, error.details()


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with serving(home, "--demo", "--identity", "echo=64") as running:
        yield running


def forward(client: Client, layer: int) -> torch.Tensor:
    fields = demo_call()
    rows, logits = fields["hidden_states"], fields["router_logits"]
    return client.forward("demo", layer, rows, router_logits=logits)


@contextmanager
def under_load(address: str, layer: int) -> Iterator[list[torch.Tensor]]:
    """A caller that never pauses; its answers."""
    found: list[torch.Tensor] = []
    stop = threading.Event()

    def work() -> None:
        with Client(address) as client:
            while not stop.is_set():
                found.append(forward(client, layer))

    caller = threading.Thread(target=work)
    caller.start()
    try:
        yield found
    finally:
        stop.set()
        caller.join(MINUTE)


def test_a_layer_is_unloaded_and_loaded_while_another_serves(server: Server) -> None:
    with Client(server.grpc) as client, under_load(server.grpc, 0) as busy:
        expected, other = forward(client, 1), forward(client, 0)
        before = client.layer("demo", 1)
        assert admin(server.grpc, "UnloadLayers", model="demo", layers=[1]) == {1: "unloaded"}
        with pytest.raises(LayerFailed, match="unloaded by an operator"):
            forward(client, 1)
        assert client.health(), "what an operator unloads is not missing"
        states = admin(server.grpc, "LoadLayers", model="demo", layers=[1])
        assert states.keys() == {1} and states[1] in ("loading", "proving", "ready")
        until(lambda: client.layer("demo", 1).state == "ready", MINUTE)
        after = client.layer("demo", 1)
        assert after.generation == before.generation + 1
        assert after.weights_digest == before.weights_digest
        assert torch.equal(forward(client, 1), expected)
        count = len(busy)
        until(lambda: len(busy) > count + 3)
    # Calls that were merged with others may differ in the last bit.
    assert all(torch.allclose(answer, other, rtol=0.02, atol=0.02) for answer in busy)


def test_what_cannot_be_loaded_is_refused(server: Server) -> None:
    address = server.grpc
    for method in ("LoadLayers", "UnloadLayers"):
        assert refused(address, method, model="nobody")[0] == "NOT_FOUND"
        code, text = refused(address, method, model="../../etc")
        assert code == "NOT_FOUND" and "configured: demo" in text
        assert refused(address, method, model="echo")[0] == "NOT_FOUND"
        code, _ = refused(address, method, model="demo", layers=[99])
        assert code in ("NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION")
        assert refused(address, method, model="demo", layers=[-1])[0] != "INTERNAL"
    with Client(address) as client:
        assert client.health() and forward(client, 1).isfinite().all()


def test_layers_outside_the_operators_are_refused(home: Path) -> None:
    with serving(home, "--demo", "--layers", "1") as server:
        code, text = refused(server.grpc, "LoadLayers", model="demo", layers=[0])
        assert code == "FAILED_PRECONDITION" and "--layers" in text
        assert admin(server.grpc, "UnloadLayers", model="demo") == {1: "unloaded"}
        assert admin(server.grpc, "LoadLayers", model="demo").keys() == {1}


@pytest.fixture(scope="module")
def checkpoint(home: Path) -> Path:
    path = home / "models" / "tiny"
    assert expertd(home, "demo-model", "--out", str(path)).returncode == 0
    return path


def test_the_model_root_bounds_every_path(home: Path, checkpoint: Path) -> None:
    root = home / "root"
    root.mkdir()
    (root / "linked").symlink_to(checkpoint)
    half = root / "half"
    half.mkdir()
    for file in checkpoint.iterdir():
        (half / file.name).symlink_to(file)
    outside = (root / "linked", half, root / ".." / "models" / "tiny", checkpoint)
    for path in outside:
        with pytest.raises(InvalidArgument, match="--model-root"):
            model_sources(settings("--model", f"m={path}", "--model-root", str(root)))
    inside = settings("--model", f"m={checkpoint}", "--model-root", str(checkpoint.parent))
    assert [source.name for source in model_sources(inside)] == ["m"]


def settings(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return resolve(parser.parse_args(flags), {}).settings


def test_a_link_that_leads_out_later_is_refused_when_layers_load(
    home: Path, checkpoint: Path, tmp_path: Path
) -> None:
    root = checkpoint.parent
    link = root / "current"
    link.symlink_to(checkpoint)
    flags = ("--model", f"m={link}", "--model-root", str(root))
    with in_process(*flags) as (app, addresses):
        assert app.wait_ready()
        assert admin(addresses.grpc, "LoadLayers", model="m", layers=[0]).keys() == {0}
        until(lambda: not app.engine.missing())
        link.unlink()
        link.symlink_to(tmp_path)
        code, text = refused(addresses.grpc, "LoadLayers", model="m", layers=[0])
        assert code == "INVALID_ARGUMENT" and "--model-root" in text
    link.unlink()


def test_drain_ends_the_process_in_order(home: Path) -> None:
    tokens = home / "drain-tokens"
    tokens.write_text("".join(f"{scope} {token}\n" for scope, token in TOKENS.items()))
    with serving(home, "--demo", "--tokens", str(tokens)) as server:
        states = admin(server.grpc, "Drain", TOKENS["admin"])
        assert set(states.values()) == {"ready"}
        assert server.process.wait(MINUTE) == 0


def test_sigterm_is_not_ready_then_answers_then_0(home: Path) -> None:
    """Callers under way get their answers; what comes later is refused as UNAVAILABLE."""
    with serving(home, "--demo", "--drain-seconds", "20") as server:
        outcomes = Outcomes()
        callers = outcomes.start(server.grpc, 4)
        until(lambda: outcomes.answered > 20)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.log.read_text()
        outcomes.stop(callers)
        outcomes.check()


class Outcomes:
    """What callers without retries got."""

    def __init__(self) -> None:
        self.answered = 0
        self.refused: list[ExpertdError] = []
        self.answers: list[torch.Tensor] = []
        self._stop = threading.Event()

    def start(self, address: str, count: int) -> list[threading.Thread]:
        callers = [threading.Thread(target=self._call, args=(address,)) for _ in range(count)]
        for caller in callers:
            caller.start()
        return callers

    def stop(self, callers: list[threading.Thread]) -> None:
        self._stop.set()
        for caller in callers:
            caller.join(MINUTE)

    def check(self) -> None:
        """Nothing but answers and refusals, and every answer the same as alone."""
        assert self.answered > 0
        bad = [e for e in self.refused if not isinstance(e, Unavailable)]
        lost = [e for e in self.refused if not before_acceptance(e)]
        assert not bad and not lost, (bad[:3], lost[:3])
        first = self.answers[0]
        assert all(torch.allclose(answer, first, atol=1e-5) for answer in self.answers)

    def _call(self, address: str) -> None:
        with Client(address) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(forward(client, 0))
                    self.answered += 1
                except ExpertdError as error:
                    self.refused.append(error)
                    self._stop.wait(0.02)


BEFORE_ACCEPTANCE = (
    "draining",
    "loading",
    "proving",
    "failed to connect",
    "not served",
    "before it took",
)


def before_acceptance(error: ExpertdError) -> bool:
    """Whether a refusal came before the call was taken: a drain, a loading layer, no listener."""
    return any(words in str(error).lower() for words in BEFORE_ACCEPTANCE)


def free_ports() -> tuple[str, ...]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    return "--http-port", str(ports[0]), "--grpc-port", str(ports[1])


def test_every_call_that_was_answered_arrives(home: Path) -> None:
    """Restart after restart, callers hold exactly as many answers as the servers counted."""
    ports = free_ports()
    outcomes = Outcomes()
    callers: list[threading.Thread] = []
    counted = 0.0
    for _ in range(4):
        with in_process("--demo", *ports) as (app, addresses):
            assert app.wait_ready()
            callers = callers or outcomes.start(addresses.grpc, 4)
            before = outcomes.answered
            until(lambda before=before: outcomes.answered > before + 20, MINUTE)
        lines = app.metrics.render().decode().splitlines()
        counts = [line for line in lines if line.startswith("expertd_requests_total{")]
        counted += sum(float(line.rsplit(" ", 1)[1]) for line in counts if 'code="OK"' in line)
    outcomes.stop(callers)
    outcomes.check()
    assert outcomes.refused, "the restarts were noticed, so the load did run through them"
    assert counted == len(outcomes.answers)


@pytest.mark.slow
def test_a_rolling_restart_loses_no_accepted_call(home: Path) -> None:
    ports = free_ports()
    outcomes = Outcomes()
    address = f"127.0.0.1:{ports[3]}"
    callers: list[threading.Thread] = []
    for _ in range(3):
        with serving(home, "--demo", *ports) as server:
            callers = callers or outcomes.start(address, 4)
            before = outcomes.answered
            until(lambda before=before: outcomes.answered > before + 20, MINUTE)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(MINUTE) == 0, server.log.read_text()
    outcomes.stop(callers)
    outcomes.check()
    assert outcomes.refused, "the restart was noticed, so the load did run through it"


@pytest.mark.slow
def test_the_new_process_is_ready_on_http_too(home: Path) -> None:
    ports = free_ports()
    for _ in range(2):
        with (
            serving(home, "--identity", "echo=8", *ports) as server,
            httpx.Client(base_url=server.url, trust_env=False) as web,
        ):
            assert web.get("/readyz").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(MINUTE) == 0
