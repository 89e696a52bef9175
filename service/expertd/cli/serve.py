"""expertd serve: run the server until a signal asks it to drain."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from expertd.capability.device import detect
from expertd.cli.settings_file import as_toml
from expertd.config import Settings, add_flags, resolve, unknown_variables
from expertd.logs import set_up
from expertd.preflight import check_settings

if TYPE_CHECKING:
    from expertd.app import Addresses, App

log = logging.getLogger(__name__)

LOST_EXIT_CODE = 70
"""How a process ends whose device is lost, so that its supervisor starts another."""
ABANDON_SECONDS = 3.0
COMPUTING_THREADS = ("loader", "executor", "lander")
SWITCH_SECONDS = 0.002
"""How long one busy thread may keep the others waiting; Python's own 5 ms are many calls.

Less costs every call on a busy machine (docs/benchmarks, switch-interval).
"""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MALLOC = {
    # Larger pieces go back to the system when they are freed. What torch computes on a processor
    # leaves holes that grow with the pieces; beside a card there are messages only, of which a
    # pool's have 8 MiB: each finds the memory of the one before.
    M_MMAP_THRESHOLD: {"cpu": 2 << 20, "cuda": 16 << 20},
    # So much of what is freed stays at most, holes between pieces in use aside,
    M_TRIM_THRESHOLD: {"cpu": 64 << 20, "cuda": 64 << 20},
    # and it stays once, not once for each thread that ever held a message.
    M_ARENA_MAX: {"cpu": 1, "cuda": 1},
}
"""What glibc's mallopt() is told, by the kind of device (docs/benchmarks, memory-of-messages)."""

# Compute threads must not spin while they wait.
COMPUTING = {"OMP_WAIT_POLICY": "PASSIVE"}
CARRYING: dict[str, dict[str, str]] = {
    # The thread that handles gRPC's events waits for the sockets itself, instead of being woken by
    # another one that does: a quarter of a small call's CPU (docs/benchmarks, rpc-cpu).
    "cpu": {"GRPC_EXPERIMENTS": "-event_engine_listener"},
    # Beside a card that thread was too slow for all that comes in overload (served).
    "cuda": {},
}
"""Variables that libraries read when they are imported, gRPC's by the kind of device; whoever sets
them otherwise is obeyed."""

SNIPPET = """\
from expertd_client import Client
import numpy as np
with Client("{grpc}") as client:
    layer = client.layers()[0]
    rows = np.random.randn(4, layer.hidden).astype(np.float32)
    logits = np.random.randn(4, layer.num_experts).astype(np.float32)
    print(client.forward(layer.model, layer.layer, rows, router_logits=logits{partial}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and its origin, then exit"
    )


def run(args: argparse.Namespace) -> int:
    resolved = resolve(args, os.environ)
    if args.print_config:
        print("\n".join(as_toml(resolved)))
        return 0
    set_up(resolved.settings.log)
    for name in unknown_variables(os.environ):
        log.warning("variable %s names no setting; --print-config lists them all", name)
    return serve(resolved.settings)


def serve(settings: Settings) -> int:
    """Runs until SIGINT or SIGTERM; 0 after a complete drain, 1 if not all of it was answered.

    Ends the process with LOST_EXIT_CODE when the device is lost.
    """
    check_settings(settings)
    _advise(COMPUTING)
    _advise(CARRYING["cpu" if settings.simulate else detect(settings.device).kind])
    sys.setswitchinterval(SWITCH_SECONDS)
    _manage_memory("cpu")
    from expertd.app import App

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    app = App(settings, stop)
    addresses = app.start()
    ready = app.wait_ready()
    _manage_memory(app.device.kind)
    _settle()
    if ready:
        announce(settings, addresses)
    elif not stop.is_set():
        print("expertd: not every layer is ready; /readyz says why", file=sys.stderr)
    stop.wait()
    if app.engine.device_lost:
        _abandon(app)
    drained = app.stop()
    return _ended(0 if drained and app.engine.healthy else 1)


def _advise(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _abandon(app: App) -> NoReturn:
    """Ends the process at once: the libraries of a lost device may hang or crash at its exit."""
    last = threading.Timer(ABANDON_SECONDS, os._exit, (LOST_EXIT_CODE,))
    last.daemon = True
    last.start()
    app.abandon()
    logging.shutdown()
    os._exit(LOST_EXIT_CODE)


def _ended(code: int) -> int:
    """The code; but where somebody still computes the process ends with it here.

    A load, or a batch that outlasted the drain, is not waited for. Python would break its thread
    off in the middle of torch's C++, which aborts the process.
    """
    if any(thread.name in COMPUTING_THREADS for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(code)
    return code


def announce(settings: Settings, addresses: Addresses) -> None:
    """Prints where the server can be reached: for programs, or with what a person can paste."""
    if settings.announce == "json":
        print(json.dumps(addresses._asdict()), flush=True)
        return
    print(f"expertd is ready: HTTP http://{addresses.http} · gRPC {addresses.grpc}")
    print("Try it:\n")
    partial = ", partial=True" if settings.experts else ""  # logits may choose any expert
    print(SNIPPET.format(grpc=addresses.grpc, partial=partial), flush=True)


def _settle() -> None:
    """Leaves what the start has made out of garbage collection: to walk through all of it would
    hold every call for some 0.1 s (docs/benchmarks, switch-interval)."""
    gc.collect()
    gc.freeze()


def _manage_memory(kind: str) -> None:
    """Else each thread's heap keeps the most it ever held, and message after message is new."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do without
    if mallopt is not None:
        for parameter, by_kind in MALLOC.items():
            mallopt(parameter, by_kind[kind])
