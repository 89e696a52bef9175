"""Mutated and random messages: a documented code for each, the same server afterwards."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import torch
from safetensors.torch import save
from tests.door.probing import demo_call, unharmed
from tests.e2e.asking import raw_grpc, told_in
from tests.e2e.servers import Server, serving
from tests.strategies import wire_call

from expertd_wire.codec import encode_forward_call

ACCEPTED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
FEW, MANY = 300, 20_000
COUNTS = [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with (
        serving(home, "--demo", "--identity", "echo=64") as running,
        unharmed(running, more_mib=128),
    ):
        yield running


def mutated(good: bytes, source: random.Random) -> bytes:
    """Some bytes of a good message changed, cut, repeated, inserted; now and then all of them."""
    if source.random() < 0.1:
        return source.randbytes(source.randrange(400))
    data = bytearray(good)
    for _ in range(source.choice((1, 1, 1, 2, 8))):
        # Half of the changes hit the first bytes, where structure is denser than in tensors.
        end = len(data) if source.random() < 0.5 else min(len(data), 160)
        at = source.randrange(end + 1)
        kind = source.randrange(4)
        if kind == 0:
            data[at : at + 1] = source.randbytes(1)
        elif kind == 1:
            del data[at : at + source.randrange(1, 64)]
        elif kind == 2:
            data[at:at] = data[at : at + source.randrange(1, 32)]
        else:
            data[at:at] = source.choice((b"\xff" * 10, b"\x00" * 8, source.randbytes(6)))
    return bytes(data)


def seeded() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_messages_over_grpc(server: Server, count: int) -> None:
    source, seen = seeded(), Counter[str]()
    good = encode_forward_call(wire_call(**demo_call(tokens=2)))
    with grpc.insecure_channel(server.grpc) as channel:
        for _ in range(count):
            message = mutated(good, source)
            answer = raw_grpc(channel, message, timeout=20)
            assert answer.code in ACCEPTED, (answer, message)
            assert answer.code == "OK" or answer.reason, "it was our own check that refused"
            seen[answer.code] += 1
    assert seen["OK"] and seen["INVALID_ARGUMENT"] > count / 10, seen


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_messages_over_http(server: Server, count: int) -> None:
    source, seen = seeded(), Counter[str]()
    tensors = {n: v for n, v in demo_call(tokens=2).items() if isinstance(v, torch.Tensor)}
    good = save(tensors)
    url = "/v1/forward?model=demo&layer=0&timeout=20"
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as web:
        for _ in range(count):
            message = mutated(good, source)
            answer = told_in(web.post(url, content=message))
            assert answer.code in ACCEPTED, (answer, message)
            seen[answer.code] += 1
    assert seen["OK"] and seen["INVALID_ARGUMENT"] > count / 10, seen


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_questions(server: Server, count: int) -> None:
    source = seeded()
    good = b'{"spec": {"hidden": 256, "num_experts": 32, "top_k": 4}, "device": "cpu"}'
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as web:
        for _ in range(count // 4):
            message = mutated(good, source)
            answer = web.post("/v1/explain", content=message)
            assert answer.status_code in (200, 400, 422), (answer.text, message)
            assert answer.status_code == 200 or told_in(answer).reason
