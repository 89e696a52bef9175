"""Rows a second of a pool over N replicas beside one, one call split over them, and one's death.

python -m tests.bench.fleet --devices cuda:0,cuda:1 [--out FILE]

One layer of DeepSeek-V3's shape in fp8 blocks on each device, every replica with all experts, over
gRPC on this machine; then the same replicas with a share of the experts each. Callers are processes
of their own, each with its own pool; the load of one replica comes from as many callers as each of
N has. `--devices cpu,cpu --experts 16 --hidden 256 --width 128 --rows 64` tries it anywhere;
`--identity` leaves the experts out, so that the carrier alone is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tests.bench.checkpoints import DEEPSEEK, Sizes, write_deepseek
from tests.e2e.fleet import Replica, replicas

from expertd_client import ExpertdError, ExpertPool
from expertd_client.fleet.placement import Shard

STARTED = time.monotonic()
LEAST_PER_REPLICA = 0.85
LONE_CALLS = 7
MOST_SECONDS = 300.0
"""Of a load that ends when a replica is back."""
CALL_SECONDS = 30.0
"""A call that takes longer fails, and the measurement with it."""
WARM_SECONDS = 5.0
"""For callers to connect and to make their rows."""
OVER: Any = None
"""In a caller's process, the event that ends its load."""
SEEN_SECONDS = 2.0
"""The time within which a pool has to see a death or a return."""


class Ended(NamedTuple):
    """When a call began and ended, in seconds of this machine's clock."""

    begin: float
    end: float


class Load(NamedTuple):
    """Rows a second, how many cores of the machine and of its servers they kept busy, and how many
    calls the replica that answered fewest did for each of the one that answered most."""

    rows: float
    cores: float
    server_cores: float
    evenness: float


@dataclass(frozen=True)
class Task:
    """What one caller does: calls of so many rows, one after the other, until its time is up."""

    targets: tuple[str, ...]
    rows: int
    until: float
    shard: Shard


def question(pool: ExpertPool, rows: int) -> tuple[Any, dict[str, Any]]:
    """Random rows of the layer's width and random experts for them."""
    info = pool.layer("m", 0)
    return random_rows(rows, info.hidden, info.num_experts)


@cache
def random_rows(rows: int, hidden: int, experts: int) -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng(0)
    states = random.standard_normal((rows, hidden), np.float32).astype(ml_dtypes.bfloat16)
    if not experts:
        return states, {}
    ids = random.random((rows, experts), np.float32).argpartition(8)[:, :8]
    weights = np.full(ids.shape, 1 / 8, np.float32)
    return states, {"topk_ids": ids.astype(np.int32), "topk_weights": weights}


def begin_caller(all_up: Any, over: Any) -> None:
    """The first thing that a caller's process does; whoever sets over ends its load early."""
    global OVER
    OVER = over
    all_up.wait()


def caller(load: Task) -> list[Ended]:
    """Every call's times; runs in a process of its own."""
    done = []
    with ExpertPool(load.targets, shard=load.shard) as pool:
        states, routing = question(pool, load.rows)
        while (begin := time.monotonic()) < load.until and not OVER.is_set():
            pool.forward("m", 0, states, timeout=CALL_SECONDS, **routing)
            done.append(Ended(begin, time.monotonic()))
    return done


def rate(calls: Sequence[Ended], rows: int, begin: float, end: float) -> float:
    """Rows a second between two moments; a call counts with the part of it that lies between."""
    parts = ((min(c.end, end) - max(c.begin, begin)) / (c.end - c.begin) for c in calls)
    return sum(max(0.0, part) for part in parts) * rows / (end - begin)


def busy_seconds() -> float:
    """Processor time of everything on this machine so far."""
    user, nice, system, *_ = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def server_seconds(fleet: Sequence[Replica]) -> float:
    """Processor time of the replicas so far."""
    fields = [Path(f"/proc/{r.pid}/stat").read_text().rpartition(")")[2].split() for r in fleet]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


