"""Every entry, routed and monolithic: native layouts in, the plain fp32 answer out."""

from __future__ import annotations

import inspect
from typing import Any

import flashinfer.fused_moe
import flashinfer.tllm_enums
import pytest
import torch
from tests.service.twins import plain
from tests.service.twins.calls import call, native_arguments, packed, pairs
from tests.service.twins.native import EXPERTS, FORMATS, TOKENS, Native
from tests.twins.enums import RoutingMethodType
from tests.twins.sizes import ACTIVATIONS
from tests.twins.trtllm import ENUMS, library
from torch import Tensor

LIBRARY = library()
ENTRIES = [name for name in vars(LIBRARY) if name.startswith("trtllm_")]
ROUTED = [(name, form) for name in FORMATS for form in ("packed", "pair")]
ROUTED = [case for case in ROUTED if case[1] == "packed" or FORMATS[case[0]](0).pair]
CELLS = {
    "deepseek": "deepseek_fp8",
    "deepseek_shuffled": "deepseek_fp8",
    "mxint4": "bf16_mxint4",
}


def topk(form: str, ids: Tensor, weights: Tensor) -> Any:
    return packed(ids, weights) if form == "packed" else (ids, weights)


@pytest.mark.parametrize("entry", ENTRIES)
def test_signatures_are_the_installed_ones(entry: str) -> None:
    real = inspect.signature(getattr(flashinfer.fused_moe, entry)).parameters
    ours = inspect.signature(getattr(LIBRARY, entry)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in real.values()
    ]


def test_every_installed_entry_is_there() -> None:
    real = {n for n in dir(flashinfer.fused_moe) if n.startswith("trtllm_") and n.endswith("_moe")}
    assert real == set(ENTRIES)


@pytest.mark.parametrize("name", ENUMS)
def test_enums_are_the_installed_ones(name: str) -> None:
    real = getattr(flashinfer.tllm_enums, name)
    assert {m.name: int(m) for m in getattr(LIBRARY, name)} == {m.name: int(m) for m in real}


def test_gated_activations_are_the_installed_ones() -> None:
    for member in LIBRARY.ActivationType:
        real = flashinfer.tllm_enums.ActivationType(int(member))
        assert member.is_gated == real.is_gated


@pytest.mark.parametrize(("name", "form"), ROUTED)
def test_routed(name: str, form: str, seed: int) -> None:
    native = FORMATS[name](seed)
    ids, weights = pairs(seed)
    got = call(native, topk_ids=topk(form, ids, weights))
    wanted = plain.output(native, ids.tolist(), weights)
    assert got.dtype == torch.bfloat16
    assert plain.error(got, wanted) < native.tolerance


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_monolithic_renormalize(name: str, dtype: torch.dtype, seed: int) -> None:
    native = FORMATS[name](seed)
    order = torch.stack([torch.randperm(EXPERTS) for _ in range(TOKENS)])
    logits = (-8 - order / 4).to(dtype)  # all negative, no ties in bf16
    ids = logits.float().topk(2, dim=1).indices
    weights = torch.softmax(logits.float().gather(1, ids), dim=1)
    got = call(native, "", routing_logits=logits)
    assert plain.error(got, plain.output(native, ids.tolist(), weights)) < native.tolerance


@pytest.mark.parametrize("name", FORMATS)
def test_every_activation_with_a_cubin(name: str, seed: int) -> None:
    for member in ACTIVATIONS[CELLS.get(name, name)]:
        native = FORMATS[name](seed, member.name)
        ids, weights = pairs(seed)
        got = call(native, topk_ids=packed(ids, weights))
        wanted = plain.output(native, ids.tolist(), weights)
        assert plain.error(got, wanted) < native.tolerance, member.name


