"""Where each model family keeps its routed experts: one entry each; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertd.core import ActivationKind
from expertd.errors import FailedPrecondition
from expertd.routing.families import PARTS
from expertd.routing.family import Key
from expertd.weights.family import ActivationRule, Family, Layout


def per_expert(block: str, gate: str, up: str, down: str) -> Layout:
    """A tensor for every matrix of every expert."""
    prefix = f"{block}.{{e}}"
    return Layout(f"{prefix}.{gate}", f"{prefix}.{up}", f"{prefix}.{down}")


def fused(block: str) -> Layout:
    """All experts in a tensor, gate above up: transformers' own form."""
    gate_up = f"{block}.gate_up_proj"
    return Layout(gate_up, gate_up, f"{block}.down_proj", fused="halves", suffix="parameter")


def transposed(layout: Layout) -> Layout:
    return replace(layout, transposed=True)


def linear(first: str, second: str) -> Layout:
    """All experts in a tensor that is called like a module."""
    return Layout(first, first, second, fused="halves")


PROJ = ("gate_proj", "up_proj", "down_proj")
W132 = ("w1", "w3", "w2")
MLP = (per_expert("mlp.experts", *PROJ), fused("mlp.experts"))
# Where transformers' modules have a correction bias that releases call otherwise.
GATE_BIAS = "mlp.gate.e_score_correction_bias"
BLOCK_BIAS = "mlp.e_score_correction_bias"
BLOCK_SPARSE = (per_expert("block_sparse_moe.experts", *W132), fused("mlp.experts"))

# w13 rows that come in turns, and rules that need more than hidden_act.
INTERLEAVED = replace(fused("mlp.experts"), fused="interleaved")
W13_W2 = Layout(
    "mlp.experts.w13_weight",
    "mlp.experts.w13_weight",
    "mlp.experts.w2_weight",
    fused="interleaved",
    suffix="parameter",
)
CLAMPED = ActivationRule(ActivationKind.SWIGLU, limit=Key("swiglu_limit", default=10.0))
OAI = ActivationRule(
    ActivationKind.SWIGLU_OAI,
    alpha=Key("swiglu_alpha", default=1.702),
    beta=Key("swiglu_beta", default=1.0),
    limit=Key("swiglu_limit", default=7.0),
)
STEP = ActivationRule(ActivationKind.SWIGLU_STEP, limit=Key("swiglu_limits"))

