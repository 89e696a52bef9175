"""A simulated SM100 serves every format through the trtllm backend, routed and monolithic."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tests.e2e.servers import expertd, serving

from expertd.proof.run import TOLERANCES
from expertd.weights.demo import write_demo
from expertd_client import Client

FORMATS = {
    "bf16": "bf16",
    "fp8_tensor": "fp8_tensor",
    "fp8_channel": "fp8_token",
    "fp8_block128": "fp8_group128",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp8",
    "mxint4": "bf16",
}
"""Weights → the format in which auto hands over the rows at most coarsely."""


@pytest.mark.slow
def test_every_format_is_served_through_the_twin(home: Path, tmp_path: Path) -> None:
    models = []
    for quant in FORMATS:
        write_demo(tmp_path / quant, quant=quant, seed=7)
        models += ["--model", f"{quant}={tmp_path / quant}"]
    random = np.random.default_rng(7)
    rows = random.standard_normal((5, 256)).astype(ml_dtypes.bfloat16)
    logits = random.standard_normal((5, 32)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :4].astype(np.int32)
    forms = (
        {"router_logits": logits},
        {"topk_ids": ids, "topk_weights": np.full((5, 4), 0.25, np.float32)},
    )
    flags = ("--simulate", "sm100", "--testing", "--layers", "0")
    with serving(home, *flags, *models) as server, Client(server.grpc) as client:
        states = {plan.state for layer in client.layers() for plan in layer.plans}
        assert states and "proven" not in states, "a twin proves nothing about a card"
        for quant, activation in FORMATS.items():
            modes = set()
            for routing in forms:
                reply = client.call(quant, 0, rows, **routing)
                truth = client.forward(quant, 0, rows, backend="reference", **routing)
                assert reply.backend == "flashinfer_trtllm", quant
                modes.add(reply.mode)
                found, expected = (a.astype(np.float32) for a in (reply.output, truth))
                error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                assert error <= TOLERANCES[activation], (quant, reply.mode, error)
            assert modes == {"monolithic", "routed"}, quant


def test_nobody_simulates_by_accident(home: Path) -> None:
    ended = expertd(home, "serve", "--identity", "echo=8", "--simulate", "sm100")
    assert ended.returncode == 2
    assert "--demo" in ended.stderr
