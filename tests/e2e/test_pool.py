"""A pool over real servers: their answers are added up right, and one may die."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.e2e.servers import Server, in_process, serving
from tests.strategies import generator, random_topk

from expertd.weights.demo import write_demo
from expertd_client import AsyncExpertPool, Client, ExpertPool
from expertd_client.errors import (
    ExpertsUnavailable,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
)

EXPERTS, HIDDEN = 32, 256
HALVES = ("0-15", "16-31")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe demo in bf16, of which every server here has its part."""
    path = tmp_path_factory.mktemp("weights") / "demo"
    write_demo(path, quant="bf16")
    return path


@pytest.fixture(scope="module")
def fleet(deep: Path, checkpoint: Path) -> Iterator[list[str]]:
    """Both demos in bf16, in three overlapping ranges, and whole: addresses."""
    with ExitStack() as running:
        addresses = []
        for held in ("0-9", "8-23", "20-31", "0-31"):
            models = ("--model", f"deep={deep}", "--model", f"demo={checkpoint}")
            app, address = running.enter_context(in_process(*models, "--experts", held))
            assert app.wait_ready()
            addresses.append(address.grpc)
        yield addresses


def drawn(tokens: int, seed: int) -> tuple[Any, Any]:
    random = generator(seed)
    rows = torch.randn(tokens, HIDDEN, generator=random)
    return rows, torch.randn(tokens, EXPERTS, generator=random)


def reference(address: str, model: str, layer: int, rows: Any, **routing: Any) -> Any:
    """What the fp32 reference answers on a server of all experts."""
    with Client(address) as client:
        return client.forward(model, layer, rows, backend="reference", **routing)


