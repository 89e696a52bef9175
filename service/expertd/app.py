"""The composition root: builds every room of a serving process, runs it, takes it down again."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from expertd import __version__
from expertd.backends.build import torch_device
from expertd.capability.device import DeviceInfo, detect
from expertd.capability.drift import drift
from expertd.capability.match import device_refusals
from expertd.capability.rows import ROWS
from expertd.capability.rows.triton import ARCHS as TRITON_ARCHS
from expertd.config import Settings, cache_directory
from expertd.core.buckets import token_buckets
from expertd.engine.engine import Engine, EngineOptions
from expertd.engine.graphs import graphs_for
from expertd.engine.layouts import Layouts, spare_bytes
from expertd.engine.ledger import Budget
from expertd.engine.loader import Loader
from expertd.engine.policy import Rules
from expertd.engine.resident import LayerState, Residents, Trust
from expertd.engine.timing_store import TimingStore
from expertd.engine.tuner import Tuner, Tuning
from expertd.errors import InvalidArgument
from expertd.metrics.registry import Metrics
from expertd.preflight import LOOPBACK, tls_files
from expertd.proof.prover import Prover
from expertd.proof.store import ProofStore
from expertd.simulate import simulate
from expertd.sources import check_source, model_sources
from expertd.steward import Steward
from expertd.transport.admin import AdminService
from expertd.transport.auth import Guard, read_tokens
from expertd.transport.calls import Desk
from expertd.transport.door import HttpDoor
from expertd.transport.grpc_server import GrpcLimits, GrpcServer
from expertd.transport.http import build_http
from expertd.transport.http_server import HttpLimits, HttpServer
from expertd.transport.ingress import Ingress
from expertd.transport.linger import Linger
from expertd.transport.messages import capabilities
from expertd.transport.native import ExpertsService
from expertd.transport.tls import TlsFiles
from expertd_wire.methods import ADMIN_SERVICE, SERVICE
from expertd_wire.v1 import experts_pb2 as pb

log = logging.getLogger(__name__)

HEALTH_PERIOD_SECONDS = 0.05
ABANDON_SECONDS = 1.0


class Addresses(NamedTuple):
    """Where a process can be reached."""

    http: str
    grpc: str


class App:
    """One serving process: start() → wait until it should stop → stop()."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self.settings = settings
        self._stop = stop
        self.device = _device(settings)
        home = torch_device(self.device)
        torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) - 1))
        self.residents = Residents()
        self.metrics = Metrics(self.residents, build_info(self.device))
        self.metrics.cells(self._count_cells)
        self.metrics.experts(each=settings.expert_rows)
        self.engine = Engine(self.residents, home, _options(settings), self.metrics, self._lose)
        self._prover = Prover(ProofStore(cache_directory(), self.device), self.device)
        trust = Trust(_trusts_declared(settings), settings.exact_routing, settings.deterministic)
        tuner = Tuner(TimingStore(cache_directory(), self.device), home, _tuning(settings))
        graphs = graphs_for(home, tuner.buckets, settings.cuda_graphs == "auto")
        layouts = Layouts(_layout_budget(settings, home, self.residents), home)
        self.loader = Loader(
            self.residents, self.device, home, self._prover, tuner, graphs, trust, layouts
        )
        check = partial(check_source, settings)
        self.steward = Steward(self.loader, self.residents, check, stop.set)
        self._ingress = Ingress(settings.max_message_bytes, settings.ingress_bytes)
        guard, tls = _guard(settings), tls_files(settings)
        self._grpc = self._build_grpc(guard, tls)
        self._http = self._build_http(guard, tls)

    def start(self) -> Addresses:
        """Binds, opens the checkpoints and begins to load; raises ExpertdError."""
        for found in drift(self.device.flashinfer):
            log.warning("FlashInfer drift: %s", found.text)
        for name, hidden in self.settings.identity:
            self.loader.add_identity(name, int(hidden))
        host = self.settings.host
        http_port = _bound(self._http.bind, host, self.settings.http_port)
        grpc_port = _bound(self._grpc.bind, host, self.settings.grpc_port)
        self.steward.start(model_sources(self.settings))
        self.engine.start()
        self._grpc.start()
        self._http.start()
        threading.Thread(target=self._watch, name="health", daemon=True).start()
        name = f"[{host}]" if ":" in host else host
        return Addresses(f"{name}:{http_port}", f"{name}:{grpc_port}")

    def wait_ready(self) -> bool:
        """Waits until every layer is ready; False if one failed or the process should stop."""
        while not self._stop.wait(HEALTH_PERIOD_SECONDS):
            if not self.engine.missing():
                return True
            if any(r.state is LayerState.FAILED for r in self.residents.all()):
                return False
        return False

    def stop(self) -> bool:
        """Not ready → answer what was accepted → down; True if all was answered in time."""
        self._stop.set()
        self.metrics.drain()
        self._grpc.set_serving(False)
        begin = time.monotonic()
        drained = self.engine.drain(self.settings.drain_seconds)
        left = self.settings.drain_seconds - (time.monotonic() - begin)
        self._close(max(0.5, left))
        return drained

    def abandon(self) -> None:
        """Down without a drain, when the device is lost; what was answered still leaves."""
        self._close(ABANDON_SECONDS)

    def _close(self, grace: float) -> None:
        self._grpc.stop(grace)
        self._http.stop()
        self.steward.stop()

    def _lose(self) -> None:
        """Out of health before anybody is told; then the process ends."""
        self._grpc.set_serving(False)
        self._stop.set()

    def _build_grpc(self, guard: Guard, tls: TlsFiles | None) -> GrpcServer:
        chosen = self.settings
        limits = GrpcLimits(
            max_message_bytes=chosen.max_message_bytes,
            max_concurrent_calls=chosen.max_concurrent_calls,
            max_header_bytes=chosen.max_header_bytes,
        )
        desk = Desk("grpc", self.engine, self.metrics)
        services = {
            SERVICE: ExpertsService(
                desk, self._ingress, chosen.max_stream_calls, self._capabilities
            ).handlers(),
            ADMIN_SERVICE: AdminService(self.steward).handlers(),
        }
        refused = partial(self.metrics.rejected, "queue_full")
        return GrpcServer(services, limits, guard, tls, refused)

    def _build_http(self, guard: Guard, tls: TlsFiles | None) -> HttpServer:
        chosen = self.settings
        desk = Desk("http", self.engine, self.metrics)
        limits = HttpLimits(chosen.max_header_bytes, chosen.header_seconds)
        hosts = frozenset((*LOOPBACK, chosen.host, *(chosen.allow_host or ())))
        self.http_application = build_http(desk, self._ingress, self._capabilities)
        door = HttpDoor(self.http_application, guard, hosts)
        return HttpServer(Linger(door), limits, tls)

    def _watch(self) -> None:
        """Keeps grpc.health.v1 equal to what /readyz says."""
        serving = False
        while not self._stop.wait(HEALTH_PERIOD_SECONDS):
            now = not self.engine.missing()
            if now is not serving:
                serving = now
                self._grpc.set_serving(serving)

    def _capabilities(self) -> pb.GetCapabilitiesReply:
        return capabilities(self.device, self._prover.known)

    def _count_cells(self) -> Iterable[tuple[str, int]]:
        return Counter(cell.state for cell in self._capabilities().cells).items()


