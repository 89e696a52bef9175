"""Every refusal that needs no look at a value, by error and by words; and what is let in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.strategies import layer_spec, wire_call

from expertd.core import CallForm, RoutingForm
from expertd.engine.admission import admit
from expertd.engine.loader import identity_spec
from expertd.errors import (
    ExpertdError,
    ExpertsNotHeld,
    FailedPrecondition,
    InvalidArgument,
    TooLarge,
)

SPEC = layer_spec(hidden=256)
T, H, E, K = 3, SPEC.hidden, SPEC.num_experts, 2
ROWS = torch.zeros(T, H)
FP8 = torch.zeros(T, H).to(torch.float8_e4m3fn)
LOGITS = torch.zeros(T, E)
IDS = torch.zeros(T, K, dtype=torch.int32)
WEIGHTS = torch.zeros(T, K)
SCALE = torch.ones(T, H // 128)
E8M0 = torch.full((T, H // 32), 127, dtype=torch.uint8)

good: dict[str, Any] = {"hidden_states": ROWS, "router_logits": LOGITS}
topk: dict[str, Any] = {"hidden_states": ROWS, "topk_ids": IDS, "topk_weights": WEIGHTS}
fp8: dict[str, Any] = good | {
    "hidden_states": FP8,
    "hidden_states_format": "fp8_group128",
    "hidden_states_scale": SCALE,
}
mx: dict[str, Any] = fp8 | {"hidden_states_format": "mxfp8", "hidden_states_scale": E8M0}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": (good | {"hidden_states": None}, "hidden_states is missing"),
    "rank 1": (good | {"hidden_states": torch.zeros(H)}, r"hidden_states: shape \[256\]"),
    "rank 3": (good | {"hidden_states": torch.zeros(T, 1, H)}, r"\[tokens, 256\] accepted"),
    "width": (good | {"hidden_states": torch.zeros(T, H - 1)}, r"shape \[3, 255\] given"),
    "int rows": (good | {"hidden_states": ROWS.int()}, "'int32' given; accepted: bfloat16"),
    "fp8 without format": (good | {"hidden_states": FP8}, "need hidden_states_format"),
    "bits without format": (
        good | {"hidden_states": FP8.view(torch.uint8)},
        r"fp8_group128, mxfp8\) and hidden_states_scale",
    ),
    "scale without format": (good | {"hidden_states_scale": SCALE}, "without hidden_states_format"),
    "unknown format": (
        fp8 | {"hidden_states_format": "fp9"},
        "'fp9' given; accepted: fp8_group128",
    ),
    "format of plain rows": (fp8 | {"hidden_states": ROWS}, "dtype of fp8 rows 'float32' given"),
    "no scale": (fp8 | {"hidden_states_scale": None}, "hidden_states_scale is missing"),
    "scale shape": (
        fp8 | {"hidden_states_scale": SCALE[:, :1]},
        r"hidden_states_scale: shape \[3, 1\] given, \[3, 2\] accepted",
    ),
    "scale dtype": (fp8 | {"hidden_states_scale": SCALE.half()}, "'float16' given"),
    "mx scale shape": (mx | {"hidden_states_scale": E8M0[:, :2]}, r"\[3, 8\] accepted"),
    "mx scale dtype": (mx | {"hidden_states_scale": E8M0.float()}, "accepted: uint8"),
    "no routing": ({"hidden_states": ROWS}, "send router_logits, or topk_ids with topk_weights"),
    "both forms": (good | topk, "send one form"),
    "logits and ids": (good | {"topk_ids": IDS}, "send one form"),
    "logits rows": (good | {"router_logits": LOGITS[:2]}, r"\[2, 6\] given, \[3, 6\] accepted"),
    "logits width": (good | {"router_logits": LOGITS[:, :5]}, r"router_logits: shape \[3, 5\]"),
    "logits dtype": (good | {"router_logits": LOGITS.int()}, "router_logits: dtype 'int32'"),
    "ids alone": (topk | {"topk_weights": None}, "topk_weights is missing"),
    "weights alone": (topk | {"topk_ids": None}, "topk_ids is missing"),
    "ids rank": (topk | {"topk_ids": IDS[:, 0]}, r"topk_ids: shape \[3\] given"),
    "ids rows": (topk | {"topk_ids": IDS[:1]}, r"\[3, 1..6\] accepted"),
    "K is 0": (topk | {"topk_ids": IDS[:, :0], "topk_weights": WEIGHTS[:, :0]}, r"shape \[3, 0\]"),
    "K over E": (topk | {"topk_ids": IDS.repeat(1, 4)}, r"shape \[3, 8\] given"),
    "weights shape": (topk | {"topk_weights": WEIGHTS[:, :1]}, r"topk_weights: shape \[3, 1\]"),
    "ids dtype": (topk | {"topk_ids": IDS.float()}, "topk_ids: dtype 'float32'"),
    "weights dtype": (topk | {"topk_weights": WEIGHTS.half()}, "topk_weights: dtype 'float16'"),
    "reply dtype": (good | {"reply_dtype": "int32"}, "reply_dtype 'int32' given"),
    "reply fp8": (good | {"reply_dtype": "float8_e4m3fn"}, "accepted: bfloat16, float16, float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, words = REFUSED[case]
    with pytest.raises(InvalidArgument, match=words):
        admit(SPEC, wire_call(**fields), 100)


def test_too_many_rows_name_the_flag() -> None:
    assert admit(SPEC, wire_call(**good), T)
    with pytest.raises(TooLarge, match="3 rows given, at most 2 .*--max-call-tokens"):
        admit(SPEC, wire_call(**good), T - 1)


def test_fp8_rows_need_a_width_of_whole_groups() -> None:
    spec = layer_spec(hidden=160)
    rows = torch.zeros(T, 160).to(torch.float8_e4m3fn)
    call = wire_call(**fp8 | {"hidden_states": rows})
    with pytest.raises(
        InvalidArgument, match="multiple of 128; this layer's is 160: send bfloat16"
    ):
        admit(spec, call, 100)
    scale = torch.full((T, 5), 127, dtype=torch.uint8)
    assert admit(spec, wire_call(**mx | {"hidden_states": rows, "hidden_states_scale": scale}), 100)


def test_logits_on_a_part_of_the_experts_need_partial() -> None:
    part = replace(SPEC, expert_begin=2, expert_end=4)
    with pytest.raises(ExpertsNotHeld, match="experts 2-3 of 6 are held.*set partial"):
        admit(part, wire_call(**good), 100)
    assert admit(part, wire_call(**good, partial=True), 100).reply_dtype == "float32"
    assert admit(part, wire_call(**topk), 100).reply_dtype == "float32"


@pytest.mark.parametrize("why", [None, "chosen by token id; send topk_ids"])
def test_a_layer_that_cannot_route_says_what_works(why: str | None) -> None:
    spec = replace(SPEC, routing=None, routing_refusal=why)
    with pytest.raises(FailedPrecondition, match=why or "send topk_ids"):
        admit(spec, wire_call(**good), 100)
    assert admit(spec, wire_call(**topk), 100)


def test_the_form_holds_all_that_decides_a_plan_and_a_batch() -> None:
    call = wire_call(
        hidden_states=ROWS.bfloat16(),
        topk_ids=IDS.long(),
        topk_weights=WEIGHTS.bfloat16(),
        partial=True,
        backend="reference",
        reply_dtype="float16",
    )
    assert admit(SPEC, call, 100) == CallForm(
        routing=RoutingForm.TOPK,
        rows_dtype="bfloat16",
        ids_dtype="int64",
        weights_dtype="bfloat16",
        top_k=K,
        partial=True,
        backend="reference",
        reply_dtype="float16",
    )


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        (good, "float32"),
        (good | {"hidden_states": ROWS.half()}, "float16"),
        (good | {"hidden_states": ROWS.bfloat16()}, "bfloat16"),
        (good | {"hidden_states": ROWS.bfloat16(), "partial": True}, "float32"),
        (fp8, "bfloat16"),
        (mx | {"hidden_states": FP8.view(torch.uint8)}, "bfloat16"),
        (fp8 | {"partial": True}, "float32"),
        (good | {"partial": True, "reply_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_reply_dtype(fields: dict[str, Any], dtype: str) -> None:
    assert admit(SPEC, wire_call(**fields), 100).reply_dtype == dtype


def test_a_pin_of_the_call_wins_over_the_servers() -> None:
    assert admit(SPEC, wire_call(**good), 100, "grouped").backend == "grouped"
    assert admit(SPEC, wire_call(**good, backend="x"), 100, "grouped").backend == "x"


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("ids", [None, torch.tensor(1), torch.zeros(5, 9, dtype=torch.int32)])
def test_the_identity_layer_takes_any_routing_tensors(
    tokens: int, ids: torch.Tensor | None
) -> None:
    call = wire_call(hidden_states=torch.zeros(tokens, 8), topk_ids=ids)
    assert admit(identity_spec(8), call, 100).rows_dtype == "float32"


def test_a_refusal_is_one_of_ours() -> None:
    for fields, _ in REFUSED.values():
        with pytest.raises(ExpertdError) as caught:
            admit(SPEC, wire_call(**fields), 100)
        assert caught.value.wire.http == 400
