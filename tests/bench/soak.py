"""A server under everything at once for minutes: what is lost, and what grows?

Callers send calls of mixed sizes over gRPC and HTTP, cancel some, give some too little time, and
send bad ones. Every call must end with its own rows, or with an error that fits what was sent. The
process's memory, threads and descriptors are printed all along; the first tenth is warm-up.

Run: nice python -m tests.bench.soak [--minutes 10] [--callers 6] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
from safetensors.numpy import load, save
from tests.e2e.servers import Server, serving

from expertd_client import Client, ExpertdError
from expertd_client.calls import CallOptions
from expertd_wire.codec import encode_forward_call
from expertd_wire.messages import ForwardCall
from expertd_wire.methods import FORWARD
from expertd_wire.tensors import WireTensor

WIDTH, EXPERTS = 256, 32
LARGEST = 700
FLAGS = (
    *("--demo", "--identity", f"echo={WIDTH}", "--device", "cpu", "--expert-rows"),
    *("--max-batch-tokens", "256", "--max-queued-tokens", "1500", "--max-concurrent-calls", "16"),
)
SAMPLES = 40
"""Calls to the demo whose answers are known."""
GRACE_SECONDS = 5.0
BUSY = {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
"""Errors that any call may have here."""


class Sample(NamedTuple):
    """A call to the demo and its answer, from the reference backend of an idle server."""

    rows: np.ndarray
    routing: CallOptions
    answer: np.ndarray


class Usage(NamedTuple):
    """What a process holds."""

    megabytes: float
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in status)
        kilobytes = int(found["VmRSS"].split()[0])
        descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return cls(kilobytes / 1024, int(found["Threads"]), descriptors)


@dataclass
class Score:
    """How the calls ended: kind of call and code, and whatever must not happen, in words."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    begun: int = 0
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        with self._lock:
            self.begun += 1

    def end(self, kind: str, code: str, allowed: set[str]) -> None:
        with self._lock:
            self.ends[kind, code] += 1
            if code not in allowed:
                self.wrong.append(f"{kind} ended with {code}, {sorted(allowed)} expected")

    @property
    def lost(self) -> int:
        """Calls that began and never ended."""
        return self.begun - sum(self.ends.values())