class Callers:
    """Processes that stay, all of them up: starting them is not measured."""

    def __init__(self, rows: int, count: int, shard: Shard) -> None:
        self._rows, self._shard = rows, shard
        spawned = multiprocessing.get_context("spawn")
        self.over = spawned.Event()
        all_up = spawned.Barrier(count + 1)
        self._processes = ProcessPoolExecutor(count, spawned, begin_caller, (all_up, self.over))
        for _ in range(count):
            self._processes.submit(int)
        all_up.wait()

    def begin(self, targets: Sequence[str], callers: int, seconds: float) -> Any:
        """Callers at work; wait() on it gives their calls."""
        until = time.monotonic() + seconds
        load = Task(tuple(targets), self._rows, until, self._shard)
        futures = [self._processes.submit(caller, load) for _ in range(callers)]
        return lambda: [call for future in futures for call in future.result()]

    def rate(self, fleet: Sequence[Replica], callers: int, seconds: float) -> Load:
        """What so many callers get out of some replicas, once all of them are at work."""
        begin = time.monotonic() + WARM_SECONDS
        had = [replica.answered("m") for replica in fleet]
        wait = self.begin([r.grpc for r in fleet], callers, WARM_SECONDS + seconds)
        time.sleep(WARM_SECONDS)
        before = busy_seconds(), server_seconds(fleet)
        time.sleep(seconds)
        after = busy_seconds(), server_seconds(fleet)
        done = rate(wait(), self._rows, begin, begin + seconds)
        busy = [(a - b) / seconds for a, b in zip(after, before, strict=True)]
        calls = [replica.answered("m") - old for replica, old in zip(fleet, had, strict=True)]
        return Load(done, busy[0], busy[1], min(calls) / max(1, *calls))

    def close(self) -> None:
        self._processes.shutdown()


def lone_call(fleet: Sequence[Replica], rows: int, shard: Shard) -> tuple[float, float]:
    """The median time of one call at a time, and rows sent for each row of it."""
    with ExpertPool([r.grpc for r in fleet], shard=shard) as pool:
        states, routing = question(pool, rows)
        times = []
        for _ in range(LONE_CALLS + 3):
            begin = time.perf_counter()
            reply = pool.call("m", 0, states, timeout=CALL_SECONDS, **routing)
            times.append(time.perf_counter() - begin)
    return float(np.median(times[3:])), reply.rows_sent / rows


def death(
    fleet: Sequence[Replica], callers: Callers, count: int, args: argparse.Namespace
) -> dict[str, float]:
    """Rows a second before a replica is killed, without it, and after its return."""
    targets = [replica.grpc for replica in fleet]
    seconds = args.seconds
    wait = callers.begin(targets, count, MOST_SECONDS)
    time.sleep(WARM_SECONDS + seconds)
    dies = time.monotonic()
    fleet[-1].end()
    fleet[-1].start()
    returned = time.monotonic()
    time.sleep(SEEN_SECONDS + seconds)
    callers.over.set()
    calls = wait()
    gone = dies + SEEN_SECONDS, returned
    back = returned + SEEN_SECONDS, returned + SEEN_SECONDS + seconds
    return {
        "before": rate(calls, args.rows, dies - seconds, dies),
        "without it": rate(calls, args.rows, *gone),
        "after its return": rate(calls, args.rows, *back),
        "seconds it was away": returned - dies,
        "longest call, s": max(call.end - call.begin for call in calls),
    }


