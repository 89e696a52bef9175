"""The routers of the model families, one row each; imports no torch.

Defaults are those of the family's own config class, for configs that leave a setting out.
"""

from __future__ import annotations

from dataclasses import replace

from expertd.core import RoutingMethod
from expertd.routing.family import FamilyRow, Key

NORM = Key("norm_topk_prob", default=True)
NORM_OFF = Key("norm_topk_prob", default=False)
SCALE = Key("routed_scaling_factor", default=1.0)
SELECTION = Key("expert_selection_fn", default="softmax")
TOPK_METHOD = Key("topk_method", default="greedy")
SCORING = Key("scoring_func", default="sqrtsoftplus")


def ones(*model_types: str) -> FamilyRow:
    """DeepSeek-V3's router where the config class has one group by default."""
    return FamilyRow(
        model_types=model_types,
        scoring="sigmoid",
        bias=True,
        renormalize=NORM,
        n_group=Key("n_group", "num_expert_group", default=1),
        topk_group=Key("topk_group", default=1),
        scale=SCALE,
    )


def eights(*model_types: str) -> FamilyRow:
    """DeepSeek-V3's router where it has four of eight groups and a scale of 2.5."""
    return replace(
        ones(*model_types),
        n_group=Key("n_group", "num_expert_group", default=8),
        topk_group=Key("topk_group", default=4),
        scale=Key("routed_scaling_factor", default=2.5),
    )


def scaled(row: FamilyRow, default: float) -> FamilyRow:
    return replace(row, scale=Key("routed_scaling_factor", default=default))


SIGMOID_GROUPS = (
    eights("deepseek_v3", "deepseek_v32", "axk1"),
    replace(
        eights("bailing_hybrid", "bailing_moe_v2"),
        top_k=Key("num_experts_per_token", "num_experts_per_tok"),
        renormalize=Key("moe_renormalize", "norm_topk_prob", default=True),
    ),
    replace(eights("beam"), scale_site="output"),
    scaled(ones("kimi_k2", "kimi_k25"), 2.827),
    replace(
        scaled(ones("kimi_linear"), 2.446),
        top_k=Key("num_experts_per_token", "num_experts_per_tok"),
        renormalize=Key("moe_renormalize", "norm_topk_prob", default=True),
        n_group=Key("num_expert_group", "n_group", default=1),
    ),
    ones("glm4_moe", "glm4v_moe", "nemotron_h", "mimo_v2_flash", "solar_open", "dots3_note"),
    scaled(ones("glm_moe_dsa", "glm5_next", "exaone_moe"), 2.5),
    scaled(ones("glm4_moe_lite"), 1.8),
    scaled(ones("hy_v4"), 2.827),
    replace(ones("dots1"), renormalize=NORM_OFF),
    replace(
        scaled(ones("axk2"), 2.5),
        n_group=Key("n_group"),
        topk_group=Key("topk_group"),
        group_fill=0.0,
    ),
)

SIGMOID_BIAS = (
    FamilyRow(model_types=("minimax_m2",), scoring="sigmoid", bias=True, eps=0.0),
    FamilyRow(
        model_types=("minimax_m3", "minimax_m3_vl"),
        scoring="sigmoid",
        bias=True,
        eps=0.0,
        scale=Key("routed_scaling_factor", default=2.0),
        scale_site="output",
    ),
    FamilyRow(
        model_types=("step3p5", "step3p7"),
        scoring="sigmoid",
        bias=True,
        eps=0.0,
        top_k=Key("num_experts_per_tok", "moe_top_k"),
        scale=Key("moe_router_scaling_factor", default=1.0),
        scale_site="output",
    ),
    FamilyRow(
        model_types=("afmoe",),
        scoring="sigmoid",
        bias=True,
        scale=Key("route_scale", default=1.0),
    ),
    FamilyRow(
        model_types=("hy_v3",),
        scoring="sigmoid",
        bias=True,
        scale=Key("router_scaling_factor", default=2.826),
    ),
    FamilyRow(
        model_types=("laguna",),
        when=((Key("moe_router_logit_softcapping", default=0.0), 0.0),),
        scoring="sigmoid",
        bias=True,
        eps=0.0,
        scale=Key("moe_routed_scaling_factor", default=1.0),
        scale_site="output",
    ),
    FamilyRow(
        model_types=("lfm2_moe",),
        scoring="sigmoid",
        bias=Key("use_expert_bias", default=True),
        renormalize=NORM,
        eps=1e-6,
        scale=SCALE,
    ),
    FamilyRow(
        model_types=("deepseek_v4",),
        scoring=SCORING,
        bias=True,
        scale=Key("routed_scaling_factor", default=1.5),
    ),
    FamilyRow(
        model_types=("inkling2",),
        scoring=Key("scoring_func", default="sigmoid"),
        bias=True,
        scale=Key("route_scale", default=8.0),
    ),
    FamilyRow(model_types=("flint",), scoring="sigmoid", renormalize=NORM, eps=0.0),
)