def build_info(device: DeviceInfo) -> dict[str, str]:
    """The labels of expertd_build_info."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "flashinfer": device.flashinfer or "",
        "device": device.name,
    }


def _device(settings: Settings) -> DeviceInfo:
    """The device to serve on; raises InvalidArgument if it, or the pinned backend, cannot serve."""
    found = simulate(settings.simulate) if settings.simulate else detect(settings.device)
    if found.kind == "cuda" and found.arch not in TRITON_ARCHS:
        # Our router and checks are Triton's on every card; for sm107 its compiler ends the process.
        raise InvalidArgument(
            f"{found.name} is {found.arch}, which Triton cannot compile for; "
            f"cards of {', '.join(TRITON_ARCHS)} serve, and --device cpu"
        )
    pinned = [row for row in ROWS if row.backend == settings.backend]
    reasons = [device_refusals(row, found) for row in pinned]
    if pinned and all(reasons):
        raise InvalidArgument(f"--backend {settings.backend}: {reasons[0][0].text}")
    return found


def _trusts_declared(settings: Settings) -> bool:
    """A twin proves nothing about a card, so a simulation serves what is declared."""
    return settings.trust == "declared" or settings.simulate is not None


def _guard(settings: Settings) -> Guard:
    return Guard() if settings.tokens is None else read_tokens(Path(settings.tokens))


def _layout_budget(
    settings: Settings, device: torch.device, residents: Residents
) -> Callable[[], int]:
    given = settings.layout_cache_bytes
    return partial(spare_bytes, device, residents) if given is None else lambda: given


def _options(settings: Settings) -> EngineOptions:
    budget = Budget(settings.max_queued_tokens, settings.max_queued_bytes)
    rules = Rules(
        settings.max_batch_tokens, settings.batch_delay_us * 1000, not settings.batch_invariant
    )
    pin = "" if settings.backend == "auto" else settings.backend
    return EngineOptions(settings.max_call_tokens, pin, budget, rules)


def _tuning(settings: Settings) -> Tuning:
    """A twin's times say nothing of a card, and it is too slow for large batches at the start."""
    if settings.simulate:
        return Tuning(buckets=(1,), enabled=False)
    return Tuning(token_buckets(settings.max_batch_tokens), settings.tune == "auto")


def _bound(bind: Callable[[str, int], int], host: str, port: int) -> int:
    try:
        return bind(host, port)
    except (OSError, RuntimeError) as error:
        raise InvalidArgument(
            f"cannot listen on {host}:{port}: {error}; other ports: --http-port, --grpc-port"
        ) from None