@pytest.mark.parametrize("model", ["deep", "demo"])
@pytest.mark.parametrize("form", ["logits", "topk"])
def test_ranges_add_up_to_the_whole(fleet: list[str], model: str, form: str) -> None:
    rows, logits = drawn(200, seed=3)
    ids, weights = random_topk(200, EXPERTS, 6, generator(4))
    routing = (
        {"router_logits": logits}
        if form == "logits"
        else {"topk_ids": ids, "topk_weights": weights}
    )
    expected = reference(fleet[3], model, 1, rows, **routing)
    with ExpertPool(fleet[:3]) as pool:
        pool.layers()
        reply = pool.call(model, 1, rows, backend="reference", **routing)
        close = pool.forward(model, 1, rows, **routing)
    assert {share.target for share in reply.shares} == set(fleet[:3])
    worst = (reply.output - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
    assert worst.max() < 1e-5, f"row {int(worst.argmax())} is off by {float(worst.max())}"
    torch.testing.assert_close(close, expected, rtol=3e-2, atol=3e-2)


async def test_rows_are_split_over_whole_servers(fleet: list[str], server: Server) -> None:
    rows, logits = drawn(300, seed=5)
    expected = reference(fleet[3], "deep", 0, rows, router_logits=logits)
    async with AsyncExpertPool([fleet[3], server.grpc]) as pool:
        await pool.layers()
        calls = [
            pool.call("deep", 0, rows, router_logits=logits, backend="reference") for _ in range(3)
        ]
        replies = await asyncio.gather(*calls)
    for reply in replies:
        torch.testing.assert_close(reply.output, expected, rtol=1e-5, atol=1e-6)
    assert {share.target for reply in replies for share in reply.shares} == {fleet[3], server.grpc}


def test_a_servers_own_refusal_reaches_the_caller(fleet: list[str]) -> None:
    rows, _ = drawn(2, seed=6)
    twice = torch.tensor([[3, 3], [1, 2]], dtype=torch.int32)
    with ExpertPool(fleet[:3]) as pool, pytest.raises(InvalidArgument, match="twice"):
        pool.forward("demo", 0, rows, topk_ids=twice, topk_weights=torch.ones(2, 2))


def test_an_identity_layer_works(server: Server) -> None:
    rows = np.random.default_rng(1).standard_normal((100, 64)).astype(np.float32)
    with ExpertPool(server.grpc) as pool:
        assert (pool.forward("echo", 0, rows) == rows).all()


@dataclass
class Callers:
    """Threads that call without a pause, and what came of it."""

    pool: ExpertPool
    rows: Any
    logits: Any
    expected: Any
    wrong: list[str] = field(default_factory=list)
    retries: list[int] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        while not self.stop.is_set() and not self.wrong:
            try:
                reply = self.pool.call("demo", 0, self.rows, router_logits=self.logits, timeout=60)
                torch.testing.assert_close(reply.output, self.expected, rtol=1e-4, atol=1e-5)
                self.retries.append(reply.attempts - len(reply.shares))
            except Exception as error:
                self.wrong.append(repr(error))

    @contextmanager
    def working(self, count: int) -> Iterator[None]:
        threads = [threading.Thread(target=self.work) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(60)

    def go_on(self) -> None:
        """Waits for some more calls."""
        before = len(self.retries)
        wait_for(lambda: self.wrong or len(self.retries) >= before + 10)


def test_one_of_two_dies(home: Path, checkpoint: Path) -> None:
    """Every call is right, before and after; what was under way is asked again."""
    rows, logits = drawn(64, seed=7)
    logits[:9, :16] -= 20  # rows that need the upper half alone
    flags = ("--model", f"demo={checkpoint}", "--threads", "1", "--layers", "0")
    with ExitStack() as running:
        mortal = [
            running.enter_context(serving(home, *flags, "--experts", held)) for held in HALVES
        ]
        alive = [running.enter_context(in_process(*flags, "--experts", held))[1] for held in HALVES]
        whole = running.enter_context(in_process(*flags))[1].grpc
        expected = forwarded(whole, rows, logits)
        with ExpertPool([server.grpc for server in (*mortal, *alive)]) as pool:
            wait_for(lambda: len(pool.layers("demo")) == 4)
            callers = Callers(pool, rows, logits, expected)
            with callers.working(3):
                for server in mortal:
                    callers.go_on()
                    server.process.send_signal(signal.SIGKILL)
                callers.go_on()
            assert callers.wrong == []
            print(f"{len(callers.retries)} calls, {sum(callers.retries)} retries")
        with ExpertPool([mortal[0].grpc, alive[1].grpc]) as pool:
            with pytest.raises(ExpertsUnavailable, match="layer demo/0: .* experts 0-15"):
                pool.forward("demo", 0, rows, router_logits=logits, timeout=2.0)
            output, complete = pool.forward(
                "demo", 0, rows, router_logits=logits, partial="allow", timeout=20.0
            )
        with ExpertPool(alive[1].grpc) as pool:
            upper, _ = pool.forward("demo", 0, rows, router_logits=logits, partial="allow")
    assert output.equal(upper)
    needed = logits.topk(4, dim=1).indices
    assert complete.equal((needed >= 16).all(dim=1)) and 0 < complete.sum() < len(rows)


def forwarded(address: str, rows: Any, logits: Any) -> Any:
    """One server's answer, once it is ready."""
    with ExpertPool(address) as pool:
        return pool.forward("demo", 0, rows, router_logits=logits, timeout=60)


def wait_for(done: Any) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_other_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """One half of each of two checkpoints; then the other halves as well, which make a whole."""
    other = tmp_path / "other"
    write_demo(other, quant="bf16", seed=1)
    rows, logits = drawn(40, seed=8)
    with ExitStack() as running:
        addresses = []
        for path, held in zip((checkpoint, other, other), (*HALVES, HALVES[0]), strict=True):
            flags = ("--model", f"m={path}", "--experts", held, "--layers", "0")
            addresses.append(running.enter_context(in_process(*flags))[1].grpc)
        with ExpertPool(addresses[:2], wait_for_experts=False) as pool:
            wait_for(lambda: len(pool.layers("m")) == 2)
            with pytest.raises(ExpertsUnavailable, match="of other weights or settings"):
                pool.forward("m", 0, rows, router_logits=logits)
        with ExpertPool(addresses) as pool:
            wait_for(lambda: len(pool.layers("m")) == 3)
            reply = pool.call("m", 0, rows, router_logits=logits)
        assert {share.target for share in reply.shares} == set(addresses[1:])
        flags = ("--model", f"m={other}", "--layers", "0")
        whole = running.enter_context(in_process(*flags))[1].grpc
        with ExpertPool(whole) as pool:
            expected = pool.forward("m", 0, rows, router_logits=logits)
    torch.testing.assert_close(reply.output, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_is_loaded_again_under_calls(checkpoint: Path) -> None:
    """While it loads there is nobody to ask, so calls wait; then they are of the new load."""
    rows, logits = drawn(40, seed=9)
    with in_process("--model", f"m={checkpoint}", "--layers", "0") as (app, address):
        assert app.wait_ready()
        with ExpertPool(address.grpc) as pool:
            expected = pool.forward("m", 0, rows, router_logits=logits)
            for generation in (2, 3):
                app.steward.load("m", [0])
                wait_for(lambda: app.residents.get("m", 0).state == "ready")
                assert pool.forward("m", 0, rows, router_logits=logits).equal(expected)
                assert app.residents.get("m", 0).generation == generation
                assert pool.layer("m", 0).generation == generation


def test_tokens(tmp_path: Path) -> None:
    """A pool shows its token to every replica, and is told at once if it is not enough."""
    tokens = tmp_path / "tokens"
    tokens.write_text("infer the-token-for-calls\nmetrics the-token-for-metrics\n")
    rows = np.ones((3, 16), np.float32)
    with in_process("--identity", "echo=16", "--tokens", str(tokens)) as (app, address):
        assert app.wait_ready()
        with ExpertPool(address.grpc, token="the-token-for-calls") as pool:
            assert (pool.forward("echo", 0, rows) == rows).all()
        for token, error in ((None, Unauthenticated), ("the-token-for-metrics", PermissionDenied)):
            with ExpertPool(address.grpc, token=token) as pool, pytest.raises(error):
                pool.forward("echo", 0, rows, timeout=60)
