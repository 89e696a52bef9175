"""A server on another card than the first answers as one on the first does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.e2e.servers import serving

from expertd.cli import main
from expertd.weights.demo import write_demo
from expertd_client import Client

CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.skipif(CARDS < 2, reason="there is no second card here")
def test_the_last_card_answers_as_the_first_does(tmp_path: Path) -> None:
    outputs = answers(tmp_path, ["cuda:0", f"cuda:{CARDS - 1}"])
    for first, last in zip(*outputs, strict=True):
        assert np.isfinite(first).all() and np.abs(first).max() > 0
        assert np.linalg.norm(first - last) <= 1e-2 * np.linalg.norm(first)


def answers(home: Path, devices: list[str]) -> list[list[np.ndarray]]:
    """What each device's server says to calls of one, some and many rows."""
    model = home / "model"
    write_demo(model, quant="bf16")
    found = []
    for device in devices:
        with (
            serving(
                home, "--model", f"m={model}", "--identity", "echo=64", "--device", device
            ) as server,
            Client(server.grpc) as client,
        ):
            info = client.layer("m", 0)
            random = np.random.default_rng(5)
            outputs = []
            for tokens in (1, 7, 300):
                rows = random.standard_normal((tokens, info.hidden), np.float32)
                logits = random.standard_normal((tokens, info.num_experts), np.float32)
                outputs.append(client.forward("m", 0, rows, router_logits=logits, timeout=60))
                assert np.array_equal(client.forward("echo", 0, rows[:, :64]), rows[:, :64])
            found.append(outputs)
    return found


@pytest.mark.skipif(CARDS < 2, reason="there is no second card here")
def test_the_last_card_is_proven_as_the_first_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["verify", "--device", f"cuda:{CARDS - 1}", "--backend", "grouped_mm"]) == 0
    assert torch.cuda.current_device() == CARDS - 1
