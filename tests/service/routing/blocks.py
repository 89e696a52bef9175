"""transformers' own MoE blocks, tiny and random: the authority for what a family's router does."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 32, 4, 64
SMALL = {
    "hidden_size": HIDDEN,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "share_expert_dim": 8,
    "shared_intermediate_size": 8,
    "dense_intermediate_size": 8,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "vocab_size": 32,
}
"""Set wherever a config has the field."""


@dataclass(frozen=True)
class Case:
    """A block of transformers and the method that the design's table has for its settings.

    output_factor: what the block multiplies the experts' sum by, apart from the routed scale.
    output_normed: it normalises that sum, so that only what the experts were given compares.
    """

    model: str
    block: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    args: tuple[int, ...] = ()
    scores_in_model_dtype: bool = False
    gate_in_fp32: bool = False
    output_factor: float = 1.0
    output_normed: bool = False

    def __str__(self) -> str:
        told = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.model}({told})"

    def config(self) -> PreTrainedConfig:
        parent = CONFIG_MAPPING[self.model]()
        config = parent.get_text_config()
        for key, value in {**SMALL, **self.settings}.items():
            if hasattr(config, key):
                setattr(config, key, value)
            else:
                assert key not in self.settings, f"{self.model} has no {key}"
        return config


class ExpertsSeen(nn.Module):
    """Stands for a block's experts: each answers a row of its own; remembers what it was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.answers = torch.randn(EXPERTS, HIDDEN, dtype=dtype)

    def forward(self, rows_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        self.ids, self.weights = ids_TK, weights_TK
        return weighted(self.answers, ids_TK, weights_TK).to(rows_TH.dtype)


def weighted(answers_EH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return torch.einsum("tk,tkh->th", weights_TK.float(), answers_EH[ids_TK.long()].float())


@dataclass(frozen=True)
class Seen:
    """What a block computed for random rows."""

    config: PreTrainedConfig
    logits: Tensor
    bias: Tensor | None
    ids: Tensor
    weights: Tensor
    output: Tensor
    answers: Tensor


def run(case: Case, seed: int, dtype: torch.dtype, near: float | None = None) -> Seen:
    """Run the block once, its shared experts silenced; near: all logits are about that."""
    torch.manual_seed(seed)
    config = case.config()
    module = importlib.import_module(f"transformers.models.{case.model}.modeling_{case.model}")
    block = getattr(module, case.block)(config, *case.args).to(dtype)
    if case.gate_in_fp32:
        block.gate.float()
    block.experts = experts = ExpertsSeen(dtype)
    bias = None
    with torch.no_grad():
        for name, value in [*block.named_parameters(), *block.named_buffers()]:
            value.copy_(torch.zeros_like(value) if "shared" in name else torch.randn(value.shape))
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                value.mul_(0.3)
                bias = value
        rows = torch.randn(1, TOKENS, HIDDEN, dtype=dtype) * 0.5
        if near is not None:
            rows = rows * 0.02 + 1.0
            _gate_weight(block).mul_(0.3).add_(near / HIDDEN)
        logits: list[Tensor] = []
        for child in block.modules():
            if type(child).__name__.endswith(("Router", "Gate")):
                child.register_forward_hook(lambda _m, _i, out: logits.append(_logits(out)))
        output = block(rows)
    output = output[0] if isinstance(output, tuple) else output
    return Seen(
        config=config,
        logits=logits[0],
        bias=None if bias is None else bias.detach().float().flatten(),
        ids=experts.ids,
        weights=experts.weights,
        output=output.reshape(-1, HIDDEN),
        answers=experts.answers,
    )


def _gate_weight(block: nn.Module) -> Tensor:
    shape = (EXPERTS, HIDDEN)
    return next(
        p
        for name, p in block.named_parameters()
        if p.shape == shape and name.startswith(("gate.", "router."))
    )


def _logits(output: tuple[Tensor, ...]) -> Tensor:
    return next(part.detach() for part in output if part.shape[-1] == EXPERTS)


GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
DOTS = {"n_shared_experts": 1}
ONE_GROUP = {"routed_scaling_factor": 2.5}

CASES = (
    Case("qwen3_moe", "Qwen3MoeSparseMoeBlock", "RenormalizeNaive", {"norm_topk_prob": True}),
    Case("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Default", {"norm_topk_prob": False}),
    Case("qwen3_next", "Qwen3NextSparseMoeBlock", "RenormalizeNaive"),
    Case("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", "RenormalizeNaive"),
    Case("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", "RenormalizeNaive"),
    Case("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock", "RenormalizeNaive"),
    Case("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Default"),
    Case("qwen2_moe", "Qwen2MoeSparseMoeBlock", "RenormalizeNaive", {"norm_topk_prob": True}),
    Case("qwen4_exp", "Qwen4ExpTextSparseMoeBlock", "RenormalizeNaive"),
    Case("olmoe", "OlmoeSparseMoeBlock", "Default"),
    Case("olmoe", "OlmoeSparseMoeBlock", "RenormalizeNaive", {"norm_topk_prob": True}),
    Case("flex_olmo", "FlexOlmoSparseMoeBlock", "Default"),
    Case("mellum", "MellumSparseMoeBlock", "RenormalizeNaive"),
    Case("mixtral", "MixtralSparseMoeBlock", "RenormalizeNaive"),
    Case("minimax", "MiniMaxSparseMoeBlock", "RenormalizeNaive"),
    Case("hunyuan_v1_moe", "HunYuanMoEV1Moe", "RenormalizeNaive"),
    Case("jamba", "JambaSparseMoeBlock", "Default"),
    Case("granitemoe", "GraniteMoeMoE", "Renormalize"),
    Case("granitemoehybrid", "GraniteMoeHybridMoE", "Renormalize"),
    Case("granitemoeshared", "GraniteMoeSharedMoE", "Renormalize"),
    Case("granitemoe_swa", "GraniteMoeSWAMoE", "Renormalize"),
    Case("gpt_oss", "GptOssMLP", "Renormalize"),
    Case("aria", "AriaTextMoELayer", "Renormalize"),
    Case(
        "openai_privacy_filter", "OpenAIPrivacyFilterMLP", "Renormalize", output_factor=float(TOP_K)
    ),
    Case("cohere2_moe", "Cohere2MoeSparseMoeBlock", "Renormalize", {"norm_topk_prob": True}),
    Case("cohere2_moe", "Cohere2MoeSparseMoeBlock", "Renormalize", {"norm_topk_prob": False}),
    Case(
        "cohere2_moe",
        "Cohere2MoeSparseMoeBlock",
        "SigmoidRenorm",
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
        scores_in_model_dtype=True,
    ),
    Case(
        "cohere2_moe",
        "Cohere2MoeSparseMoeBlock",
        "TopKSigmoid",
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    ),
    Case("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", "SoftmaxBias"),
    Case(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeSparseMoeBlock",
        "SoftmaxBias",
        {"moe_intermediate_size": [8, 8]},
        args=(8,),
    ),
    Case("deepseek_v2", "DeepseekV2Moe", "Default", {"routed_scaling_factor": 16.0}),
    Case(
        "deepseek_v2",
        "DeepseekV2Moe",
        "GroupedSoftmax",
        {"topk_method": "group_limited_greedy", **GROUPS},
    ),
    Case("deepseek_ocr2", "DeepseekOcr2TextMoe", "Default"),
    Case("unlimited_ocr", "UnlimitedOcrTextMoe", "Default"),
    Case("mistral4", "Mistral4MoE", "RenormalizeNaive", ONE_GROUP, scores_in_model_dtype=True),
    Case("mistral4", "Mistral4MoE", "GroupedSoftmax", GROUPS, scores_in_model_dtype=True),
    Case("mistral_large4", "MistralLarge4TextMoE", "GroupedSoftmax", GROUPS),
    Case("deepseek_v3", "DeepseekV3MoE", "DeepSeekV3", GROUPS),
    Case("deepseek_v3", "DeepseekV3MoE", "DeepSeekV3", {**GROUPS, "norm_topk_prob": False}),
    Case("deepseek_v32", "DeepseekV32MoE", "DeepSeekV3", GROUPS),
    Case("kimi_linear", "KimiLinearMoE", "DeepSeekV3", GROUPS),
    Case("kimi_linear", "KimiLinearMoE", "DeepSeekV3", ONE_GROUP),
    Case("bailing_hybrid", "BailingHybridMoE", "DeepSeekV3", GROUPS),
    Case("dots1", "Dots1MoE", "DeepSeekV3", {"norm_topk_prob": True, **DOTS, **ONE_GROUP}),
    Case("dots1", "Dots1MoE", "DeepSeekV3", {"norm_topk_prob": False, **DOTS}),
    Case("dots3_note", "Dots3NoteTextMoE", "DeepSeekV3"),
    Case("glm4_moe", "Glm4MoeMoE", "DeepSeekV3", ONE_GROUP),
    Case("glm4_moe_lite", "Glm4MoeLiteMoE", "DeepSeekV3"),
    Case("glm4v_moe", "Glm4vMoeTextMoE", "DeepSeekV3"),
    Case("glm_moe_dsa", "GlmMoeDsaMoE", "DeepSeekV3"),
    Case("glm5_next", "Glm5NextTextMoE", "DeepSeekV3"),
    Case("nemotron_h", "NemotronHMoE", "DeepSeekV3", ONE_GROUP),
    Case("mimo_v2_flash", "MiMoV2FlashMoE", "DeepSeekV3"),
    Case("solar_open", "SolarOpenMoE", "DeepSeekV3"),
    Case("exaone_moe", "ExaoneMoeSparseMoEBlock", "DeepSeekV3"),
    Case("hy_v4", "HYV4MoE", "DeepSeekV3"),
    Case("axk1", "AXK1MoE", "DeepSeekV3", GROUPS, output_normed=True),
    Case("axk2", "AXK2MoE", "MiniMax2"),
    Case("axk2", "AXK2MoE", "DeepSeekV3", GROUPS),
    Case("beam", "BeamMoE", "DeepSeekV3", GROUPS),
    Case(
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        "DeepSeekV4",
        args=(-1,),
        scores_in_model_dtype=True,
    ),
    Case("inkling2", "Inkling2SparseMoeBlock", "MiniMax2", gate_in_fp32=True),
    Case("minimax_m2", "MiniMaxM2SparseMoeBlock", "MiniMax2"),
    Case("minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock", "MiniMax2"),
    Case("step3p7", "Step3p7SparseMoeBlock", "MiniMax2", {"moe_router_scaling_factor": 3.0}, (0,)),
    Case("afmoe", "AfmoeSparseMoeBlock", "MiniMax2", {"route_scale": 2.826}),
    Case("hy_v3", "HYV3MoE", "MiniMax2"),
    Case("laguna", "LagunaSparseMoeBlock", "MiniMax2", {"moe_routed_scaling_factor": 2.5}),
    Case(
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        "MiniMax2",
        {"routed_scaling_factor": 2.0},
        scores_in_model_dtype=True,
    ),
    Case(
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        "DeepSeekV3",
        {"norm_topk_prob": False},
        scores_in_model_dtype=True,
    ),
    Case(
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        "SigmoidRenorm",
        {"use_expert_bias": False},
        scores_in_model_dtype=True,
    ),
    Case("flint", "FlintSparseMoeBlock", "SigmoidRenorm"),
)
