"""CPU time of the server process per one-token call, beyond that of a bare raw-bytes gRPC echo.

Both servers run beside each other and are driven in turn with the same bytes, so that whatever else
the machine does falls on both. Target: a median of at most 200 us more than the echo.

Run: python -m tests.bench.rpc_cpu [--seconds 2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from tests.bench.grpc_servers import METHOD, cpu_seconds, drive, start

from expertd_wire.codec import encode_forward_call
from expertd_wire.messages import ForwardCall
from expertd_wire.methods import FORWARD
from expertd_wire.tensors import WireTensor

HIDDEN = 7168
SERVE = "import sys; from expertd.cli import main; sys.exit(main())"
FLAGS = ("--identity", f"echo={HIDDEN}", "--device", "cpu", "--announce", "json")


def request() -> bytes:
    """One bfloat16 token for the identity layer."""
    rows = np.random.default_rng(0).bytes(HIDDEN * 2)
    rows = bytes(byte & 0x3F for byte in rows)  # no exponent that makes NaN or infinity
    return encode_forward_call(
        ForwardCall("echo", 0, WireTensor("bfloat16", (1, HIDDEN), memoryview(rows)))
    )


@contextmanager
def expertd() -> Iterator[tuple[int, int]]:
    """A server of an identity layer: its process and its gRPC port."""
    command = [sys.executable, "-c", SERVE, "serve", "--http-port", "0", "--grpc-port", "0", *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["grpc"]
            yield process.pid, int(address.rpartition(":")[2])
        finally:
            process.terminate()


def per_call(pid: int, port: int, method: str, payload: bytes, seconds: float) -> float:
    """Microseconds of the process's CPU per call of one caller."""
    before = cpu_seconds(pid)
    count = len(drive(port, payload, 1, seconds, method))
    return (cpu_seconds(pid) - before) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    payload = request()
    echo, echo_port = start("sync")
    differences: list[float] = []
    print("round  echo us/call  expertd us/call  difference")
    with expertd() as (pid, port):
        for number in range(args.rounds):
            bare = per_call(echo.pid, echo_port, METHOD, payload, args.seconds)
            ours = per_call(pid, port, FORWARD, payload, args.seconds)
            differences.append(ours - bare)
            print(f"{number:5} {bare:13.0f} {ours:16.0f} {ours - bare:11.0f}")
    echo.terminate()
    print(f"median of {args.rounds}: {statistics.median(differences):.0f} us per call")


if __name__ == "__main__":
    main()
