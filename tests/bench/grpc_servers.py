"""Which grpc server carries large unary calls best: a raw-bytes echo, sync beside aio, interleaved.

Run: python -m tests.bench.grpc_servers [--seconds 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import psutil

LIMITS = [("grpc.max_receive_message_length", 1 << 28), ("grpc.max_send_message_length", 1 << 28)]
METHOD = "/echo.Echo/Call"


class Echo(grpc.GenericRpcHandler):
    """Answers every unary call with its own bytes."""

    def __init__(self, method: object) -> None:
        self._handler = grpc.unary_unary_rpc_method_handler(method)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self._handler


def serve_sync() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(16), options=LIMITS)
    server.add_generic_rpc_handlers((Echo(lambda request, context: request),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


async def serve_aio() -> None:
    async def echo(request: bytes, context: object) -> bytes:
        return request

    server = grpc.aio.server(options=LIMITS)
    server.add_generic_rpc_handlers((Echo(echo),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def start(kind: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "tests.bench.grpc_servers", "--serve", kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def drive(
    port: int, payload: bytes, callers: int, seconds: float, method: str = METHOD
) -> list[float]:
    """Latencies of callers calling in a closed loop for a while."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    def caller() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=LIMITS) as channel:
            call = channel.unary_unary(method)
            call(payload)
            while time.monotonic() < end:
                begin = time.perf_counter()
                call(payload)
                latencies.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def measure(pid: int, port: int, size: int, callers: int, seconds: float) -> tuple[float, ...]:
    before = cpu_seconds(pid)
    latencies = sorted(drive(port, bytes(size), callers, seconds))
    spent = cpu_seconds(pid) - before
    count = len(latencies)
    p50, p99 = latencies[count // 2] * 1e3, latencies[int(count * 0.99)] * 1e3
    return count / seconds, p50, p99, spent / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=("sync", "aio"))
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.serve:
        return serve_sync() if args.serve == "sync" else asyncio.run(serve_aio())
    servers = {kind: start(kind) for kind in ("sync", "aio")}
    print("kind  bytes    callers  req/s  p50 ms  p99 ms  server CPU us/call  (medians)")
    for size in (14336, 917504):
        for callers in (1, 8):
            rows: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in servers}
            for _ in range(args.rounds):
                for kind, (process, port) in servers.items():
                    rows[kind].append(measure(process.pid, port, size, callers, args.seconds))
            for kind, found in rows.items():
                rate, p50, p99, cpu = (
                    statistics.median(column) for column in zip(*found, strict=True)
                )
                print(
                    f"{kind:5} {size:8} {callers:7} {rate:7.0f} {p50:7.2f} {p99:7.2f} {cpu:12.0f}"
                )
    for process, _ in servers.values():
        process.terminate()


if __name__ == "__main__":
    main()
