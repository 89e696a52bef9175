"""Anonymous memory: weights are held once and nothing of their size beside them."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from tests.e2e.servers import Server, serving

from expertd.weights.demo import write_demo
from expertd.weights.writer import write_json, write_shards
from expertd_client import Client, ExpertPool

HIDDEN, WIDTH, EXPERTS, LAYERS = 1024, 512, 48, 3
CALLERS, LEFT_BY_MESSAGES = 6, 400 << 20
"""What so many callers of 112 MiB a call, each way, may leave in memory. Twelve messages of 8 MiB
are under way at once, and each is copied a few times."""


def write_checkpoint(path: Path, demo: Path) -> None:
    """A qwen3_moe of some hundred megabytes of experts, one shard a layer."""
    sizes = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_hidden_layers": LAYERS,
    }
    config = json.loads((demo / "config.json").read_text()) | sizes
    config.pop("quantization_config", None)
    path.mkdir()
    write_json(path / "config.json", config)
    write_shards(path, [layer(number) for number in range(LAYERS)])


def layer(number: int) -> dict[str, torch.Tensor]:
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    random = torch.Generator().manual_seed(number)
    return {
        f"model.layers.{number}.mlp.experts.{e}.{name}.weight": (
            torch.randn(shape, generator=random) / 32
        ).bfloat16()
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }


def anonymous_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@pytest.mark.slow
def test_memory_is_the_weights_and_little_else(home: Path, tmp_path: Path) -> None:
    small, path = tmp_path / "small", tmp_path / "large"
    write_demo(small, quant="bf16")
    write_checkpoint(path, small)
    with serving(home, "--identity", "echo=64") as server:
        empty = anonymous_bytes(server)
    with serving(home, "--model", f"large={path}") as server:
        info = httpx.get(f"http://{server.http}/v1/layers", trust_env=False).json()["layers"]
        held = LAYERS * EXPERTS * 3 * HIDDEN * WIDTH * 2
        loaded = anonymous_bytes(server)
        with Client(server.grpc) as client:
            for tokens in (1, 16, 64):
                rows = np.ones((tokens, HIDDEN), np.float32)
                logits = np.random.default_rng(0).standard_normal((tokens, EXPERTS), np.float32)
                for number in range(LAYERS):
                    client.forward("large", number, rows, router_logits=logits)
        used = anonymous_bytes(server)
    assert len(info) == LAYERS
    print(
        f"empty {empty >> 20} MiB, loaded {loaded >> 20}, after calls {used >> 20}, "
        f"weights {held >> 20}"
    )
    assert loaded - empty >= 0.9 * held, "the weights must be in anonymous memory to be measured"
    assert max(loaded, used) < 1.3 * held + empty


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_large_messages_leave_little_behind(home: Path, kind: str) -> None:
    rows = np.ones((8192, 7168), np.float16)
    program = (
        f"import sys; from expertd.cli import main, serve; known = serve.MALLOC; "
        f"known.update((name, dict.fromkeys(by, by[{kind!r}])) for name, by in known.items()); "
        "sys.exit(main())"
    )

    def call(pool: ExpertPool) -> None:
        for _ in range(3):
            pool.forward("echo", 0, rows, timeout=120)

    flags = ("--identity", "echo=7168")
    with serving(home, *flags, program=(sys.executable, "-c", program)) as server:
        empty = anonymous_bytes(server)
        with ExpertPool([server.grpc]) as pool, ThreadPoolExecutor(CALLERS) as threads:
            list(threads.map(call, [pool] * CALLERS))
        left = anonymous_bytes(server) - empty
    print(f"empty {empty >> 20} MiB, left by messages {left >> 20}")
    assert left < LEFT_BY_MESSAGES
