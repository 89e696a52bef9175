"""Weights in a kernel's own layout, within the operator's limit: what is served, told, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch
from tests.e2e.servers import Server, in_process, serving
from tests.e2e.test_metrics import scrape, value
from tests.service.weights.files import HIDDEN, qwen
from tests.waiting import until
from torch.multiprocessing.reductions import StorageWeakRef

from expertd.backends.base import Backend
from expertd.backends.build import build
from expertd.backends.flashinfer.library import stand_in
from expertd.capability.row import Row
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.storage import layer_bytes
from expertd_client import Client, LayerFailed, NoUsablePlan
from expertd_wire.v1 import experts_pb2 as pb
from expertd_wire.v1.experts_pb2_grpc import AdminStub

SIMULATED = ("--simulate", "sm100", "--testing", "--tune", "off", "--max-batch-tokens", "4")
ROWS = np.random.default_rng(3).standard_normal((4, HIDDEN)).astype(ml_dtypes.bfloat16)
LOGITS = np.random.default_rng(4).standard_normal((4, 4)).astype(np.float32)

TOPK = {
    "topk_ids": np.array([[0, 1], [2, 3], [1, 3], [0, 2]], np.int32),
    "topk_weights": np.ones((4, 2), np.float32),
}


def answer(client: Client, layer: int, backend: str | None = None) -> tuple[str, np.ndarray]:
    reply = client.call("m", layer, ROWS, router_logits=LOGITS, backend=backend)
    return reply.backend, reply.output.astype(np.float32)


def weights_bytes(server: Server) -> float:
    return value(scrape(server.http), "expertd_weights_bytes", model="m", device="cpu")


def truths(path: Path) -> list[np.ndarray]:
    """What the reference makes of both layers, on a server with canonical weights."""
    with in_process("--model", f"m={path}") as (app, addresses), Client(addresses.grpc) as client:
        assert app.wait_ready()
        return [answer(client, layer, "reference")[1] for layer in (0, 1)]


def close(found: np.ndarray, truth: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - truth) <= 1e-2 * np.linalg.norm(truth))


def admin(server: Server, method: str, request: object) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        getattr(AdminStub(channel), method)(request, timeout=30)


@pytest.mark.slow
def test_one_layers_copy_fits_beside_and_the_others_replaces(home: Path, tmp_path: Path) -> None:
    path = qwen(tmp_path / "m")
    plain, truth = layer_bytes(layer_specs(Checkpoint.open(path))[0]), truths(path)
    limit = int(1.05 * plain)  # the copy has some constants with it
    flags = ("--layout-cache-bytes", str(limit), "--model", f"m={path}")
    with serving(home, *SIMULATED, *flags) as server, Client(server.grpc) as client:
        copies = weights_bytes(server) - plain
        assert 2 * plain <= copies <= 2 * limit
        kept, other = client.layers("m")
        assert kept.detail == "" and "one copy" in other.detail
        for layer in (0, 1, 0, 0, 1):  # auto has no other plan here: it never takes the reference
            name, found = answer(client, layer)
            assert name == "flashinfer_trtllm" and close(found, truth[layer])
            assert weights_bytes(server) == plain + copies
        assert answer(client, 0, "reference")[0] == "reference"


@pytest.mark.slow
def test_without_any_room_there_is_one_copy(home: Path, tmp_path: Path) -> None:
    path = qwen(tmp_path / "m")
    plain, truth = layer_bytes(layer_specs(Checkpoint.open(path))[0]), truths(path)
    flags = ("--layout-cache-bytes", "0", "--model", f"m={path}")
    with serving(home, *SIMULATED, *flags) as server, Client(server.grpc) as client:
        held = weights_bytes(server)
        assert 2 * plain <= held <= 2.1 * plain
        for _ in range(2):
            digest = client.layer("m", 1).weights_digest
            for layer in (0, 1):
                for pin in (None, "flashinfer_trtllm"):
                    name, found = answer(client, layer, pin)
                    assert name == "flashinfer_trtllm" and close(found, truth[layer])
                refused(client, layer, "reference")
                info = client.layer("m", layer)
                assert "--layout-cache-bytes to" in info.detail and "one copy" in info.detail
                assert {plan.backend for plan in info.plans} == {"flashinfer_trtllm"}
            reload(server, client, held)
            assert client.layer("m", 1).weights_digest == digest


def refused(client: Client, layer: int, pin: str) -> None:
    with pytest.raises(NoUsablePlan) as caught:
        answer(client, layer, pin)
    (reason,) = caught.value.reasons
    assert (reason.backend, reason.code) == (pin, "layout_cache")
    assert "held in flashinfer_trtllm's layout only, one copy; raise --layout" in reason.text


def reload(server: Server, client: Client, held: float) -> None:
    """Layer 1 away and back again."""
    admin(server, "UnloadLayers", pb.UnloadLayersRequest(model="m", layers=[1]))
    assert client.layer("m", 1).state == "unloaded" and weights_bytes(server) == held / 2
    admin(server, "LoadLayers", pb.LoadLayersRequest(model="m", layers=[1]))
    until(lambda: client.layer("m", 1).state == "ready")
    assert weights_bytes(server) == held


def test_a_device_without_memory_for_a_copy_serves_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(row: Row, *given: Any) -> Backend:
        if row.backend == "grouped":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(row, *given)

    monkeypatch.setattr("expertd.engine.loader.build", full)
    path = qwen(tmp_path / "m")
    with in_process("--model", f"m={path}") as (app, addresses), Client(addresses.grpc) as client:
        assert app.wait_ready()
        assert client.call("m", 0, ROWS, **TOPK, backend="reference").backend == "reference"
        with pytest.raises(NoUsablePlan) as caught:
            client.call("m", 0, ROWS, **TOPK, backend="grouped")
        assert [reason.code for reason in caught.value.reasons] == ["no_memory"]


def test_a_layer_that_does_not_fit_fails_and_the_other_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(checkpoint: Checkpoint, layer: int, *given: Any, **more: Any) -> Any:
        if layer == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load_layer(checkpoint, layer, *given, **more)

    monkeypatch.setattr("expertd.engine.loader.load_layer", full)
    path = qwen(tmp_path / "m")
    with in_process("--model", f"m={path}") as (app, addresses), Client(addresses.grpc) as client:
        assert not app.wait_ready()
        until(lambda: client.layer("m", 0).state == "ready")
        client.call("m", 0, ROWS, **TOPK)
        until(lambda: client.layer("m", 1).state == "failed")
        with pytest.raises(LayerFailed, match="no room; --layers, --experts load less: CUDA out"):
            client.call("m", 1, ROWS, **TOPK)


def test_what_the_one_copy_replaces_is_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that took part in a load, or in the load after it, goes on holding the weights."""
    loaded: list[StorageWeakRef] = []

    def watched(*given: Any, **more: Any) -> Any:
        weights, bias = load_layer(*given, **more)
        loaded.extend(StorageWeakRef(t.untyped_storage()) for t in weights.tensors.values())
        return weights, bias

    monkeypatch.setattr("expertd.engine.loader.load_layer", watched)
    flags = (*SIMULATED, "--layout-cache-bytes", "0", "--model", f"m={qwen(tmp_path / 'm')}")
    try:
        with in_process(*flags) as (app, addresses), Client(addresses.grpc) as client:
            assert app.wait_ready()
            assert len(loaded) == 4 and all(piece.expired() for piece in loaded)
            assert answer(client, 0)[0] == "flashinfer_trtllm"
    finally:
        stand_in(None)
