"""The identity layer beside other servers that copy rows of 7168 two-byte numbers, in one run.

All are driven by one and the same raw-bytes gRPC client, in turn. expertd is to be first among the
servers in every cell, and within 20 % of the bare echo.

Run: python -m tests.bench.peers --triton RUN_TRITON --kserve PYTHON [--seconds 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import product

from tests.bench.grpc_servers import drive
from tests.bench.peers import servers
from tests.bench.peers.servers import Peer

ROWS = (1, 16, 64)
CALLERS = (1, 8)

Figures = tuple[float, float, float]
"""Calls a second, and milliseconds of the median and the 99th percentile."""


def measure(peer: Peer, rows: int, callers: int, seconds: float) -> Figures:
    latencies = sorted(drive(peer.port, peer.payload(rows), callers, seconds, peer.method))
    count = len(latencies)
    return count / seconds, latencies[count // 2] * 1e3, latencies[int(count * 0.99)] * 1e3


def medians(found: Iterable[Figures]) -> Figures:
    rate, p50, p99 = (statistics.median(column) for column in zip(*found, strict=True))
    return rate, p50, p99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triton", help="a program that runs tritonserver on three ports")
    parser.add_argument("--kserve", metavar="PYTHON", help="an interpreter that has kserve")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with ExitStack() as stack:
        peers = {
            "bare echo": stack.enter_context(servers.bare()),
            "expertd": stack.enter_context(servers.expertd()),
        }
        if args.triton:
            peers["tritonserver"] = stack.enter_context(servers.triton(args.triton))
        if args.kserve:
            peers["KServe"] = stack.enter_context(servers.kserve(args.kserve))
        compare(peers, args.rounds, args.seconds)


def compare(peers: dict[str, Peer], rounds: int, seconds: float) -> None:
    print("| rows | callers | server | calls/s (min - max) | p50 ms | p99 ms | of the bare echo |")
    print("|---|---|---|---|---|---|---|")
    for rows, callers in product(ROWS, CALLERS):
        found: dict[str, list[Figures]] = {name: [] for name in peers}
        for name in rounds * tuple(peers):
            found[name].append(measure(peers[name], rows, callers, seconds))
        bare = medians(found["bare echo"])[0]
        for name, figures in found.items():
            rate, p50, p99 = medians(figures)
            rates = [one[0] for one in figures]
            shown = f"{rate:.0f} ({min(rates):.0f} - {max(rates):.0f})"
            share = f"{rate / bare:.2f}"
            print(f"| {rows} | {callers} | {name} | {shown} | {p50:.2f} | {p99:.2f} | {share} |")


if __name__ == "__main__":
    main()
