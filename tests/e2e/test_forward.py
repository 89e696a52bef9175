"""The Python clients against a real server: the right numbers, in kind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.e2e.servers import Server
from tests.e2e.truth import block_output
from tests.strategies import generator, random_topk, relative

from expertd_client import AsyncClient, Client, ExpertsNotHeld

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("model", ["demo", "deep"])
def test_the_server_computes_what_transformers_block_does(
    client: Client, home: Path, deep: Path, model: str, layer: int, dtype: str
) -> None:
    random = generator(layer)
    path = deep if model == "deep" else next((home / "cache" / "expertd").glob("demo-*"))
    rows = torch.randn(33, 256, generator=random).to(getattr(torch, dtype))
    truth, logits = block_output(path, layer, rows.float())
    reply = client.call(model, layer, rows, router_logits=logits)
    assert reply.output.dtype == rows.dtype
    assert (reply.backend, reply.mode, reply.entry) == ("grouped", "routed", "grouped")
    assert min(reply.queued_ns, reply.staged_ns, reply.computed_ns) > 0
    assert relative(reply.output, truth) <= TOLERANCE[dtype]


def test_reference_and_grouped_agree_when_pinned(client: Client) -> None:
    random = generator(2)
    rows = torch.randn(20, 256, generator=random)
    ids, weights = random_topk(20, 32, 5, random)
    ids[3, 1] = -1
    one, other = (
        client.call("demo", 0, rows, topk_ids=ids, topk_weights=weights, backend=name)
        for name in ("reference", "grouped")
    )
    assert (one.backend, other.backend) == ("reference", "grouped")
    assert relative(one.output, other.output) <= 1e-5


@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_in_numpy_out(client: Client, dtype: str) -> None:
    random = np.random.default_rng(3)
    rows = random.standard_normal((5, 64)).astype(NUMPY[dtype])
    output = client.forward("echo", 0, rows)
    assert isinstance(output, np.ndarray) and output.dtype == rows.dtype
    np.testing.assert_array_equal(output, rows)
    output[0, 0] = 1  # the caller's own memory


@pytest.mark.parametrize("dtype", NUMPY)
def test_torch_in_torch_out(client: Client, dtype: str) -> None:
    rows = torch.randn(5, 64, generator=generator(4)).to(getattr(torch, dtype))
    output = client.forward("echo", 0, rows)
    assert isinstance(output, torch.Tensor)
    assert (output.dtype, output.device) == (rows.dtype, rows.device)
    assert torch.equal(output, rows)
    output[0, 0] = 1


@pytest.mark.parametrize("given", NUMPY)
@pytest.mark.parametrize("asked", [None, *NUMPY])
def test_reply_dtype(client: Client, given: str, asked: str | None) -> None:
    rows = torch.randn(3, 64, generator=generator(5)).to(getattr(torch, given))
    output = client.forward("echo", 0, rows, reply_dtype=asked)
    assert torch.equal(output, rows.to(getattr(torch, asked or given)))


def test_fp8_rows(client: Client) -> None:
    random = generator(6)
    rows = torch.randn(7, 256, generator=random).to(torch.float8_e4m3fn)
    scale = torch.rand(7, 2, generator=random) + 0.5
    logits = torch.randn(7, 32, generator=random)
    plain = rows.float() * scale.repeat_interleave(128, 1)
    truth = client.forward("demo", 1, plain, router_logits=logits, backend="reference")
    options: dict[str, Any] = {
        "router_logits": logits,
        "hidden_states_format": "fp8_group128",
        "hidden_states_scale": scale,
    }
    for name, tolerance in (("reference", 3e-3), ("grouped", 1e-2)):
        output = client.forward("demo", 1, rows, backend=name, **options)
        assert output.dtype == torch.bfloat16 and relative(output, truth) <= tolerance
    bits = rows.view(torch.uint8).numpy()
    numbers = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    as_bits = client.forward("demo", 1, bits, reply_dtype="float32", **numbers)
    assert relative(torch.from_numpy(as_bits), truth) <= 1e-2


def test_no_rows_no_output(client: Client) -> None:
    rows, logits = np.zeros((0, 256), np.float16), np.zeros((0, 32), np.float32)
    output = client.forward("demo", 0, rows, router_logits=logits)
    assert output.shape == (0, 256) and output.dtype == np.float16


def test_a_large_call(client: Client) -> None:
    rows = torch.randn(16384, 64, generator=generator(7))
    assert torch.equal(client.forward("echo", 0, rows), rows)


def test_parts_of_the_experts(client: Client, part: Server) -> None:
    random = generator(8)
    rows = torch.randn(30, 256, generator=random)
    ids, weights = random_topk(30, 32, 4, random)
    held = (ids >= 8) & (ids <= 23)
    mine = ids.where(held, -1)
    routed: dict[str, Any] = {"topk_ids": ids, "topk_weights": weights}
    with Client(part.grpc) as holder:
        (info,) = holder.layers("demo")
        assert (info.layer, info.expert_begin, info.expert_end) == (1, 8, 24)
        with pytest.raises(ExpertsNotHeld, match="set partial") as caught:
            holder.forward("demo", 1, rows, **routed)
        assert caught.value.reason == "EXPERTS_NOT_HELD"
        reply = holder.call("demo", 1, rows.bfloat16(), **routed, partial=True)
        assert reply.output.dtype == torch.float32 and reply.backend == "reference"
        exact = holder.forward("demo", 1, rows, **routed, partial=True)
        allowed = holder.forward("demo", 1, rows, topk_ids=mine, topk_weights=weights)
        logits = torch.randn(30, 32, generator=random)
        with pytest.raises(ExpertsNotHeld, match="logits may choose any"):
            holder.forward("demo", 1, rows, router_logits=logits)
        assert holder.forward("demo", 1, rows, router_logits=logits, partial=True).any()
    whole = client.forward("demo", 1, rows, topk_ids=mine, topk_weights=weights)
    assert relative(exact, whole) <= 1e-5 and relative(allowed, whole) <= 1e-5


async def test_the_asynchronous_client(server: Server) -> None:
    random = generator(9)
    batches = [torch.randn(n, 64, generator=random) for n in range(1, 17)]
    async with AsyncClient(server.grpc) as client:
        outputs = await asyncio.gather(*(client.forward("echo", 0, rows) for rows in batches))
        assert all(torch.equal(*pair) for pair in zip(outputs, batches, strict=True))
        assert await client.health()
        assert {layer.model for layer in await client.layers()} == {"demo", "deep", "echo"}
        assert (await client.capabilities()).device == "cpu"
        reply = await client.call("echo", 0, batches[0].numpy())
        assert isinstance(reply.output, np.ndarray) and reply.backend == "identity"


def test_questions(client: Client) -> None:
    assert client.health()
    layers = {(info.model, info.layer): info for info in client.layers()}
    assert sorted(layers) == [("deep", 0), ("deep", 1), ("demo", 0), ("demo", 1), ("echo", 0)]
    demo, deep = layers["demo", 1], layers["deep", 0]
    assert (demo.state, demo.quant, demo.generation) == ("ready", "fp8_block128", 1)
    assert (demo.hidden, demo.intermediate, demo.num_experts, demo.top_k) == (256, 128, 32, 4)
    assert (demo.expert_begin, demo.expert_end) == (0, 32)
    assert demo.routing.method == "RenormalizeNaive" and demo.activation.name == "swiglu"
    assert [plan.backend for plan in demo.plans] == ["grouped"]
    assert demo.weights_digest != layers["demo", 0].weights_digest != ""
    assert deep.routing.method == "DeepSeekV3" and deep.quant == "bf16"
    assert (deep.routing.n_group, deep.routing.topk_group) == (4, 2)
    assert deep.routing.routed_scaling_factor == 2.5
    assert list(deep.routing.correction_bias.shape) == [32]
    assert len(deep.routing.correction_bias.data) == 128
    echo = layers["echo", 0]
    assert (echo.hidden, echo.num_experts, echo.state) == (64, 0, "ready")
    assert len(demo.expert_rows) == 32
    assert client.layer("demo", 1) == demo
    cells = {(cell.backend, cell.quant): cell.state for cell in client.capabilities().cells}
    assert cells["grouped", "fp8_block128"] in ("present", "proven")
