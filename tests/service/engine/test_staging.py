"""Staging: the same buffers for calls of every size, inputs only read, replies that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service.engine.parts import echo, resident, running
from tests.strategies import generator, layer_spec, random_topk, torch_tensor, wire

from expertd.engine.staging import TORCH_DTYPES, StagingBuffer
from expertd_wire.messages import ForwardCall
from expertd_wire.tensors import DTYPES, WireTensor


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=4), min_size=1, max_size=5))
def test_one_buffer_stacks_fields_of_any_size_one_after_the_other(rounds: list[list[int]]) -> None:
    buffer = StagingBuffer()
    for number, sizes in enumerate(rounds):
        random = torch.Generator().manual_seed(number)
        parts = [torch.randn(size, 96, generator=random) for size in sizes]
        many = [(torch.arange(7 * size) + number).view(-1, 7).int() for size in sizes]
        fields = {"parts": parts, "many": many, "long": [many[0].long()]}
        stacked = buffer.stack({n: [wire(one) for one in f] for n, f in fields.items()})
        for name, field in fields.items():
            assert torch.equal(stacked[name], torch.cat(field))


@pytest.mark.parametrize("name", DTYPES)
def test_every_wire_dtype_keeps_its_bits(name: str) -> None:
    assert set(TORCH_DTYPES) == set(DTYPES)
    size = torch.empty(0, dtype=TORCH_DTYPES[name]).element_size()
    bits = torch.arange(256 * size, dtype=torch.uint8)
    tensor = WireTensor(name, (256, 1), memoryview(bytes(bits.tolist())))
    stacked = StagingBuffer().stack({"it": [tensor, tensor]})["it"]
    assert stacked.dtype == TORCH_DTYPES[name] and stacked.shape == (512, 1)
    assert torch.equal(stacked.view(torch.uint8).flatten(), bits.repeat(2))


def test_unaligned_bytes_are_fine() -> None:
    values = torch.randn(5, 3)
    shifted = memoryview(b"x" + values.numpy().tobytes())[1:]
    stacked = StagingBuffer().stack({"it": [WireTensor("float32", (5, 3), shifted)]})
    assert torch.equal(stacked["it"], values)


def test_replies_stay_when_later_calls_use_the_buffers() -> None:
    random = generator(41)
    layer = echo(64)
    rows = [torch.randn(tokens, 64, generator=random) for tokens in (3, 2000, 1, 999, 4)]
    with running(layer) as engine:
        calls = [ForwardCall("echo", 0, wire(each)) for each in rows]
        replies = [engine.submit(each, "test", None).future.result(10) for each in calls]
    for given_rows, reply in zip(rows, replies, strict=True):
        assert torch.equal(torch_tensor(reply.output), given_rows)


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize("form", ["logits", "topk", "fp8", "mx"])
def test_inputs_are_never_written_to(backend: str, form: str) -> None:
    random = generator(42)
    spec = layer_spec(hidden=128)
    ids, weights = random_topk(6, spec.num_experts, 2, random)
    ids[2, 1], weights[2, 1], ids[5] = -1, float("nan"), 77  # what the checks make harmless
    rows = torch.randn(6, spec.hidden, generator=random)
    logits = torch.randn(6, spec.num_experts, generator=random)
    logits[1] = float("nan")
    fields: dict[str, Any] = {"hidden_states": rows, "topk_ids": ids, "topk_weights": weights}
    if form == "logits":
        fields = {"hidden_states": rows, "router_logits": logits}
    if form in ("fp8", "mx"):
        fields["hidden_states"] = rows.to(torch.float8_e4m3fn)
        scale = torch.ones(6, 1) if form == "fp8" else torch.full((6, 4), 130, dtype=torch.uint8)
        name = {"fp8": "fp8_group128", "mx": "mxfp8"}[form]
        fields |= {"hidden_states_scale": scale, "hidden_states_format": name}
    memory = {n: bytearray(wire(v).data) for n, v in fields.items() if torch.is_tensor(v)}
    tensors = {
        n: WireTensor(wire(fields[n]).dtype, tuple(fields[n].shape), memoryview(data))
        for n, data in memory.items()
    }
    before = {n: bytes(data) for n, data in memory.items()}
    with running(resident(spec, random)) as engine:
        call = ForwardCall("m", 0, backend=backend, **fields | tensors)
        assert engine.submit(call, "test", None).future.exception(10) is not None
    assert {n: bytes(data) for n, data in memory.items()} == before