SOFTMAX = (
    FamilyRow(model_types=("qwen3_moe", "qwen2_moe", "olmoe", "flex_olmo"), renormalize=NORM_OFF),
    FamilyRow(
        model_types=("qwen3_next", "qwen3_omni_moe", "mellum", "qwen4_exp"), renormalize=NORM
    ),
    FamilyRow(model_types=("qwen3_5_moe", "qwen3_vl_moe", "mixtral", "minimax")),
    FamilyRow(model_types=("hunyuan_v1_moe",), top_k=Key("moe_topk", "num_experts_per_tok")),
    FamilyRow(model_types=("jamba",), renormalize=False),
    FamilyRow(
        model_types=("ernie4_5_moe", "ernie4_5_vl_moe"),
        top_k=Key("moe_k", "num_experts_per_tok"),
        bias=True,
        eps=Key("moe_norm_min", default=1e-12),
    ),
    FamilyRow(
        model_types=("deepseek_v2", "deepseek_ocr2", "unlimited_ocr"),
        when=((TOPK_METHOD, "greedy"),),
        renormalize=False,
        scale=SCALE,
    ),
    FamilyRow(
        model_types=("deepseek_v2", "deepseek_ocr2", "unlimited_ocr"),
        when=((TOPK_METHOD, "group_limited_greedy"),),
        method=RoutingMethod.GROUPED_SOFTMAX,
        renormalize=False,
        n_group=Key("n_group"),
        topk_group=Key("topk_group"),
        scale=SCALE,
        group_fill=0.0,
        group_score="max",
    ),
    FamilyRow(
        model_types=("mistral4", "mistral_large4"),
        renormalize=NORM,
        n_group=Key("n_group", default=1),
        topk_group=Key("topk_group", default=1),
        scale=SCALE,
        group_fill=0.0,
    ),
)

CHOSEN_ONLY = (
    FamilyRow(
        model_types=(
            "gpt_oss",
            "granitemoe",
            "granitemoehybrid",
            "granitemoeshared",
            "granitemoe_swa",
            "openai_privacy_filter",
        ),
        method=RoutingMethod.RENORMALIZE,
        top_k=Key("num_experts_per_tok", "experts_per_token"),
    ),
    FamilyRow(model_types=("aria",), method=RoutingMethod.RENORMALIZE, top_k=Key("moe_topk")),
    FamilyRow(
        model_types=("cohere2_moe",),
        when=((SELECTION, "softmax"),),
        method=RoutingMethod.RENORMALIZE,
    ),
    FamilyRow(
        model_types=("cohere2_moe",),
        when=((SELECTION, "sigmoid"), (NORM, True)),
        scoring="sigmoid",
        eps=0.0,
    ),
    # It compares logits: where sigmoids saturate, Sigmoid would choose others.
    FamilyRow(
        model_types=("cohere2_moe",),
        when=((SELECTION, "sigmoid"), (NORM, False)),
        method=RoutingMethod.TOPK_SIGMOID,
        scoring="sigmoid",
        renormalize=False,
    ),
    FamilyRow(
        model_types=("llama4",),
        method=RoutingMethod.LLAMA4,
        scoring="sigmoid",
        renormalize=False,
        weight_site="input",
    ),
)

REFUSED = (
    FamilyRow(
        model_types=("longcat_flash",),
        refusal="some of its experts are the identity, which the caller has to add",
    ),
    FamilyRow(
        model_types=("phimoe",), refusal="its sparsemixer masks logits between its two picks"
    ),
    FamilyRow(
        model_types=("gemma4", "diffusion_gemma"),
        refusal="every expert has a scale, and experts see other rows than the gate",
    ),
    FamilyRow(
        model_types=("laguna",), refusal="its logits are capped by a tanh before they are scored"
    ),
    FamilyRow(model_types=("kolibri1",), refusal="its correction bias is added to the logits"),
    FamilyRow(model_types=("inkling",), refusal="shared experts take part in its normalisation"),
    FamilyRow(model_types=("zaya",), refusal="its router carries state from layer to layer"),
    FamilyRow(
        model_types=("muse_spark",), refusal="it normalises after each expert, before it sums"
    ),
    FamilyRow(
        model_types=("dbrx", "jetmoe", "doge", "switch_transformers", "nllb-moe"),
        refusal="its router is not one of the known methods",
    ),
)

FAMILIES = SIGMOID_GROUPS + SIGMOID_BIAS + SOFTMAX + CHOSEN_ONLY + REFUSED

# What a model type ends in when it is the language part of a multimodal model.
PARTS = ("_text", "_thinker")


def rows_of(model_type: str) -> tuple[FamilyRow, ...]:
    """The rows of a model type; a language part has its model's."""
    names = {model_type, *(model_type.removesuffix(part) for part in PARTS)}
    return tuple(row for row in FAMILIES if names & set(row.model_types))


def known_types() -> tuple[str, ...]:
    """Every model type that can be routed from logits, in order."""
    return tuple(sorted({name for row in FAMILIES if not row.refusal for name in row.model_types}))
