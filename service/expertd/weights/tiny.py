"""Tiny random models of every family that transformers has; needs transformers to build one."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

LEFT_OUT = object()
"""A setting that a config class has but must not be given."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all tiny models have in common."""

    hidden: int
    width: int
    experts: int
    top_k: int

    def settings(self) -> dict[str, Any]:
        """Every name under which a config class may want them, and small values for the rest."""
        experts = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")
        chosen = ("moe_topk", "num_experts_per_tok", "num_experts_per_token", "top_k_experts")
        widths = ("shared_expert_intermediate_size", "shared_intermediate_size")
        return {
            **dict.fromkeys(experts, self.experts),
            **dict.fromkeys(chosen, self.top_k),
            **dict.fromkeys(widths, self.width),
            **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
            **dict.fromkeys(("index_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
            "dense_intermediate_size": 48,
            "head_dim": self.hidden // 4,
            "hidden_size": self.hidden,
            "index_n_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
            **dict.fromkeys(("n_group", "num_expert_group"), 4),
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "topk_group": 2,
            "v_head_dim": 16,
            "vocab_size": 128,
        }


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model type; width: the config's name for an expert's width.

    architecture: the class within its module, where AutoModelForCausalLM knows none; the module is
    called like the model type, or like `package`.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    width: str = "moe_intermediate_size"
    architecture: str | None = None
    package: str | None = None

    def __str__(self) -> str:
        return self.model_type

    def config(self, sizes: Sizes) -> Any:
        """A config of transformers: the sizes wherever its class has such a field."""
        from transformers import CONFIG_MAPPING

        kind = type(CONFIG_MAPPING[self.model_type]().get_text_config())
        fields = kind().to_dict()
        known = {key: value for key, value in sizes.settings().items() if key in fields}
        settings = known | {self.width: sizes.width} | self.settings
        return kind(**{key: value for key, value in settings.items() if value is not LEFT_OUT})

    def build(self, sizes: Sizes, seed: int) -> nn.Module:
        """The model, its experts and biases drawn so that each of them counts."""
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(seed)
            model = self._model(self.config(sizes))
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "experts" in name or "bias" in name and tensor.is_floating_point():
                    tensor.normal_(std=1 / sqrt(tensor.shape[-1]))
                if name.endswith("tid2eid"):
                    tensor.copy_(_distinct(len(tensor), sizes))
        return model

    def _model(self, config: Any) -> nn.Module:
        if self.architecture is None:
            from transformers import AutoModelForCausalLM

            model: nn.Module = AutoModelForCausalLM.from_config(config)
            return model
        package = self.package or self.model_type
        name = f"transformers.models.{package}.modeling_{package}"
        built: nn.Module = getattr(importlib.import_module(name), self.architecture)(config)
        return built


def _distinct(tokens: int, sizes: Sizes) -> Tensor:
    """For each token top_k different experts [tokens, K]."""
    return torch.rand(tokens, sizes.experts).argsort(1)[:, : sizes.top_k]


SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}

TINY = (
    Tiny("afmoe"),
    Tiny("aria", width="intermediate_size", architecture="AriaTextForCausalLM"),
    Tiny("axk1"),
    Tiny("axk2"),
    Tiny("bailing_hybrid"),
    Tiny("beam", SPARSE),
    Tiny("cohere2_moe", width="intermediate_size"),
    Tiny("deepseek_ocr2", SPARSE, architecture="DeepseekOcr2TextModel"),
    Tiny("deepseek_v2"),
    Tiny("deepseek_v3", {"first_k_dense_replace": 1}),
    Tiny("deepseek_v32", {"first_k_dense_replace": 1}),
    Tiny("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe", "moe"]}),
    Tiny("dots1", {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    Tiny("dots3_note", SPARSE | {"num_key_value_heads": 4}, architecture="Dots3NoteTextModel"),
    Tiny("ernie4_5_moe"),
    Tiny("exaone_moe"),
    Tiny("flex_olmo", width="intermediate_size"),
    Tiny("flint"),
    Tiny(
        "gemma4",
        {"enable_moe_block": True, "head_dim": LEFT_OUT, "vocab_size_per_layer_input": 128},
        architecture="Gemma4ForCausalLM",
    ),
    Tiny("glm4_moe", {"first_k_dense_replace": 1}),
    Tiny("glm4_moe_lite"),
    Tiny("glm4v_moe", {"first_k_dense_replace": 1}, architecture="Glm4vMoeTextModel"),
    Tiny(
        "glm5_next",
        SPARSE | {"num_key_value_heads": 4, "qk_rope_head_dim": 0},
        architecture="Glm5NextTextModel",
    ),
    Tiny("glm_moe_dsa", SPARSE),
    Tiny("gpt_oss", width="intermediate_size"),
    Tiny("granitemoe", width="intermediate_size"),
    Tiny("granitemoe_swa", width="intermediate_size"),
    Tiny("granitemoehybrid", width="intermediate_size"),
    Tiny("granitemoeshared", width="intermediate_size"),
    Tiny("hunyuan_v1_moe", width="intermediate_size"),
    Tiny("hy_v3"),
    Tiny("hy_v4"),
    Tiny("inkling_mm_model", architecture="InklingForCausalLM", package="inkling"),
    Tiny("jamba", width="intermediate_size"),
    Tiny("kimi_linear"),
    Tiny("kolibri1"),
    Tiny("laguna"),
    Tiny(
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    ),
    Tiny("llama4", width="intermediate_size", architecture="Llama4ForCausalLM"),
    Tiny("mellum"),
    Tiny("mimo_v2_flash"),
    Tiny("minimax", width="intermediate_size"),
    Tiny("minimax_m2", width="intermediate_size"),
    Tiny("minimax_m3_vl", width="intermediate_size", architecture="MiniMaxM3VLForCausalLM"),
    Tiny("mistral4", {"first_k_dense_replace": 1}, architecture="Mistral4ForCausalLM"),
    Tiny("mistral_large4", {}, architecture="MistralLarge4TextModel"),
    Tiny("mixtral", width="intermediate_size"),
    Tiny("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention"]}),
    Tiny("olmoe", width="intermediate_size"),
    Tiny(
        "openai_privacy_filter", width="intermediate_size", architecture="OpenAIPrivacyFilterModel"
    ),
    Tiny("phimoe", width="intermediate_size"),
    Tiny("qwen2_moe"),
    Tiny("qwen3_5_moe", architecture="Qwen3_5MoeForCausalLM"),
    Tiny("qwen3_moe"),
    Tiny("qwen3_next"),
    Tiny("qwen3_omni_moe", architecture="Qwen3OmniMoeThinkerTextModel"),
    Tiny("qwen3_vl_moe", architecture="Qwen3VLMoeTextModel"),
    Tiny("qwen4_exp", architecture="Qwen4ExpForCausalLM"),
    Tiny("solar_open"),
    Tiny(
        "step3p7",
        SPARSE | {"swiglu_limits": [None, None, 0.5]},
        architecture="Step3p7TextModel",
    ),
    Tiny("unlimited_ocr", architecture="UnlimitedOcrTextModel"),
)
