"""The composition root: builds every room of a serving process, runs it, takes it down again."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import uvicorn

from expertd import __version__
from expertd.capability.device import DeviceInfo, detect
from expertd.capability.rows import BACKENDS
from expertd.config import Settings
from expertd.engine.batcher import Budget
from expertd.engine.engine import Engine, EngineOptions
from expertd.engine.loader import Loader, ModelSource
from expertd.engine.resident import LayerState, Resident, Residents
from expertd.errors import InvalidArgument
from expertd.metrics import Metrics
from expertd.transport.calls import Desk
from expertd.transport.http import build_http
from expertd.transport.messages import capabilities
from expertd.transport.native import ExpertsService, GrpcLimits, GrpcServer
from expertd.weights.demo import write_demo
from expertd_wire.v1 import experts_pb2 as pb

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTH_PERIOD_SECONDS = 0.05


class Addresses(NamedTuple):
    """Where a process can be reached."""

    http: str
    grpc: str


class App:
    """One serving process: start() → wait until stop is set → stop()."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._device = detect(settings.device)
        torch_device = _torch_device(self._device)
        torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) - 1))
        self.residents = Residents()
        self.metrics = Metrics(self.residents, build_info(self._device))
        self.engine = Engine(self.residents, torch_device, _options(settings), self.metrics)
        self.loader = Loader(self.residents, self._device, torch_device)
        self.metrics.cells(self._count_cells)
        limits = GrpcLimits(settings.max_message_bytes, settings.max_concurrent_calls)
        desk = Desk("grpc", self.engine, self.metrics)
        service = ExpertsService(desk, settings.max_message_bytes, self._capabilities)
        self._grpc = GrpcServer(service, limits)
        desk = Desk("http", self.engine, self.metrics)
        self._http = HttpServer(build_http(desk, settings.max_message_bytes, self._capabilities))
        self._stopping = threading.Event()

    def start(self) -> Addresses:
        """Binds, opens the checkpoints and begins to load; raises ExpertdError or OSError."""
        sources = [(source, self.loader.announce(source)) for source in _sources(self.settings)]
        for name, hidden in self.settings.identity:
            self.loader.add_identity(name, int(hidden))
        host = self.settings.host
        http_port = self._http.bind(host, self.settings.http_port)
        grpc_port = _bound(self._grpc.bind, host, self.settings.grpc_port)
        self.engine.start()
        self._grpc.start()
        self._http.start()
        threading.Thread(target=self._load, args=(sources,), name="loader", daemon=True).start()
        threading.Thread(target=self._watch, name="health", daemon=True).start()
        return Addresses(f"{host}:{http_port}", f"{host}:{grpc_port}")

    def wait_ready(self, stop: threading.Event) -> bool:
        """Waits until every layer is ready; False if one failed or stop was set."""
        while not stop.is_set():
            if not self.engine.missing():
                return True
            if any(r.state is LayerState.FAILED for r in self.residents.all()):
                return False
            time.sleep(HEALTH_PERIOD_SECONDS)
        return False

    def stop(self) -> bool:
        """Not ready → answer what was accepted → down; True if all was answered in time."""
        self._stopping.set()
        self.metrics.drain()
        self._grpc.set_serving(False)
        begin = time.monotonic()
        drained = self.engine.drain(self.settings.drain_seconds)
        left = self.settings.drain_seconds - (time.monotonic() - begin)
        self._grpc.stop(max(0.5, left))
        self._http.stop()
        return drained

    def _load(self, sources: list[tuple[ModelSource, list[Resident]]]) -> None:
        for source, residents in sources:
            self.loader.load(source, residents)

    def _watch(self) -> None:
        """Keeps grpc.health.v1 equal to what /readyz says."""
        serving = False
        while not self._stopping.wait(HEALTH_PERIOD_SECONDS):
            now = not self.engine.missing()
            if now is not serving:
                serving = now
                self._grpc.set_serving(serving)

    def _capabilities(self) -> pb.GetCapabilitiesReply:
        return capabilities(self._device)

    def _count_cells(self) -> Iterable[tuple[str, int]]:
        return Counter(cell.state for cell in self._capabilities().cells).items()


class HttpServer:
    """uvicorn on a thread and a loop of its own."""

    def __init__(self, application: object) -> None:
        config = uvicorn.Config(
            application,  # type: ignore[arg-type]
            http="httptools",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def bind(self, host: str, port: int) -> int:
        """The port that was bound (port 0 chooses); raises InvalidArgument if it is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bound(lambda *address: self._socket.bind(address), host, port)  # type: ignore[union-attr]
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def _run(self) -> None:
        assert self._socket is not None, "bind() comes before start()"
        self._server.run(sockets=[self._socket])


def build_info(device: DeviceInfo) -> dict[str, str]:
    """The labels of expertd_build_info."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "flashinfer": device.flashinfer or "",
        "device": device.name,
    }


def check_settings(settings: Settings) -> None:
    """Raises InvalidArgument for settings that cannot be served together."""
    if settings.host not in LOOPBACK:
        raise InvalidArgument(
            f"--host {settings.host}: only {', '.join(LOOPBACK)} are accepted, because callers "
            "cannot be told apart yet"
        )
    if settings.backend not in ("auto", *BACKENDS):
        raise InvalidArgument(
            f"--backend {settings.backend}: accepted: auto, {', '.join(BACKENDS)}"
        )
    if not (settings.model or settings.demo or settings.identity):
        raise InvalidArgument("nothing to serve; give --model NAME=PATH, --demo or --identity")
    names = [named.name for named in (*settings.model, *settings.identity)]
    names += ["demo"] if settings.demo else []
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidArgument(f"model names are given twice: {', '.join(twice)}")


def _sources(settings: Settings) -> list[ModelSource]:
    paths = [(named.name, Path(named.value)) for named in settings.model]
    if settings.demo:
        paths.append(("demo", demo_path()))
    layers = settings.layers
    numbers = None if layers is None else frozenset(n for a, b in layers for n in range(a, b + 1))
    experts = None if settings.experts is None else (settings.experts[0], settings.experts[1] + 1)
    return [ModelSource(name, path, numbers, experts) for name, path in paths]


def demo_path() -> Path:
    """The demo checkpoint in the user's cache directory, made if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "expertd" / f"demo-{__version__}"
    if not path.exists():
        write_demo(path)
    return path


def _options(settings: Settings) -> EngineOptions:
    budget = Budget(
        settings.max_batch_tokens, settings.max_queued_tokens, settings.max_queued_bytes
    )
    pin = "" if settings.backend == "auto" else settings.backend
    return EngineOptions(settings.max_call_tokens, pin, budget)


def _torch_device(device: DeviceInfo) -> torch.device:
    return torch.device("cpu") if device.kind == "cpu" else torch.device("cuda", device.index or 0)


def _bound(bind: Callable[[str, int], int | None], host: str, port: int) -> int:
    try:
        return bind(host, port) or 0
    except (OSError, RuntimeError) as error:
        raise InvalidArgument(f"cannot listen on {host}:{port}: {error}") from None
