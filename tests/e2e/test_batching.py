"""Batching as a caller and an operator see it: splitting, merging, order, shares, hints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save
from tests.e2e.local import FLAGS, Local
from tests.e2e.servers import in_process
from tests.e2e.test_metrics import scrape, value
from tests.service.engine.parts import Gate
from tests.waiting import until

from expertd_client import Client, DeadlineExceeded, Overloaded

Rows = NDArray[np.float32]
DEMO = ("--demo", "--tune", "off")


def rows(tokens: int, width: int = 8, seed: int = 0) -> Rows:
    random = np.random.default_rng((tokens, width, seed))
    return random.standard_normal((tokens, width)).astype(np.float32)


@contextmanager
def held(*flags: str) -> Iterator[tuple[Local, Gate, Client]]:
    """A server whose echo layer waits for the gate with the one row of its first call."""
    with in_process("--identity", "echo=8", *flags) as (app, addresses):
        assert app.wait_ready()
        local, gate = Local(app, addresses), Gate()
        local.script(gate)
        with Client(addresses.grpc) as client, ThreadPoolExecutor(1) as first:
            running = first.submit(client.forward, "echo", 0, rows(1))
            assert gate.entered.wait(10)
            yield local, gate, client
            gate.opened.set()
            running.result(20)


def demo_call(client: Client, tokens: int, seed: int = 0) -> Rows:
    made, logits = rows(tokens, 256, seed), rows(tokens, 32, seed)
    answered: Rows = client.forward("demo", 0, made, router_logits=logits)
    return answered


def test_a_call_over_the_limit_is_launched_in_pieces_and_joined() -> None:
    with in_process(*DEMO, "--max-batch-tokens", "16") as (app, addresses):
        assert app.wait_ready()
        with Client(addresses.grpc) as client:
            whole = demo_call(client, 50)
            made, logits = rows(50, 256), rows(50, 32)
            pieces = [
                client.forward("demo", 0, made[at : at + 16], router_logits=logits[at : at + 16])
                for at in range(0, 50, 16)
            ]
        np.testing.assert_array_equal(whole, np.concatenate(pieces))
        told = scrape(addresses.http)
    assert value(told, "expertd_batch_tokens_bucket", le="16.0") == 8
    assert value(told, "expertd_batch_tokens_count") == 8, "no launch of more"
    plan = {"model": "demo", "carrier": "grpc", "backend": "grouped", "mode": "routed"}
    assert value(told, "expertd_requests_total", **plan, code="OK") == 5
    assert value(told, "expertd_tokens_total", model="demo") == 100


def together(client: Client, calls: list[Callable[[], Rows]]) -> list[Rows]:
    """All calls begin at once, so that they meet in the queue."""
    start = threading.Barrier(len(calls))

    def one(call: Callable[[], Rows]) -> Rows:
        start.wait(20)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_batch_invariant_calls_run_alone_and_answer_the_same_bits() -> None:
    with in_process(*DEMO, "--batch-invariant") as (app, addresses):
        assert app.wait_ready()
        with Client(addresses.grpc) as client:
            alone = [demo_call(client, 1 + seed % 5, seed) for seed in range(12)]
            calls = [lambda s=seed: demo_call(client, 1 + s % 5, s) for seed in range(12)]
            for found, expected in zip(together(client, calls), alone, strict=True):
                np.testing.assert_array_equal(found, expected)
        told = scrape(addresses.http)
    sizes = "expertd_batch_requests"
    assert value(told, f"{sizes}_sum") == value(told, f"{sizes}_count") == 24


def test_deterministic_calls_answer_the_same_bits_each_time() -> None:
    with in_process(*DEMO, "--deterministic") as (app, addresses):
        assert app.wait_ready()
        assert {r.trust.deterministic for r in app.residents.all()} == {True}
        with Client(addresses.grpc) as client:
            first = demo_call(client, 33)
            for _ in range(3):
                np.testing.assert_array_equal(demo_call(client, 33), first)


def test_a_delay_lets_two_calls_of_an_idle_server_meet() -> None:
    """The batch is full with the second, so neither waits for the whole second."""
    flags = ("--batch-delay-us", "1000000", "--max-batch-tokens", "4")
    with in_process("--identity", "echo=8", *flags) as (app, addresses):
        assert app.wait_ready()
        local = Local(app, addresses)
        with Client(addresses.grpc) as client, ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.forward, "echo", 0, rows(2, seed=1))
            until(lambda: local.echo.queued_tokens == 2)
            np.testing.assert_array_equal(client.forward("echo", 0, rows(2)), rows(2))
            np.testing.assert_array_equal(first.result(20), rows(2, seed=1))
        told = scrape(addresses.http)
    assert value(told, "expertd_batch_requests_count") == 1
    assert value(told, "expertd_batch_requests_sum") == 2


def test_priority_goes_first_and_the_rest_in_the_order_of_their_age() -> None:
    with held("--max-batch-tokens", "7") as (local, gate, client), ThreadPoolExecutor(4) as pool:
        answers: list[Future[Rows]] = []
        # Of the sizes no two fit into one launch.
        for tokens, priority in ((4, -1), (5, 0), (6, 0), (7, 9)):
            before = local.echo.queued_tokens
            ask = {"priority": priority}
            answers.append(pool.submit(client.forward, "echo", 0, rows(tokens), **ask))
            until(lambda b=before, t=tokens: local.echo.queued_tokens == b + t)
        gate.opened.set()
        for tokens, answer in zip((4, 5, 6, 7), answers, strict=True):
            np.testing.assert_array_equal(answer.result(20), rows(tokens))
        assert gate.batches == [1, 7, 5, 6, 4]


def test_what_is_past_its_deadline_never_reaches_the_device() -> None:
    with held() as (local, gate, client):
        with pytest.raises(DeadlineExceeded):
            client.forward("echo", 0, rows(3), timeout=0.2)
        until(lambda: local.echo.queued_tokens == 0)
        gate.opened.set()
        client.forward("echo", 0, rows(2))
        assert gate.batches == [1, 2]


def test_a_full_queue_says_when_to_come_back() -> None:
    with held(*FLAGS[2:]) as (local, gate, client), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.forward, "echo", 0, rows(2, seed=s)) for s in (1, 2)]
        until(lambda: local.echo.queued_tokens == 4)
        with pytest.raises(Overloaded, match="--max-queued-tokens") as refused:
            client.forward("echo", 0, rows(1))
        assert refused.value.retry_seconds is not None and refused.value.retry_seconds > 0
        answer = httpx.post(
            f"http://{local.addresses.http}/v1/forward?model=echo&layer=0",
            content=save({"hidden_states": rows(1)}),
            trust_env=False,
        )
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["reason"] == "OVERLOADED"
        gate.opened.set()
        for done in waiting:
            done.result(20)


def test_a_client_that_fills_the_queue_makes_room_for_another(tmp_path: Path) -> None:
    names = {"greedy": "a-greedy-clients-token", "modest": "a-modest-clients-token"}
    file = tmp_path / "tokens"
    file.write_text("".join(f"infer,metrics {token}\n" for token in names.values()))
    flags = ("--identity", "echo=8", "--max-queued-tokens", "4", "--tokens", str(file))
    with in_process(*flags) as (app, addresses), ThreadPoolExecutor(6) as pool:
        assert app.wait_ready()
        local, gate = Local(app, addresses), Gate()
        local.script(gate)
        clients = {who: Client(addresses.grpc, token=token) for who, token in names.items()}

        def ask(who: str, seed: int) -> Future[Rows]:
            return pool.submit(clients[who].forward, "echo", 0, rows(1, seed=seed))

        with clients["greedy"], clients["modest"]:
            running = ask("greedy", 0)
            assert gate.entered.wait(10)
            greedy = []
            for seed in range(1, 5):
                greedy.append(ask("greedy", seed))
                until(lambda s=seed: local.echo.queued_tokens == s)
            modest = ask("modest", 9)
            with pytest.raises(Overloaded, match="beyond its client's share"):
                greedy[-1].result(20)
            with pytest.raises(Overloaded, match="whose share is 2 "):
                ask("greedy", 5).result(20)
            gate.opened.set()
            np.testing.assert_array_equal(modest.result(20), rows(1, seed=9))
            for seed, answer in enumerate((running, *greedy[:-1])):
                np.testing.assert_array_equal(answer.result(20), rows(1, seed=seed))
