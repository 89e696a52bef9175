"""A bfloat16 layer on the CPU is held in one order, and every backend still answers from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.e2e.servers import in_process
from tests.service.backends.test_torch_experts import backend, run
from tests.strategies import generator, random_topk

from expertd.backends.grouped.weights import Reordered
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.digest import weights_digest
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd_client import Client


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="nothing is packed on this processor"
)
def test_both_backends_answer_as_on_canonical_weights(deep: Path) -> None:
    checkpoint = Checkpoint.open(deep)
    spec = layer_specs(checkpoint)[0]
    plain, bias = load_layer(checkpoint, 0, spec, "cpu")
    random = generator(1)
    ids, router = random_topk(9, spec.num_experts, 4, random)
    rows = torch.randn(9, spec.hidden, generator=random).bfloat16()
    with in_process("--model", f"deep={deep}") as (app, addresses):
        assert app.wait_ready()
        resident = app.residents.get("deep", 0)
        assert resident.weights is not None and isinstance(resident.weights.packed, Reordered)
        assert resident.digest == weights_digest(plain, bias) and resident.nbytes == plain.nbytes
        with Client(addresses.grpc) as client:
            answers = {
                name: client.forward(
                    "deep",
                    0,
                    rows,
                    topk_ids=ids,
                    topk_weights=router,
                    backend=name,
                    reply_dtype="float32",
                )
                for name in ("reference", "grouped")
            }
    for name, answer in answers.items():
        expected = run(backend(name, spec, plain), rows, ids, router)
        assert torch.equal(answer, expected), name