def measure(fleet: Sequence[Replica], args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Adds every figure to found as soon as it is known."""
    many = len(fleet)
    counts = [count for count in (1, 2, 4) if count < many] + [many]
    with closing(Callers(args.rows, many * args.callers, "tokens")) as callers:
        for count in counts:
            load = callers.rate(fleet[:count], count * args.callers, args.seconds)
            tell_load(found, f"{count} replicas", load)
            share = load.rows / found["1 replicas, rows/s"] / count
            tell(found, f"{count} replicas / {count} x one (goal {LEAST_PER_REPLICA})", share)
        for count in counts:
            seconds, _ = lone_call(fleet[:count], args.rows, "tokens")
            tell(found, f"one call over {count}, s", seconds)
            tell(found, f"gained by {count}", found["one call over 1, s"] / seconds)
        survivors = callers.rate(fleet[:-1], many * args.callers, args.seconds)
        tell_load(found, "all but one", survivors)
        for name, value in death(fleet, callers, many * args.callers, args).items():
            tell(found, f"death: {name}", value)
        tell(found, "death: without it / all but one", found["death: without it"] / survivors.rows)


def measure_ranges(
    fleet: Sequence[Replica], args: argparse.Namespace, found: dict[str, Any]
) -> None:
    """The same for replicas that hold a range each, without a death."""
    held = [replica.weights_bytes("m") for replica in fleet]
    for replica, bytes_held in zip(fleet, held, strict=True):
        tell(found, f"experts {replica.experts}: share of bytes", bytes_held / sum(held))
    seconds, sent = lone_call(fleet, args.rows, "experts")
    tell(found, "by experts: one call, s", seconds)
    tell(found, "by experts: rows sent / rows", sent)
    with closing(Callers(args.rows, args.callers * len(fleet), "experts")) as callers:
        load = callers.rate(fleet, args.callers * len(fleet), args.seconds)
        tell_load(found, "by experts", load)


def tell_load(found: dict[str, Any], name: str, load: Load) -> None:
    tell(found, f"{name}, rows/s", load.rows)
    tell(found, f"{name}, cores busy", load.cores)
    tell(found, f"{name}, of them in servers", load.server_cores)
    tell(found, f"{name}, fewest calls of a replica / most", load.evenness)


def tell(found: dict[str, Any], name: str, value: float) -> None:
    found[name] = round(value, 3)
    print(f"{time.monotonic() - STARTED:6.1f} {name:55} {value:12.3f}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", required=True, help="one replica on each: cuda:0,cuda:1")
    parser.add_argument("--experts", type=int, default=DEEPSEEK.experts)
    parser.add_argument("--hidden", type=int, default=DEEPSEEK.hidden)
    parser.add_argument("--width", type=int, default=DEEPSEEK.width)
    parser.add_argument("--identity", action="store_true", help="layers that give rows back")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--callers", type=int, default=3, help="processes for each replica")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--dir", type=Path, help="where the layer is written")
    parser.add_argument(
        "--serve", default="", metavar="FLAGS", help="further flags of each replica"
    )
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    return parser.parse_args()


def ranges(experts: int, count: int) -> list[str]:
    """As many equal ranges of experts."""
    edges = [experts * number // count for number in range(count + 1)]
    return [f"{begin}-{end - 1}" for begin, end in pairwise(edges)]


def model_flags(home: Path, args: argparse.Namespace) -> tuple[str, str]:
    """What each replica serves as layer m/0."""
    if args.identity:
        return "--identity", f"m={args.hidden}"
    write_deepseek(home / "model", Sizes(args.experts, args.hidden, args.width))
    return "--model", f"m={home / 'model'}"


def main() -> None:
    args = arguments()
    devices = args.devices.split(",")
    steps = {measure: ranges(args.experts, 1) * len(devices)}
    if not args.identity:
        steps[measure_ranges] = ranges(args.experts, len(devices))
    with tempfile.TemporaryDirectory(dir=args.dir) as home:
        flags = (*model_flags(Path(home), args), *args.serve.split())
        found: dict[str, Any] = {"replicas": len(devices), "rows of a call": args.rows}
        tell(found, "written after, s", time.monotonic() - STARTED)
        for step, held in steps.items():
            with replicas(Path(home), *flags, ranges=held, devices=devices) as fleet:
                tell(found, f"{step.__name__}: ready after, s", time.monotonic() - STARTED)
                try:
                    step(fleet, args, found)
                except ExpertdError as error:
                    told = [replica.log.read_text()[-2000:] for replica in fleet]
                    print(f"{error}", *told, sep="\n", flush=True)
                    raise
                finally:
                    if args.out:
                        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
