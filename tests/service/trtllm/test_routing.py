"""How the kernel is told to route, and how it is handed a choice that was made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.service.trtllm.layers import backend_of, batch_of, layer, row_of
from tests.service.trtllm.recording import Recording
from torch import Tensor

from expertd.backends.flashinfer_trtllm import backend as trtllm
from expertd.backends.flashinfer_trtllm.topk import packed, paired
from expertd.capability.row import Row
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.core import PlanMode, QuantScheme, RoutingMethod, RoutingSpec

MONOLITHIC = [row for row in ROWS if row.mode is PlanMode.MONOLITHIC]
ROUTED = [row for row in ROWS if row.mode is PlanMode.ROUTED]


def name_of(row: Row) -> str:
    return f"{row.entry}-{row.activation_quant}-{row.quants[0]}"


def deepseek(**changes: Any) -> RoutingSpec:
    settings = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "bias": True}
    return RoutingSpec(RoutingMethod.DEEPSEEK_V3, "sigmoid", 2, **(settings | changes))


def told(recording: Recording, row: Row, routing: RoutingSpec, bias: Any = None) -> dict[str, Any]:
    spec = layer(row.quants[0], routing=routing)
    backend_of(row, spec, bias).forward(batch_of(row, spec))
    return recording.last


@pytest.mark.parametrize("row", MONOLITHIC, ids=name_of)
def test_grouped_deepseek(recording: Recording, row: Row) -> None:
    bias = torch.randn(8)
    given = told(recording, row, deepseek(), bias)
    assert (given["n_group"], given["topk_group"]) == (4, 2)
    assert given["routed_scaling_factor"] == 2.5 and given["routing_method_type"] == 2
    assert given["routing_bias"] is bias


@pytest.mark.parametrize("row", MONOLITHIC, ids=name_of)
@pytest.mark.parametrize("groups", [None, 1])
def test_ungrouped_deepseek(recording: Recording, row: Row, groups: int | None) -> None:
    given = told(recording, row, deepseek(n_group=groups, topk_group=groups, bias=False))
    # The block entries refuse 0, which None becomes; the others take None for "no groups".
    expected = 1 if row.entry.startswith("trtllm_fp8_block") else None
    assert (given["n_group"], given["topk_group"]) == (expected, expected)
    zeros: Tensor = given["routing_bias"]
    assert zeros.dtype == torch.float32 and torch.equal(zeros, torch.zeros(8))


@pytest.mark.parametrize("row", MONOLITHIC, ids=name_of)
def test_minimax_gets_a_bias_and_its_scale(recording: Recording, row: Row) -> None:
    routing = RoutingSpec(RoutingMethod.MINIMAX2, "sigmoid", 2, routed_scaling_factor=3.0)
    given = told(recording, row, routing)
    assert torch.equal(given["routing_bias"], torch.zeros(8))
    assert given["routed_scaling_factor"] == 3.0 and given["routing_method_type"] == 7
    assert (given["n_group"], given["topk_group"]) == (None, None)


@pytest.mark.parametrize(
    ("method", "number"),
    [
        (RoutingMethod.DEFAULT, 0),
        (RoutingMethod.RENORMALIZE, 1),
        (RoutingMethod.RENORMALIZE_NAIVE, 4),
        (RoutingMethod.SIGMOID_RENORM, 6),
        (RoutingMethod.SIGMOID, 8),
        (RoutingMethod.TOPK_SIGMOID, 9),
    ],
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_methods_without_a_scale(
    recording: Recording, method: RoutingMethod, number: int, renormalize: bool
) -> None:
    row = row_of(QuantScheme.FP8_BLOCK128, PlanMode.MONOLITHIC)
    given = told(recording, row, RoutingSpec(method, "softmax", 2, renormalize))
    assert given["routing_method_type"] == number and given["norm_topk_prob"] is renormalize
    for name in ("routed_scaling_factor", "routing_bias", "n_group", "topk_group"):
        assert given[name] is None, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_bias_go_in_as_they_are(recording: Recording, dtype: torch.dtype) -> None:
    row = row_of(QuantScheme.NVFP4, PlanMode.MONOLITHIC)
    spec = layer(row.quants[0], routing=deepseek())
    bias = torch.randn(8).to(dtype)
    logits = torch.randn(5, 8).to(dtype)
    backend_of(row, spec, bias).forward(batch_of(row, spec, logits=logits))
    assert recording.last["routing_bias"] is bias
    assert recording.last["routing_logits"].dtype == dtype
    assert torch.equal(recording.last["routing_logits"], logits)


@pytest.mark.parametrize("row", ROUTED, ids=name_of)
def test_a_choice_that_was_made(recording: Recording, row: Row) -> None:
    """Whatever the layer's routing: nothing of it reaches a launcher, and ids stay global."""
    spec = layer(row.quants[0], routing=deepseek(), expert_begin=4, expert_end=6)
    batch = batch_of(row, spec)
    backend_of(row, spec, torch.randn(8)).forward(batch)
    given = recording.last
    assert (given["local_expert_offset"], given["local_num_experts"]) == (4, 2)
    assert given["routing_method_type"] == 1 and given["top_k"] == 2
    for name in ("routed_scaling_factor", "n_group", "topk_group", "routing_bias"):
        assert given.get(name) is None, name
    assert batch.ids is not None and batch.weights is not None
    if "per_channel" in row.entry or "mxint4" in row.entry:
        check_packed(given["topk_ids"], batch.ids, batch.weights)
    else:
        ids, weights = given["topk_ids"]
        assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
        assert torch.equal(ids, batch.ids) and torch.equal(weights, batch.weights)