class Caller(threading.Thread):
    """One caller with its own connections, doing one thing after another until the end."""

    def __init__(
        self, server: Server, samples: list[Sample], score: Score, end: float, seed: int
    ) -> None:
        super().__init__(name=f"caller-{seed}")
        self._server, self._samples, self._score, self._end = server, samples, score, end
        self._random, self._rng = random.Random(seed), np.random.default_rng(seed)
        self._habits: dict[Callable[[], None], int] = {
            self._demo: 30,
            self._echo: 30,
            self._http: 10,
            self._hurried: 10,
            self._leaving: 10,
            self._bad: 8,
            self._garbage: 2,
        }

    def run(self) -> None:
        with ExitStack() as stack:
            self._client = stack.enter_context(Client(self._server.grpc))
            self._web = stack.enter_context(
                httpx.Client(base_url=self._server.url, trust_env=False)
            )
            self._channel = stack.enter_context(grpc.insecure_channel(self._server.grpc))
            while time.monotonic() < self._end:
                (habit,) = self._random.choices(list(self._habits), list(self._habits.values()))
                self._score.begin()
                habit()

    def _rows(self) -> np.ndarray:
        tokens = self._random.choice((1, 1, 2, 7, 40, 200, LARGEST))
        return self._rng.standard_normal((tokens, WIDTH), dtype=np.float32)

    def _ask(self, kind: str, allowed: set[str], ask: Callable[[], bool]) -> None:
        """One call through the client; ask says whether the answer is right."""
        begin = time.monotonic()
        try:
            code = "OK" if ask() else "WRONG ROWS"
        except ExpertdError as error:
            code = _code(error)
        if time.monotonic() - begin > 30 + GRACE_SECONDS:
            code = "TOO LATE"
        self._score.end(kind, code, allowed)

    def _demo(self) -> None:
        sample = self._random.choice(self._samples)

        def ask() -> bool:
            found = self._client.forward("demo", 1, sample.rows, **sample.routing)
            scale = np.abs(sample.answer).max()
            return bool(np.abs(found - sample.answer).max() < 1e-2 * scale)

        self._ask("demo", {"OK"} | BUSY, ask)

    def _echo(self) -> None:
        rows, priority = self._rows(), self._random.choice((-1, 0, 0, 5))

        def ask() -> bool:
            return np.array_equal(self._client.forward("echo", 0, rows, priority=priority), rows)

        self._ask("echo", {"OK"} | BUSY, ask)

    def _hurried(self) -> None:
        rows, timeout = self._rows(), self._random.choice((0.0005, 0.002, 0.01, 0.05))

        def ask() -> bool:
            return np.array_equal(self._client.forward("echo", 0, rows, timeout=timeout), rows)

        self._ask("hurried", {"OK"} | BUSY, ask)

    def _http(self) -> None:
        rows = self._rows()
        try:
            answer = self._web.post(
                "/v1/forward",
                params={"model": "echo", "layer": 0},
                content=save({"hidden_states": rows}),
                timeout=30 + GRACE_SECONDS,
            )
        except httpx.TimeoutException:
            return self._score.end("http", "TOO LATE", set())
        code = str(answer.status_code)
        if code == "200" and not np.array_equal(load(answer.content)["output"], rows):
            code = "WRONG ROWS"
        self._score.end("http", code, {"200", "429", "504"})

    def _leaving(self) -> None:
        """Sends a call and cancels it at any moment of its way."""
        call = self._channel.unary_unary(FORWARD).future(_request(self._rows()), timeout=30)
        time.sleep(self._random.choice((0, 0.0005, 0.002, 0.02)))
        call.cancel()
        try:
            call.result(GRACE_SECONDS)
            code = "OK"
        except grpc.FutureCancelledError:
            code = "CANCELLED"
        except grpc.FutureTimeoutError:
            return  # it is lost
        except grpc.RpcError as error:
            code = error.code().name
        self._score.end("leaving", code, {"OK", "CANCELLED"} | BUSY)

    def _bad(self) -> None:
        rows = self._rows()
        logits = np.zeros((len(rows), EXPERTS), np.float32)
        logits[-1, 3] = np.nan
        model, given = self._random.choice(
            (
                ("demo", {"router_logits": logits}),
                ("demo", {"topk_ids": np.full((len(rows), 2), 9, np.int32)}),
                ("demo", {"topk_ids": np.full((len(rows), 1), EXPERTS, np.int32)}),
                ("demo", {}),
                ("nobody", {}),
            )
        )
        if "topk_ids" in given:
            given["topk_weights"] = np.ones(given["topk_ids"].shape, np.float32)

        def ask() -> bool:
            self._client.forward(model, 0, rows, **given)
            return False

        self._ask("bad", {"INVALID_ARGUMENT", "NOT_FOUND"} | BUSY, ask)

    def _garbage(self) -> None:
        data = self._rng.bytes(self._random.randint(1, 5000))
        try:
            self._channel.unary_unary(FORWARD)(data, timeout=30)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
        self._score.end("garbage", code, {"INVALID_ARGUMENT", "NOT_FOUND"} | BUSY)


def _code(error: ExpertdError) -> str:
    codes = {"OVERLOADED": "RESOURCE_EXHAUSTED"}
    return codes.get(error.reason, error.reason)


def _request(rows: np.ndarray) -> bytes:
    data = memoryview(rows).cast("B")
    return encode_forward_call(ForwardCall("echo", 0, WireTensor("float32", rows.shape, data)))


