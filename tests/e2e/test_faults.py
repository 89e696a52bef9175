"""Faults of a card in a real process: no memory fails a call, a lost device ends the process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e import faulty
from tests.e2e.servers import Server, in_process, serving

from expertd.engine.policy import Rules
from expertd_client import Client, Overloaded, Unavailable

FAULTY = [sys.executable, "-m", "tests.e2e.faulty"]


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    with serving(home, "--identity", "echo=8", "--device", "cpu", program=FAULTY) as running:
        yield running


def rows(first: float) -> np.ndarray:
    made = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    made[0, 0] = first
    return made


def test_no_memory_fails_one_call_and_the_server_goes_on(server: Server) -> None:
    with Client(server.grpc) as client:
        for _ in range(3):
            with pytest.raises(Overloaded, match="no memory") as caught:
                client.forward("echo", 0, rows(faulty.NO_MEMORY))
            assert caught.value.retry_seconds == 1.0
            np.testing.assert_array_equal(client.forward("echo", 0, rows(0)), rows(0))
        assert client.health()


def test_one_busy_thread_keeps_the_others_waiting_for_two_milliseconds(server: Server) -> None:
    with Client(server.grpc) as client:
        told = client.forward("echo", 0, rows(faulty.INTERVAL))
    assert told == pytest.approx(0.002)


def test_the_flags_reach_the_engine() -> None:
    flags = ("--batch-delay-us", "7", "--batch-invariant", "--max-batch-tokens", "9")
    with in_process("--identity", "echo=8", *flags) as (app, _):
        assert app.engine._options.rules == Rules(9, 7000, merge=False)
    with in_process("--identity", "echo=8") as (app, _):
        assert app.engine._options.rules == Rules(8192, 0, merge=True)


def test_a_lost_device_ends_the_process_with_70(server: Server) -> None:
    """Slow calls hold the device while others queue; then it is lost under all of them."""
    errors: list[Exception] = []
    calls = [rows(faulty.SLOW), rows(faulty.LOST), rows(0), rows(0)]

    def ask(call: np.ndarray, **options: float) -> None:
        with Client(server.grpc) as client:
            try:
                found = client.forward("echo", 0, call, **options)
                np.testing.assert_array_equal(found, call)
            except Unavailable as error:
                errors.append(error)

    # Slow first and alone; the lost one behind it in a batch of its own, the others after it.
    threads = [threading.Thread(target=ask, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    status = health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING")
    with grpc.insecure_channel(server.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == status
        assert next(watch).status != status
    for thread in threads:
        thread.join(20)
    assert len(errors) == 3 and all("restarting" in str(error) for error in errors)
    assert server.process.wait(20) == 70
    assert "illegal memory access" in server.log.read_text()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/healthz", trust_env=False)