def check_packed(given: Tensor, ids: Tensor, weights: Tensor) -> None:
    assert given.dtype == torch.int32 and given.shape == ids.shape
    assert torch.equal(given >> 16, ids)
    bits = (given & 0xFFFF).to(torch.int32)
    assert torch.equal((bits << 16).view(torch.float32), weights.bfloat16().float())


def test_older_versions_take_packed_ids(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(QuantScheme.BF16, PlanMode.ROUTED)
    spec = layer(QuantScheme.BF16)
    monkeypatch.setattr(trtllm, "installed_flashinfer", lambda: "0.6.18")
    backend_of(row, spec).forward(batch_of(row, spec))
    assert isinstance(recording.last["topk_ids"], Tensor)


def test_no_expert_weighs_nothing_whatever_was_sent() -> None:
    ids = torch.tensor([[3, -1], [-1, 2047]], dtype=torch.int32)
    weights = torch.tensor([[-0.5, float("nan")], [float("inf"), 1.0]])
    both, kept = paired(ids, weights)
    assert torch.equal(both, ids) and kept.tolist() == [[-0.5, 0.0], [0.0, 1.0]]
    together = packed(ids, weights)
    assert isinstance(together, Tensor)
    check_packed(together, ids, kept)
    assert packed(ids.long(), weights).dtype == torch.int32  # type: ignore[union-attr]


LLAMA = RoutingSpec(RoutingMethod.LLAMA4, "sigmoid", 1, weight_site="input")


def test_input_weights_by_the_kernel(recording: Recording) -> None:
    row = row_of(QuantScheme.FP8_TENSOR, PlanMode.MONOLITHIC)
    given = told(recording, row, LLAMA)
    assert given["use_routing_scales_on_input"] is True and given["routing_method_type"] == 3


@pytest.mark.parametrize("quant", [QuantScheme.BF16, QuantScheme.FP8_TENSOR])
def test_input_weights_on_the_rows(recording: Recording, quant: QuantScheme) -> None:
    row = row_of(quant, PlanMode.ROUTED)
    spec = layer(quant, routing=LLAMA)
    ids = torch.tensor([[1], [-1], [3]], dtype=torch.int32)
    weights = torch.tensor([[0.25], [float("nan")], [2.0]])
    batch = batch_of(row, spec, 3, ids=ids, weights=weights)
    before = batch.rows.clone()
    backend = backend_of(row, spec)
    backend.forward(batch)
    given = recording.last
    factors = torch.tensor([[0.25], [0.0], [2.0]]).bfloat16()
    scaled = batch_of(row, spec, 3, ids=ids, rows=before * factors)
    plain = layer(quant)
    backend_of(row, plain).forward(scaled)
    assert torch.equal(given["hidden_states"].float(), recording.last["hidden_states"].float())
    assert given["topk_ids"][1].tolist() == [[1.0], [0.0], [1.0]]
    assert torch.equal(batch.rows, before), "inputs are never written to"
    assert given.get("use_routing_scales_on_input") in (False, None)
