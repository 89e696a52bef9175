"""The layers that are timed, the goals and what others were measured at: data only."""

from __future__ import annotations

from dataclasses import dataclass, field

from expertd.core import (
    Activation,
    ActivationKind,
    LayerSpec,
    QuantScheme,
    RoutingMethod,
    RoutingSpec,
)

TOKENS = (1, 16, 64, 256, 1024, 4096)

OWN_ROOM_US = 15.0
"""What one token may take beyond the roof, however small the roof is."""

GOALS = {1: 1.3, 16: 1.1, 64: 1.1, 256: 1.3, 1024: 1.3, 4096: 1.8}
GOALS_FP8 = GOALS | {4096: 2.0}
"""Times of the roof that the best plan may take, for rows that are multiplied as bf16 and fp8."""


@dataclass(frozen=True)
class Shape:
    """A layer; marks are times of the roof by tokens, measured elsewhere on the same card."""

    name: str
    spec: LayerSpec
    marks: dict[str, dict[int, float]] = field(default_factory=dict, hash=False)

    @property
    def top_k(self) -> int:
        assert self.spec.routing is not None
        return self.spec.routing.top_k


VLLM = "vLLM 0.33, its Triton kernels without alignment and quantisation"
BEFORE = "FlashInfer CUTLASS, before the project"


def goal(tokens: int, fp8: bool, roof_us: float) -> float | None:
    """How many times the roof the best plan may take; None where no goal was set."""
    ratio = (GOALS_FP8 if fp8 else GOALS).get(tokens)
    if ratio is None or tokens != 1:
        return ratio
    return max(ratio, 1 + OWN_ROOM_US / roof_us)


def _marks(*ratios: float, tokens: tuple[int, ...] = TOKENS) -> dict[int, float]:
    return dict(zip(tokens, ratios, strict=True))


def _spec(
    experts: int,
    hidden: int,
    intermediate: int,
    quant: QuantScheme,
    routing: RoutingSpec,
    activation: Activation,
    expert_bias: bool = False,
) -> LayerSpec:
    return LayerSpec(
        hidden=hidden,
        intermediate=intermediate,
        num_experts=experts,
        expert_begin=0,
        expert_end=experts,
        activation=activation,
        quant=quant,
        routing=routing,
        expert_bias=expert_bias,
    )


_SWIGLU = Activation(ActivationKind.SWIGLU)

SHAPES = (
    Shape(
        "DeepSeek-V3",
        _spec(
            256,
            7168,
            2048,
            QuantScheme.FP8_BLOCK128,
            RoutingSpec(
                RoutingMethod.DEEPSEEK_V3,
                "sigmoid",
                top_k=8,
                n_group=8,
                topk_group=4,
                routed_scaling_factor=2.5,
                bias=True,
            ),
            _SWIGLU,
        ),
        {
            VLLM: _marks(1.27, 0.97, 0.96, 1.10, 1.19, 2.57),
            BEFORE: _marks(2.14, 1.05, 1.01, 1.27, 1.47, 2.58),
        },
    ),
    Shape(
        "MiniMax-M2",
        _spec(
            256,
            3072,
            1536,
            QuantScheme.FP8_BLOCK128,
            RoutingSpec(RoutingMethod.MINIMAX2, "sigmoid", top_k=8, bias=True, eps=0.0),
            _SWIGLU,
        ),
        {
            VLLM: _marks(1.85, 1.03, 0.99, 1.18, 1.33, 2.79),
            BEFORE: _marks(4.23, 1.14, 1.08, 1.36, 1.65, 3.06),
        },
    ),
    Shape(
        "Qwen3-30B",
        _spec(
            128,
            2048,
            768,
            QuantScheme.BF16,
            RoutingSpec(RoutingMethod.RENORMALIZE_NAIVE, "softmax", top_k=8),
            _SWIGLU,
        ),
        {
            VLLM: _marks(2.24, 1.16, 1.09, 1.18, 1.46, 2.23),
            BEFORE: _marks(5.83, 9.20, tokens=(1024, 4096)),
            "torch grouped_mm pipeline, before the project": _marks(3.0, 4.5, tokens=(1024, 4096)),
        },
    ),
    Shape(
        "gpt-oss-120b",
        _spec(
            128,
            2880,
            2880,
            QuantScheme.MXFP4,
            RoutingSpec(RoutingMethod.RENORMALIZE, "softmax", top_k=4),
            Activation(ActivationKind.SWIGLU_OAI, alpha=1.702, beta=1.0, limit=7.0),
            expert_bias=True,
        ),
    ),
    Shape(
        "Nemotron-3-Nano",
        _spec(
            128,
            2688,
            1856,
            QuantScheme.FP8_TENSOR,
            RoutingSpec(
                RoutingMethod.DEEPSEEK_V3,
                "sigmoid",
                top_k=6,
                n_group=1,
                topk_group=1,
                routed_scaling_factor=2.5,
                bias=True,
            ),
            Activation(ActivationKind.RELU2),
        ),
    ),
)
