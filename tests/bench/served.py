"""What a served layer gives over gRPC: beside identity and the kernels alone, overloaded, alone.

python -m tests.bench.served --device cuda:0 --dir /dev/shm [--out FILE]

One server holds a layer of Qwen3-30B's shape in bf16, one of DeepSeek-V3's in fp8 blocks, and the
identity layers of both widths. Callers are `expertd bench`'s: processes of their own, and this one
asks for /metrics ten times a second beside them. `--device cpu --small` tries it anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import httpx
from tests.bench import fleet, grpc_servers
from tests.bench.checkpoints import DEEPSEEK, QWEN, Sizes, write_deepseek, write_qwen
from tests.bench.fleet import tell
from tests.e2e.servers import Server, serving
from tests.e2e.test_metrics import Change, scrape

from expertd.bench.load import Cell, Layer, find_layer, make_call
from expertd.bench.summary import Summary, summarize
from expertd.bench.target import Target
from expertd.bench.workers import Share, Workers, split
from expertd_client import Client
from expertd_client.calls import encode_call
from expertd_wire.methods import FORWARD

Found = dict[str, Any]

CALLERS, TOKENS = 32, 64
OPEN_TOKENS = (64, 512)
SWEEP = (16, 32, 64)
"""Callers that may reach the most calls a second."""
OVERLOAD, OPEN_CALLERS = 5, 384
ROUNDS = 3
WARM_SECONDS = 2.0
ALONE = {1: 300, 4096: 9}
"""Calls of so many tokens, one after the other."""
LEAST_OF_IDENTITY, LEAST_OF_KERNELS = 0.8, 0.9


@dataclass(frozen=True)
class Bench:
    """A server under load, its callers, and what was found so far."""

    server: Server
    workers: Workers
    processes: int
    seconds: float
    found: Found

    def layer(self, model: str) -> Layer:
        return find_layer(Target(self.server.grpc), model, 0)

    def load(self, layer: Layer, cell: Cell, seconds: float = 0.0) -> Summary:
        share = Share(layer, cell, seconds or self.seconds, 0, "topk")
        with scraped(self.server.http):
            outcomes = self.workers.run(split(share, self.processes))
        return summarize(cell, make_call(layer, cell.tokens, 0).nbytes, outcomes)

    def tell(self, name: str, value: float) -> None:
        tell(self.found, name, value)

    def told(self, name: str, layer: Layer, asked: Cell) -> Summary:
        """Loads and tells; all of the cell's figures go into the file."""
        cell = self.load(layer, asked)
        parts = ", ".join(f"{part} {value:.3f}" for part, value in cell.split_ms.items())
        shown = f"p50 {cell.latency_ms['p50']:.2f} p99 {cell.latency_ms['p99']:.2f} ms ({parts})"
        print(f"       {shown}, {cell.mean_batch:.2f} calls a batch, refused {cell.refused}")
        self.found.setdefault("cells", []).append({"name": name, **cell.as_json()})
        self.tell(f"{name}: calls/s", cell.calls_per_s)
        return cell

    def cpu_seconds(self) -> float:
        return grpc_servers.cpu_seconds(self.server.process.pid)