WITHOUT_BIAS = (
    Family(
        model_types=(
            "cohere2_moe",
            "deepseek_ocr2",
            "deepseek_v2",
            "flex_olmo",
            "flint",
            "hunyuan_v1_moe",
            "mellum",
            "mistral4",
            "olmoe",
            "qwen2_moe",
            "qwen3_5_moe",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_omni_moe",
            "qwen4_exp",
            "unlimited_ocr",
        ),
        layouts=MLP,
    ),
    Family(
        model_types=("qwen3_vl_moe",),
        layouts=(*MLP, transposed(fused("mlp.experts"))),
    ),
    Family(model_types=("mixtral", "minimax", "phimoe"), layouts=BLOCK_SPARSE),
    Family(
        model_types=("jamba",),
        layouts=(per_expert("feed_forward.experts", *PROJ), fused("feed_forward.experts")),
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("granitemoe", "granitemoehybrid", "granitemoeshared"),
        layouts=(
            linear("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
            fused("block_sparse_moe.experts"),
        ),
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("granitemoe_swa",),
        layouts=(fused("block_sparse_moe.experts"),),
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("aria",),
        layouts=(
            transposed(linear("mlp.experts.fc1", "mlp.experts.fc2")),
            transposed(fused("mlp.experts")),
        ),
        experts=Key("moe_num_experts"),
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("llama4",),
        layouts=(
            transposed(fused("feed_forward.experts")),
            per_expert("feed_forward.experts", *PROJ),
        ),
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("gpt_oss",),
        layouts=(INTERLEAVED, transposed(INTERLEAVED)),
        activation=OAI,
        expert_bias=True,
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("openai_privacy_filter",),
        layouts=(transposed(fused("mlp.experts")),),
        activation=OAI,
        expert_bias=True,
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("inkling", "inkling_mm_model"),
        layouts=(W13_W2, fused("mlp.experts")),
    ),
    Family(
        model_types=("mistral_large4",),
        layouts=(per_expert("experts", *W132), fused("mlp.experts")),
    ),
    Family(
        model_types=("gemma4",),
        layouts=(fused("experts"),),
        activation=ActivationRule(act=Key("hidden_activation", default="gelu_pytorch_tanh")),
    ),
)

WITH_BIAS = (
    Family(
        model_types=(
            "axk1",
            "axk2",
            "beam",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "dots3_note",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm_moe_dsa",
            "kimi_k2",
            "kimi_k25",
            "mimo_v2_flash",
            "solar_open",
        ),
        layouts=MLP,
        correction_bias=(GATE_BIAS,),
    ),
    Family(
        model_types=("glm5_next", "hy_v4"),
        layouts=MLP,
        correction_bias=(GATE_BIAS,),
        activation=CLAMPED,
    ),
    Family(
        model_types=("afmoe", "hy_v3"), layouts=MLP, correction_bias=("mlp.expert_bias", BLOCK_BIAS)
    ),
    Family(
        model_types=("bailing_hybrid", "bailing_moe_v2"),
        layouts=MLP,
        correction_bias=("mlp.gate.expert_bias", GATE_BIAS),
    ),
    Family(
        model_types=("ernie4_5_moe",),
        layouts=MLP,
        correction_bias=(
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.gate.moe_statics.e_score_correction_bias",
        ),
    ),
    Family(
        model_types=("exaone_moe",),
        layouts=MLP,
        correction_bias=("mlp.e_score_correction_bias", GATE_BIAS),
    ),
    Family(
        model_types=("laguna",),
        layouts=MLP,
        correction_bias=("mlp.experts.e_score_correction_bias", GATE_BIAS),
    ),
    Family(
        model_types=("kolibri1",),
        layouts=MLP,
        correction_bias=("moe.router.expert_bias", GATE_BIAS),
    ),
    Family(
        model_types=("kimi_linear",),
        layouts=BLOCK_SPARSE,
        correction_bias=("block_sparse_moe.gate.e_score_correction_bias", GATE_BIAS),
    ),
    Family(
        model_types=("minimax_m2",),
        layouts=BLOCK_SPARSE,
        correction_bias=("block_sparse_moe.e_score_correction_bias", BLOCK_BIAS),
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("minimax_m3", "minimax_m3_vl"),
        layouts=BLOCK_SPARSE,
        correction_bias=("block_sparse_moe.e_score_correction_bias", GATE_BIAS),
        activation=OAI,
        width=Key("intermediate_size"),
    ),
    Family(
        model_types=("step3p5", "step3p7"),
        layouts=(
            Layout("moe.gate_proj", "moe.up_proj", "moe.down_proj"),
            per_expert("moe.experts", *PROJ),
            fused("mlp.experts"),
        ),
        correction_bias=("moe.router_bias", GATE_BIAS),
        activation=STEP,
        experts=Key("n_routed_experts", "moe_num_experts"),
    ),
    Family(
        model_types=("lfm2_moe",),
        layouts=(per_expert("feed_forward.experts", *W132), fused("feed_forward.experts")),
        correction_bias=("feed_forward.expert_bias",),
    ),
    Family(
        model_types=("nemotron_h",),
        layouts=(
            Layout("", "mixer.experts.{e}.up_proj", "mixer.experts.{e}.down_proj"),
            Layout("", "mixer.experts.up_proj", "mixer.experts.down_proj", suffix="parameter"),
        ),
        correction_bias=("mixer.gate.e_score_correction_bias",),
        activation=ActivationRule(act=Key("mlp_hidden_act", default="relu2")),
        hidden=Key("moe_latent_size", "hidden_size"),
    ),
    Family(
        model_types=("deepseek_v4",),
        layouts=(per_expert("ffn.experts", *W132), fused("mlp.experts")),
        correction_bias=("ffn.gate.bias", GATE_BIAS),
        activation=CLAMPED,
        hash_table=("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    ),
)

REFUSED = (
    Family(
        model_types=("longcat_flash",),
        refusal="some of its experts are the identity, and the checkpoint has no matrices for them",
    ),
    Family(
        model_types=("ernie4_5_vl_moe",),
        refusal="text and images have experts of their own, of different widths",
    ),
    Family(
        model_types=("diffusion_gemma",),
        refusal="its experts belong to an encoder and a decoder at once",
    ),
    Family(model_types=("inkling2",), refusal="its activation has a soft cap"),
    Family(model_types=("muse_spark",), refusal="its experts have a norm behind them"),
    Family(model_types=("zaya",), refusal="one of its experts is to skip the layer"),
    Family(
        model_types=("dbrx", "jetmoe", "doge", "switch_transformers", "nllb-moe"),
        refusal="its experts are not of the gated form",
    ),
)

FAMILIES = WITHOUT_BIAS + WITH_BIAS + REFUSED


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a language model's config.

    Raises FailedPrecondition for one that is not known or cannot be served.
    """
    model_type = str(config.get("model_type"))
    names = (model_type, *(model_type.removesuffix(part) for part in PARTS))
    family = next((_BY_TYPE[name] for name in names if name in _BY_TYPE), None)
    if family is None:
        known = ", ".join(sorted(name for name in _BY_TYPE if not _BY_TYPE[name].refusal))
        raise FailedPrecondition(f"config.json: model_type {model_type!r} is not one of {known}")
    if family.refusal:
        raise FailedPrecondition(f"config.json: model_type {model_type!r}: {family.refusal}")
    return family


_BY_TYPE = {name: family for family in FAMILIES for name in family.model_types}
