"""transformers' own tiny random models, saved as it saves them: they say what lies where."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 32, 8, 2
SMALL = {
    "dense_intermediate_size": 48,
    "head_dim": 16,
    "hidden_size": HIDDEN,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "intermediate_size": 48,
    "kv_lora_rank": 32,
    "max_position_embeddings": 128,
    "moe_num_experts": EXPERTS,
    "moe_topk": TOP_K,
    "n_routed_experts": EXPERTS,
    "num_attention_heads": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "pad_token_id": 0,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "v_head_dim": 16,
    "vocab_size": 128,
}
"""Set wherever a config class has the field, unless a model's settings say LEFT_OUT."""

LEFT_OUT = object()


@dataclass(frozen=True)
class Model:
    """A model type of transformers; width: the config's name for an expert's width.

    architecture: the class within its module, where AutoModelForCausalLM knows none.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    width: str = "moe_intermediate_size"
    architecture: str | None = None

    def __str__(self) -> str:
        return self.model_type

    def config(self) -> PreTrainedConfig:
        parent = CONFIG_MAPPING[self.model_type]()
        kind = type(parent.get_text_config())
        fields = kind().to_dict()
        known = {key: value for key, value in SMALL.items() if key in fields}
        settings = known | {self.width: WIDTH} | self.settings
        return kind(**{key: value for key, value in settings.items() if value is not LEFT_OUT})

    def build(self, seed: int) -> nn.Module:
        """The model with every parameter and buffer of its MoE layers drawn anew."""
        torch.manual_seed(seed)
        config = self.config()
        if self.architecture is None:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(config)
        else:
            name = f"transformers.models.{self.model_type}.modeling_{self.model_type}"
            model = getattr(importlib.import_module(name), self.architecture)(config)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "experts" in name or "bias" in name and tensor.is_floating_point():
                    tensor.normal_(std=0.3)
        return model


def save(model: nn.Module, out: Path, **options: Any) -> Path:
    model.save_pretrained(out, **options)
    return out


def experts_of(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The stacked experts of each MoE layer, by the layer's number."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "down_proj", None), nn.Parameter):
            yield int(name.split("layers.")[1].split(".")[0]), module


SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}

MODELS = (
    Model("afmoe"),
    Model("aria", width="intermediate_size", architecture="AriaTextForCausalLM"),
    Model("axk1"),
    Model("axk2"),
    Model("bailing_hybrid"),
    Model("beam", SPARSE),
    Model("cohere2_moe", width="intermediate_size"),
    Model("deepseek_ocr2", SPARSE, architecture="DeepseekOcr2TextModel"),
    Model("deepseek_v2"),
    Model("deepseek_v3", {"first_k_dense_replace": 1}),
    Model("deepseek_v32", {"first_k_dense_replace": 1}),
    Model("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe", "moe"]}),
    Model("dots1", {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    Model("dots3_note", SPARSE | {"num_key_value_heads": 4}, architecture="Dots3NoteTextModel"),
    Model("ernie4_5_moe"),
    Model("exaone_moe"),
    Model("flex_olmo", width="intermediate_size"),
    Model("flint"),
    Model(
        "gemma4", {"enable_moe_block": True, "head_dim": LEFT_OUT}, architecture="Gemma4ForCausalLM"
    ),
    Model("glm4_moe", {"first_k_dense_replace": 1}),
    Model("glm4_moe_lite"),
    Model("glm4v_moe", {"first_k_dense_replace": 1}, architecture="Glm4vMoeTextModel"),
    Model(
        "glm5_next",
        SPARSE | {"num_key_value_heads": 4, "qk_rope_head_dim": 0},
        architecture="Glm5NextTextModel",
    ),
    Model("glm_moe_dsa", SPARSE),
    Model("gpt_oss", width="intermediate_size"),
    Model("granitemoe", width="intermediate_size"),
    Model("granitemoe_swa", width="intermediate_size"),
    Model("granitemoehybrid", width="intermediate_size"),
    Model("granitemoeshared", width="intermediate_size"),
    Model("hunyuan_v1_moe", width="intermediate_size"),
    Model("hy_v3"),
    Model("hy_v4"),
    Model("jamba", width="intermediate_size"),
    Model("kimi_linear"),
    Model("kolibri1"),
    Model("laguna"),
    Model(
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    ),
    Model("llama4", width="intermediate_size", architecture="Llama4ForCausalLM"),
    Model("mellum"),
    Model("mimo_v2_flash"),
    Model("minimax", width="intermediate_size"),
    Model("minimax_m2", width="intermediate_size"),
    Model("minimax_m3_vl", width="intermediate_size", architecture="MiniMaxM3VLForCausalLM"),
    Model("mistral4", {"first_k_dense_replace": 1}, architecture="Mistral4ForCausalLM"),
    Model("mistral_large4", {}, architecture="MistralLarge4TextModel"),
    Model("mixtral", width="intermediate_size"),
    Model("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention"]}),
    Model("olmoe", width="intermediate_size"),
    Model(
        "openai_privacy_filter", width="intermediate_size", architecture="OpenAIPrivacyFilterModel"
    ),
    Model("phimoe", width="intermediate_size"),
    Model("qwen2_moe"),
    Model("qwen3_5_moe", architecture="Qwen3_5MoeForCausalLM"),
    Model("qwen3_moe"),
    Model("qwen3_next"),
    Model("qwen3_omni_moe", architecture="Qwen3OmniMoeThinkerTextModel"),
    Model("qwen3_vl_moe", architecture="Qwen3VLMoeTextModel"),
    Model("qwen4_exp", architecture="Qwen4ExpForCausalLM"),
    Model("solar_open"),
    Model(
        "step3p7",
        SPARSE | {"swiglu_limits": [None, None, 0.5]},
        architecture="Step3p7TextModel",
    ),
    Model("unlimited_ocr", architecture="UnlimitedOcrTextModel"),
)
