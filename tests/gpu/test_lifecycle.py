"""Layers that go and come back on a card, while another serves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import grpc
import numpy as np
from tests.e2e.servers import Server, serving
from tests.waiting import until

from expertd.weights.demo import write_demo
from expertd_client import Client
from expertd_wire.v1 import experts_pb2 as pb
from expertd_wire.v1.experts_pb2_grpc import AdminStub

DEVICE = "cuda:0"
SIZES = (1, 7, 64, 300)


def test_layers_come_back_as_they_were(tmp_path: Path) -> None:
    """All of a model's, twice: their graphs go with them, their memory is another's meanwhile."""
    models = [f"--model={name}={written(tmp_path, name)}" for name in ("bf16", "fp8_block128")]
    with serving(tmp_path, *models, "--device", DEVICE) as server, Client(server.grpc) as client:
        before = answers(client, "bf16")
        digest = client.layer("bf16", 0).weights_digest
        with called_again_and_again(server, "fp8_block128") as wrong:
            for _ in range(2):
                reload(server, client, "bf16")
        assert not wrong
        for model, layers in (("bf16", [0, 1]), ("fp8_block128", [0, 1])):
            admin(server, "UnloadLayers", pb.UnloadLayersRequest(model=model, layers=layers))
        reload(server, client, "bf16")
        after = answers(client, "bf16")
        assert client.layer("bf16", 0).weights_digest == digest
        assert "without CUDA graphs" not in server.log.read_text()
    for first, second in zip(before, after, strict=True):
        assert np.isfinite(first).all() and np.linalg.norm(first) > 0
        assert close(first, second)


def test_a_layer_in_a_kernels_layout_only(tmp_path: Path) -> None:
    """Without room for a copy beside the canonical weights; it comes back as it was, too."""
    model = f"--model=mxfp4={written(tmp_path, 'mxfp4')}"
    found = []
    for flags in ((), ("--layout-cache-bytes=0", "--tune=off")):
        backend = "flashinfer_cutlass" if flags else "triton"
        pinned = (model, "--device", DEVICE, "--backend", backend, *flags)
        with serving(tmp_path, *pinned) as server, Client(server.grpc) as client:
            found.append(answers(client, "mxfp4"))
            if flags:
                assert "one copy" in client.layer("mxfp4", 0).detail
                reload(server, client, "mxfp4")
                found.append(answers(client, "mxfp4"))
    expected, *others = found
    for outputs in others:
        assert all(close(*pair) for pair in zip(expected, outputs, strict=True))


def written(home: Path, quant: str) -> Path:
    write_demo(home / quant, quant=quant)
    return home / quant


def answers(client: Client, model: str) -> list[np.ndarray]:
    info = client.layer(model, 0)
    random = np.random.default_rng(7)
    found = []
    for tokens in SIZES:
        rows = random.standard_normal((tokens, info.hidden), np.float32)
        logits = random.standard_normal((tokens, info.num_experts), np.float32)
        found.append(client.forward(model, 0, rows, router_logits=logits, timeout=60))
    return found


@contextmanager
def called_again_and_again(server: Server, model: str) -> Iterator[list[int]]:
    """Calls a model all the while: the sizes of calls answered otherwise than at first."""
    over, wrong = Event(), []

    def call() -> None:
        with Client(server.grpc) as client:
            expected = answers(client, model)
            while not over.is_set():
                found = zip(SIZES, expected, answers(client, model), strict=True)
                wrong.extend(tokens for tokens, first, now in found if not close(first, now))

    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(call)
        try:
            yield wrong
        finally:
            over.set()
            called.result()


def close(first: np.ndarray, now: np.ndarray) -> bool:
    return bool(np.linalg.norm(first - now) <= 1e-2 * np.linalg.norm(first))


def reload(server: Server, client: Client, model: str) -> None:
    admin(server, "UnloadLayers", pb.UnloadLayersRequest(model=model, layers=[0, 1]))
    assert client.layer(model, 0).state == "unloaded"
    admin(server, "LoadLayers", pb.LoadLayersRequest(model=model, layers=[0, 1]))
    until(lambda: {client.layer(model, layer).state for layer in (0, 1)} == {"ready"}, 60)


def admin(server: Server, method: str, request: object) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        getattr(AdminStub(channel), method)(request, timeout=60)