@contextmanager
def scraped(address: str) -> Iterator[None]:
    """Asks for /metrics ten times a second, as long as this lasts."""
    over = threading.Event()

    def scrape_on() -> None:
        while not over.wait(0.1):
            httpx.get(f"http://{address}/metrics", trust_env=False).raise_for_status()

    thread = threading.Thread(target=scrape_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def beside_identity(bench: Bench) -> None:
    """Merged calls beside the identity layer's, in turn, and beside the kernels alone."""
    layers = {name: bench.layer(name) for name in ("echo", "qwen")}
    for layer in layers.values():
        bench.load(layer, Cell(TOKENS, CALLERS), WARM_SECONDS)
    cells: dict[str, list[Summary]] = {name: [] for name in layers}
    for name in ROUNDS * tuple(layers):
        cells[name].append(bench.told(name, layers[name], Cell(TOKENS, CALLERS)))
    identity, served = (median(c.calls_per_s for c in cells[name]) for name in layers)
    batch = median(cell.mean_batch for cell in cells["qwen"])
    mean = bench.told("qwen's mean batch by itself", layers["qwen"], Cell(round(batch * TOKENS), 1))
    kernels = batch / mean.split_ms["kernel"] * 1e3
    goal = min(LEAST_OF_IDENTITY * identity, LEAST_OF_KERNELS * kernels)
    bench.tell(f"qwen / identity (goal {LEAST_OF_IDENTITY})", served / identity)
    bench.tell(f"qwen / back-to-back kernels (goal {LEAST_OF_KERNELS})", served / kernels)
    bench.tell("qwen / the lower goal", served / goal)


def overloaded(bench: Bench) -> None:
    """Calls that arrive at random: as many as the layer can take, and five times as many."""
    for tokens in OPEN_TOKENS:
        overloaded_with(bench, tokens)


def overloaded_with(bench: Bench, tokens: int) -> None:
    layer, name = bench.layer("deepseek"), f"{tokens} tokens"
    bench.load(layer, Cell(tokens, bench.processes), WARM_SECONDS)
    sweep = {n: bench.told(f"{name}, {n} callers", layer, Cell(tokens, n)) for n in SWEEP}
    callers = max(SWEEP, key=lambda count: sweep[count].calls_per_s)
    cells: dict[int, list[Summary]] = {0: [], 1: [], OVERLOAD: []}
    cpu: dict[int, list[float]] = {times: [] for times in cells}
    for _ in range(ROUNDS):
        for times, found in cells.items():
            before = bench.cpu_seconds()
            rate = times * cells[0][-1].calls_per_s if times else 0.0
            asked = Cell(tokens, OPEN_CALLERS if times else callers, rate)
            found.append(bench.told(f"{name}, {times or 'closed'} x capacity", layer, asked))
            cpu[times].append(bench.cpu_seconds() - before)
    closed, over = cells[0], cells[OVERLOAD]
    peak = max(median_of(closed, rate_of), *map(rate_of, sweep.values()))
    bench.tell(f"{name}: goodput / peak (goal 0.95)", median_of(over, rate_of) / peak)
    for times, load in {1: "1 x capacity (goal 3)", 0: "the closed loop"}.items():
        ratio = median_of(over, p99_of) / median_of(cells[times], p99_of)
        bench.tell(f"{name}: p99 of accepted / p99 at {load}", ratio)
    refused = [sum(cell.refused.values()) for cell in over]
    answer = median(spent / cell.calls for spent, cell in zip(cpu[0], closed, strict=True))
    refusal = median(
        (spent - cell.calls * answer) / max(1, count)
        for spent, cell, count in zip(cpu[OVERLOAD], over, refused, strict=True)
    )
    asked_for = median(
        (c.calls + n) * rate_of(c) / c.calls / c.rate for c, n in zip(over, refused, strict=True)
    )
    bench.tell(f"{name}: arrived / asked for", asked_for)
    bench.tell(f"{name}: a refusal's p50, ms", median(cell.refused_p50_ms for cell in over))
    bench.tell(f"{name}: server's CPU for an answer, us", answer * 1e6)
    bench.tell(f"{name}: server's CPU for a refusal, us", refusal * 1e6)


def rate_of(cell: Summary) -> float:
    return cell.calls_per_s


def p99_of(cell: Summary) -> float:
    return cell.latency_ms["p99"]


def median_of(cells: Sequence[Summary], figure: Callable[[Summary], float]) -> float:
    return median(map(figure, cells))


def alone(bench: Bench) -> None:
    """One caller, in turn: a bare echo of a call's bytes, the same bytes served, our client."""
    process, port = grpc_servers.start("sync")
    layer = bench.layer("deepseek")
    try:
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}", grpc_servers.LIMITS) as bare,
            grpc.insecure_channel(bench.server.grpc, grpc_servers.LIMITS) as served,
            Client(bench.server.grpc) as client,
        ):
            for tokens, calls in ALONE.items():
                call = make_call(layer, tokens, 0)
                payload = encode_call("deepseek", 0, call.rows, **call.options)
                ways = {
                    "bare": partial(bare.unary_unary(grpc_servers.METHOD), payload),
                    "served": partial(served.unary_unary(FORWARD), payload),
                    "client": partial(client.call, "deepseek", 0, call.rows, **call.options),
                }
                tell_alone(bench, f"{tokens} tokens", calls, ways)
    finally:
        process.terminate()