@pytest.mark.parametrize("name", FORMATS)
def test_ranges_are_partial_sums_of_the_whole(name: str, seed: int) -> None:
    native = FORMATS[name](seed)
    ids, weights = pairs(seed)
    ids[0] = torch.tensor([0, 1])
    whole = plain.output(native, ids.tolist(), weights)
    total = torch.zeros_like(whole)
    for first, count in ((0, 3), (3, 5)):
        held = native.held(first, count)
        part = call(
            held,
            topk_ids=packed(ids, weights),
            local_expert_offset=first,
            local_num_experts=count,
        )
        local = ((ids >= first) & (ids < first + count)).any(1)
        assert not part[~local].any(), "a token without a local expert is exactly zero"
        total += part.float()
    assert plain.error(total, whole) < native.tolerance


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "fp8_per_channel"])
def test_output_is_written_in_place(name: str, seed: int) -> None:
    native = FORMATS[name](seed)
    ids, weights = pairs(seed)
    output = torch.full((TOKENS, native.fc2.shape[1]), float("nan"), dtype=torch.bfloat16)
    got = call(native, topk_ids=packed(ids, weights), output=output)
    assert got.data_ptr() == output.data_ptr()
    assert torch.equal(output, call(native, topk_ids=packed(ids, weights)))


def test_arguments_are_not_written_to(seed: int) -> None:
    for build in FORMATS.values():
        native = build(seed)
        ids, weights = pairs(seed)
        tensors = [t for t in native_arguments(native).values() if isinstance(t, Tensor)]
        before = [t.view(torch.uint8).clone() for t in tensors]
        call(native, topk_ids=packed(ids, weights))
        for tensor, copy in zip(tensors, before, strict=True):
            assert torch.equal(tensor.view(torch.uint8), copy)


def test_routed_weights_of_a_pair_keep_fp32(seed: int) -> None:
    native = FORMATS["bf16"](seed)
    ids, _ = pairs(seed)
    fine = torch.full((TOKENS, 2), 1.0 + 2**-10)
    both = [call(native, topk_ids=topk(form, ids, fine)) for form in ("pair", "packed")]
    assert not torch.equal(*both)
    assert torch.equal(both[1], call(native, topk_ids=(ids, torch.ones(TOKENS, 2))))


def test_plain_ids_as_packed_read_as_expert_zero_with_no_weight(seed: int) -> None:
    native = FORMATS["bf16"](seed)
    ids, weights = pairs(seed)
    got = call(native, topk_ids=ids.clamp(min=0))
    assert float(got.float().abs().max()) < 1e-30
    assert plain.error(got, plain.output(native, ids.tolist(), weights)) > 0.5


def test_scales_on_the_input_for_llama4(seed: int) -> None:
    native = FORMATS["fp8_per_tensor"](seed)
    logits = torch.randn(TOKENS, EXPERTS)
    arguments = {"routing_logits": logits, "routing_method_type": RoutingMethodType.Llama4}
    got = call(native, "", top_k=1, use_routing_scales_on_input=True, **arguments)
    best = logits.argmax(1)
    weights = torch.sigmoid(logits.max(1).values)
    scaled = plain.output(
        Native(**{**vars(native), "x": native.x * weights[:, None]}),
        best[:, None].tolist(),
        torch.ones(TOKENS, 1),
    )
    assert plain.error(got, scaled) < native.tolerance


def test_scales_on_the_input_lose_the_weights_per_channel(seed: int) -> None:
    native = FORMATS["fp8_per_channel"](seed)
    ids, weights = pairs(seed)
    got = call(native, topk_ids=packed(ids, weights), use_routing_scales_on_input=True)
    wanted = plain.output(native, ids.tolist(), torch.ones(TOKENS, 2))
    assert plain.error(got, wanted) < native.tolerance


def test_rows_of_nan_answer_nan_and_stay_alone(seed: int) -> None:
    for build in FORMATS.values():
        native = build(seed)
        if native.shared["hidden_states"].dtype == torch.uint8:
            continue
        ids, weights = pairs(seed)
        rows = native.shared["hidden_states"].float()
        rows[0] = float("nan")
        rows = rows.to(native.shared["hidden_states"].dtype)
        got = call(native, topk_ids=packed(ids, weights), hidden_states=rows)
        assert bool(got[0].isnan().all())
        assert not bool(got[1:].isnan().any())
