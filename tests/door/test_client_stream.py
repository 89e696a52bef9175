"""AsyncClient.stream() against a real server: answers equal to those of single calls."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tests.door.conftest import TOKENS
from tests.door.probing import demo_call
from tests.e2e.servers import Server

from expertd_client import AsyncClient, NotFound, Unauthenticated


async def test_a_stream_answers_as_single_calls_do(guarded: Server) -> None:
    calls = [demo_call(seed, tokens=1 + seed) for seed in range(12)]
    async with (
        AsyncClient(guarded.grpc, token=TOKENS["infer"]) as client,
        client.stream() as stream,
    ):
        single = [
            await client.forward(
                c["model"], 0, c["hidden_states"], router_logits=c["router_logits"]
            )
            for c in calls
        ]
        refused = asyncio.create_task(stream.forward("nobody", 0, calls[0]["hidden_states"]))
        streamed = await asyncio.gather(
            *(
                stream.forward(c["model"], 0, c["hidden_states"], router_logits=c["router_logits"])
                for c in calls
            )
        )
        with pytest.raises(NotFound):
            await refused
    for one, other in zip(single, streamed, strict=True):
        assert torch.allclose(one, other, atol=1e-5), "batches may differ in their rounding"


async def test_a_stream_without_a_token_is_refused(guarded: Server) -> None:
    async with AsyncClient(guarded.grpc) as client, client.stream() as stream:
        with pytest.raises(Unauthenticated):
            await stream.call("echo", 0, torch.ones(1, 64), timeout=10)