def tell_alone(bench: Bench, name: str, calls: int, ways: Mapping[str, Callable[[], Any]]) -> None:
    """Medians of calls; the stages' means are those of /metrics."""
    rounds_of(ways, 3)
    before = scrape(bench.server.http)
    rounds = rounds_of(ways, calls)
    change = Change(before, scrape(bench.server.http))
    stages = {}
    metric = "expertd_stage_duration_seconds"
    for stage in ("decode", "stage_in", "route", "kernel", "stage_out", "encode"):
        count = change(f"{metric}_count", stage=stage) or 1
        stages[stage] = change(f"{metric}_sum", stage=stage) / count * 1e6
        bench.tell(f"{name}: mean of {stage}, us", stages[stage])
    bare, served, client = (median(column) for column in zip(*rounds, strict=True))
    rest = served - bare - stages["kernel"]
    bench.tell(f"{name}: bare echo, us", bare)
    bench.tell(f"{name}: served, us", served)
    bench.tell(f"{name}: neither echo nor kernel, us (goal 150 at 1)", rest)
    bench.tell(f"{name}: of the call (goal 0.1 at 4096)", rest / served)
    bench.tell(f"{name}: with our client besides, us", client - served)


def rounds_of(ways: Mapping[str, Callable[[], Any]], count: int) -> list[list[float]]:
    """Microseconds of each way, in turn."""
    return [[timed(way) for way in ways.values()] for _ in range(count)]


def timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e6


def tell_plans(server: Server, found: Found, models: Sequence[str]) -> None:
    """The plans with their times, and what the server complained of."""
    for model in models:
        url = f"http://{server.http}/v1/layers/{model}/0"
        found[model] = httpx.get(url, trust_env=False).json()["plans"]
        print(*found[model], sep="\n")
    lines = server.log.read_text().splitlines()
    print(*(line for line in lines if "WARNING" in line or "ERROR" in line), sep="\n")


LAYERS = {"qwen": (QWEN, write_qwen), "deepseek": (DEEPSEEK, write_deepseek)}
SMALL = Sizes(16, 256, 128)
PARTS = {
    "identity": ("qwen", beside_identity),
    "overload": ("deepseek", overloaded),
    "alone": ("deepseek", alone),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="layers of 16 experts of 256 x 128")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--dir", type=Path, help="where the layers are written")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    return parser.parse_args()


def measure(home: Path, args: argparse.Namespace, found: Found) -> None:
    """Adds every figure to found as soon as it is known."""
    models = sorted({PARTS[part][0] for part in args.parts})
    for model in models:
        sizes, write = LAYERS[model]
        write(home / model, SMALL if args.small else sizes)
    tell(found, "written after, s", time.monotonic() - fleet.STARTED)
    served = [f"--model={model}={home / model}" for model in models]
    hidden = (SMALL if args.small else QWEN).hidden
    with (
        Workers(args.processes) as workers,
        serving(home, "--device", args.device, f"--identity=echo={hidden}", *served) as server,
    ):
        tell(found, "ready after, s", time.monotonic() - fleet.STARTED)
        tell_plans(server, found, models)
        bench = Bench(server, workers, args.processes, args.seconds, found)
        for part in args.parts:
            PARTS[part][1](bench)


def main() -> None:
    args = arguments()
    found: Found = {"device": args.device, "processes": args.processes}
    with tempfile.TemporaryDirectory(dir=args.dir) as home:
        try:
            measure(Path(home), args, found)
        finally:
            if args.out:
                args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