def known_answers(server: Server, seed: int) -> Iterator[Sample]:
    """Calls of every size to the demo, answered by the reference."""
    rng = np.random.default_rng(seed)
    with Client(server.grpc) as client:
        for number in range(SAMPLES):
            tokens = (1, 3, 16, 90, 400)[number % 5]
            rows = rng.standard_normal((tokens, WIDTH), dtype=np.float32)
            logits = rng.standard_normal((tokens, EXPERTS), dtype=np.float32)
            routing: CallOptions = {"router_logits": logits}
            if number % 2:
                ids = np.argsort(-logits, axis=1)[:, :4].astype(np.int32)
                weights = rng.random(ids.shape, dtype=np.float32)
                routing = {"topk_ids": ids, "topk_weights": weights}
            answer = client.forward("demo", 1, rows, backend="reference", **routing)
            yield Sample(rows, routing, answer)


def fill_pools(server: Server) -> None:
    """As many callers at once as there are threads, and more: pools start threads when needed."""

    def ask() -> None:
        with Client(server.grpc) as client:
            for _ in range(20):
                with suppress(ExpertdError):
                    client.forward("echo", 0, np.zeros((LARGEST, WIDTH), np.float32))

    crowd = [threading.Thread(target=ask) for _ in range(40)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()


def watch(server: Server, score: Score, minutes: float) -> list[Usage]:
    """Prints what the server holds until the time is over; the usage seen, without the warm-up."""
    begin, seen = time.monotonic(), []
    print("minute     calls  wrong      MiB  threads  descriptors")
    while (spent := time.monotonic() - begin) < minutes * 60:
        time.sleep(min(5, max(0.1, minutes * 60 - spent)))
        usage = Usage.of(server.process.pid)
        if spent > minutes * 6:
            seen.append(usage)
        done, wrong = sum(score.ends.values()), len(score.wrong)
        if len(seen) % 6 == 1 or wrong:
            row = f"{spent / 60:6.1f} {done:9} {wrong:6} {usage.megabytes:8.0f}"
            print(f"{row} {usage.threads:8} {usage.descriptors:12}", flush=True)
    return seen


def drift(seen: list[Usage]) -> dict[str, float]:
    """How much the median of the last third is above that of the first, for each thing held."""
    third = max(1, len(seen) // 3)

    def median(part: list[Usage], name: str) -> float:
        return statistics.median(getattr(usage, name) for usage in part)

    return {n: median(seen[-third:], n) - median(seen[:third], n) for n in Usage._fields}


def left_behind(server: Server) -> dict[str, float]:
    """Gauges of an idle server that should be zero."""
    names = ("expertd_inflight_requests", "expertd_queued_tokens")
    shown = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    return {name: float(v) for name, _, v in (x.partition(" ") for x in shown) if name in names}


def soak(server: Server, args: Any) -> int:
    """Exit code 0 if nothing was lost or wrong and nothing stayed behind."""
    samples, score = list(known_answers(server, args.seed)), Score()
    fill_pools(server)
    end = time.monotonic() + args.minutes * 60
    callers = [Caller(server, samples, score, end, args.seed + n) for n in range(args.callers)]
    for caller in callers:
        caller.start()
    seen = watch(server, score, args.minutes)
    for caller in callers:
        caller.join(60)
    time.sleep(1)
    stuck, behind = [c.name for c in callers if c.is_alive()], left_behind(server)
    for (kind, code), count in sorted(score.ends.items()):
        print(f"{kind:8} {code:20} {count:8}")
    print(f"calls {score.begun}, lost {score.lost}, wrong {len(score.wrong)}, stuck {stuck}")
    print(f"left behind: {behind}; idle now: {Usage.of(server.process.pid)}")
    print(f"last third over first third: {drift(seen)}")
    print(*score.wrong[:20], sep="\n")
    return 1 if score.lost or score.wrong or stuck or any(behind.values()) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--callers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as home, serving(Path(home), *FLAGS) as server:
        return soak(server, args)


if __name__ == "__main__":
    sys.exit(main())
