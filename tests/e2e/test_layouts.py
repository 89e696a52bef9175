"""Weights in a kernel's own layout, within the operator's limit: what is served, told, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.e2e.local import Local
from tests.e2e.servers import Server, in_process, serving
from tests.e2e.test_metrics import scrape, value
from tests.service.weights.files import HIDDEN, qwen

from expertd.backends.base import Backend
from expertd.backends.build import build
from expertd.capability.row import Row
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.storage import layer_bytes
from expertd_client import Client, LayerFailed, NoUsablePlan

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


@pytest.mark.slow
def test_one_layers_copy_fits_and_every_call_is_answered(home: Path, tmp_path: Path) -> None:
    path = qwen(tmp_path / "m")
    plain = layer_bytes(layer_specs(Checkpoint.open(path))[0])
    limit = int(1.05 * plain)  # the copy has some constants with it
    flags = ("--layout-cache-bytes", str(limit), "--model", f"m={path}")
    with serving(home, *SIMULATED, *flags) as server, Client(server.grpc) as client:
        copy = weights_bytes(server) - 2 * plain
        assert plain <= copy <= limit
        kept, other = client.layers("m")
        assert kept.detail == "" and f"--layout-cache-bytes {limit}" in other.detail
        for layer in (0, 1, 0, 0, 1):  # auto has no other plan here: it never takes the reference
            name, found = answer(client, layer)
            truth = answer(client, layer, "reference")[1]
            assert name == "flashinfer_trtllm"
            assert np.linalg.norm(found - truth) <= 1e-2 * np.linalg.norm(truth)
            assert weights_bytes(server) == 2 * plain + copy


@pytest.mark.slow
def test_without_any_room_calls_are_refused_by_the_flags_name(home: Path, tmp_path: Path) -> None:
    path = qwen(tmp_path / "m")
    flags = ("--layout-cache-bytes", "0", "--model", f"m={path}")
    with serving(home, *SIMULATED, *flags) as server, Client(server.grpc) as client:
        assert weights_bytes(server) == sum(
            map(layer_bytes, layer_specs(Checkpoint.open(path)).values())
        )
        for backend in (None, "flashinfer_trtllm"):
            with pytest.raises(NoUsablePlan, match="--layout-cache-bytes"):
                answer(client, 0, backend)
        assert answer(client, 0, "reference")[0] == "reference"


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
        Local.until(lambda: client.layer("m", 0).state == "ready")
        client.call("m", 0, ROWS, **TOPK)
        Local.until(lambda: client.layer("m", 1).state == "failed")
        with pytest.raises(LayerFailed, match="no room; --layers, --experts load less: CUDA out"):
            client.call("m", 1, ROWS, **TOPK)
