"""The cases that this project began with, each by its name: planner, backend, twin, reference.

The tables of other engines refused them or let them through to wrong numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.service.trtllm.layers import ACTIVATIONS, layer
from tests.service.trtllm.recording import Recording
from tests.service.trtllm.served import TOPK, Layer, ask, refused, served
from tests.strategies import generator
from torch import Tensor

from expertd.backends.flashinfer.library import library, stand_in
from expertd.core import ActivationKind, LayerSpec, PlanMode, QuantScheme
from expertd.core import RoutingMethod as M
from expertd.proof.cases import all_negative, near_ties, plain, saturated
from expertd.routing.declared import compare_declared, declared_routing
from expertd.routing.derive import family_routing
from expertd.routing.kernel_ids import kernel_id

pytestmark = pytest.mark.usefixtures("twin")
Q = QuantScheme
MONO, ROUTED = PlanMode.MONOLITHIC, PlanMode.ROUTED
BOTH = {MONO, ROUTED}
EXPERTS, TOKENS = 16, 21


def spec_of(quant: QuantScheme, routing: str, **settings: Any) -> LayerSpec:
    """A layer of 16 experts whose engine declares its routing."""
    fields = {"num_experts": EXPERTS, "top_k": 4, "routing": routing, **settings}
    return layer(quant, num_experts=EXPERTS, expert_end=EXPERTS, routing=declared_routing(fields))


def with_bias(size: float, seed: int = 5) -> Tensor:
    return torch.randn(EXPERTS, generator=generator(seed)) * size


def logits(make: Any = plain, seed: int = 4) -> Tensor:
    made: Tensor = make(TOKENS, EXPERTS, generator(seed))
    return made


@pytest.mark.parametrize("make", [plain, near_ties, all_negative])
@pytest.mark.parametrize("quant", [Q.FP8_BLOCK128, Q.NVFP4])
def test_sigmoid_renorm_on_fp8_block_and_nvfp4(quant: QuantScheme, make: Any) -> None:
    assert served(Layer(spec_of(quant, "SigmoidRenorm"), logits(make))) == BOTH


@pytest.mark.parametrize("size", [0.1, 30.0])
@pytest.mark.parametrize("quant", [Q.FP8_BLOCK128, Q.NVFP4])
def test_minimax2_on_fp8_block_and_nvfp4(quant: QuantScheme, size: float) -> None:
    """A large bias moves the choice and never the weights."""
    spec = spec_of(quant, "MiniMax2", bias=True, routed_scaling_factor=2.0)
    assert served(Layer(spec, logits(), with_bias(size))) == BOTH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("quant", [Q.BF16, Q.FP8_BLOCK128, Q.NVFP4])
def test_deepseek_logits_need_not_be_fp32(
    quant: QuantScheme, groups: tuple[int, int], dtype: torch.dtype
) -> None:
    told = {"n_group": groups[0], "topk_group": groups[1], "routed_scaling_factor": 2.5}
    spec = spec_of(quant, "DeepSeekV3", bias=True, **told)
    # The grouped kernel rounds its bias, so that a choice may hang on the last bit of one.
    bias = with_bias(0.1).bfloat16().float()
    assert served(Layer(spec, logits().to(dtype), bias)) == BOTH


@pytest.mark.parametrize("make", [plain, all_negative])
@pytest.mark.parametrize("quant", [Q.BF16, Q.FP8_BLOCK128, Q.NVFP4, Q.MXFP4])
def test_sigmoid(quant: QuantScheme, make: Any) -> None:
    spec = spec_of(quant, "Sigmoid")
    assert served(Layer(spec, logits(make))) == BOTH
    old = refused(spec, MONO, flashinfer="0.6.8")
    assert "Sigmoid" in old and "0.6.11" in old and "0.6.8" in old


def test_the_scale_of_step_37_by_version() -> None:
    """Kernels ignored it under MiniMax2, silently: until then the routed plan applies it."""
    spec = spec_of(Q.NVFP4, "MiniMax2", bias=True, top_k=8, routed_scaling_factor=3.0)
    once = replace(spec, routing=replace(spec.routing, routed_scaling_factor=1.0))
    threefold, single = (Layer(each, logits(), with_bias(0.5)) for each in (spec, once))
    assert served(threefold) == BOTH
    torch.testing.assert_close(threefold.truth(), 3.0 * single.truth())
    for version, words in (
        ("0.6.12", ("the kernel ignores the scale under MiniMax2", "routed_scaling_factor is 3.0")),
        ("0.6.13", ("0.6.18",)),
    ):
        told = refused(spec, MONO, flashinfer=version)
        assert all(word in told for word in words), told
        assert {usable.mode for usable in ask(spec, flashinfer=version).usable} == {ROUTED}
    assert "scale" not in refused(spec, MONO, flashinfer="0.6.13")


def test_nemotron_3_nano_fp8_with_fp32_logits() -> None:
    """ReLU2 experts of a width that is padded, and DeepSeek's router without groups."""
    spec = spec_of(
        Q.FP8_TENSOR,
        "DeepSeekV3",
        top_k=6,
        n_group=1,
        topk_group=1,
        bias=True,
        routed_scaling_factor=2.5,
    )
    relu2 = ACTIVATIONS[ActivationKind.RELU2]
    spec = replace(spec, hidden=384, intermediate=464, activation=relu2)
    assert served(Layer(spec, logits(), with_bias(0.1))) == BOTH


@pytest.mark.parametrize("method", ["Renormalize", "RenormalizeNaive"])
@pytest.mark.parametrize("quant", [Q.BF16, Q.FP8_TENSOR, Q.FP8_CHANNEL, Q.FP8_BLOCK128, Q.MXFP8])
def test_all_negative_logits_on_bf16_and_fp8(quant: QuantScheme, method: str) -> None:
    spec = spec_of(quant, method)
    assert served(Layer(spec, logits(all_negative))) == BOTH
    assert "0.6.8" in refused(spec, MONO, flashinfer="0.6.7")


COHERE = {"model_type": "cohere2_moe", "num_experts_per_tok": 4}
TRUE_METHODS = [
    ({"expert_selection_fn": "softmax", "norm_topk_prob": True}, M.RENORMALIZE),
    ({"expert_selection_fn": "softmax", "norm_topk_prob": False}, M.RENORMALIZE),
    ({"expert_selection_fn": "sigmoid", "norm_topk_prob": True}, M.SIGMOID_RENORM),
    ({"expert_selection_fn": "sigmoid", "norm_topk_prob": False}, M.TOPK_SIGMOID),
]


@pytest.mark.parametrize(("config", "method"), TRUE_METHODS, ids=str)
def test_cohere2moe_nvfp4_by_its_true_methods(config: dict[str, Any], method: M) -> None:
    routing = family_routing({**COHERE, **config})
    assert routing.method is method
    spec = replace(spec_of(Q.NVFP4, "Renormalize"), routing=routing)
    assert served(Layer(spec, logits())) == BOTH


def test_cohere2moe_selects_by_raw_logit_where_sigmoids_tie() -> None:
    """On saturated logits Sigmoid would choose the first experts instead of the largest."""
    config = {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}
    true = replace(spec_of(Q.NVFP4, "Renormalize"), routing=family_routing({**COHERE, **config}))
    layers = [Layer(spec, logits(saturated)) for spec in (true, spec_of(Q.NVFP4, "Sigmoid"))]
    for each in layers:
        assert MONO in {usable.mode for usable in ask(each.spec).usable}
    assert served(layers[0]) == BOTH
    found, other = (each.truth() for each in layers)
    assert (found - other).norm() > 0.5 * found.norm()


@pytest.mark.parametrize("declared", ["SigmoidRenorm", "Sigmoid", "RenormalizeNaive", "Default"])
def test_cohere2moe_nvfp4_as_an_engine_declares_it(declared: str) -> None:
    """It runs as declared, and the engine is told of the difference."""
    assert served(Layer(spec_of(Q.NVFP4, declared), logits())) == BOTH
    told = compare_declared(M(declared), M.TOPK_SIGMOID)
    assert told is not None and declared in told and "TopKSigmoid" in told


@pytest.mark.parametrize("method", ["RenormalizeNaive", "SigmoidRenorm"])
def test_mxfp8_with_relu2_that_is_not_gated(method: str) -> None:
    relu2 = ACTIVATIONS[ActivationKind.RELU2]
    spec = replace(spec_of(Q.MXFP8, method), activation=relu2)
    assert served(Layer(spec, logits())) == BOTH


@pytest.mark.parametrize("quant", [Q.FP8_BLOCK128, Q.MXINT4])
def test_relu2_is_refused_readably_elsewhere(quant: QuantScheme) -> None:
    spec = replace(spec_of(quant, "RenormalizeNaive"), activation=ACTIVATIONS[ActivationKind.RELU2])
    for mode in BOTH:
        told = refused(spec, mode)
        assert "activation is relu2" in told and "there is no kernel for relu2" in told
        assert "swiglu" in told, "what is accepted is told too"
    assert not ask(spec).usable


def test_simulated_never_reaches_a_kernel() -> None:
    spec = spec_of(Q.NVFP4, "Simulated")
    assert not ask(spec).usable
    assert "Simulated" in refused(spec, MONO) and "Simulated" in refused(spec, ROUTED)
    members = dict(library().RoutingMethodType.__members__)
    with pytest.raises(Exception, match="Simulated"):
        kernel_id(M.SIMULATED, members)


def test_a_choice_made_elsewhere_runs_under_another_methods_name() -> None:
    """Ids and weights are welcome whatever made them; launchers are told Renormalize."""
    spec = spec_of(Q.NVFP4, "Simulated")
    (usable,) = ask(spec, form=TOPK).usable
    assert usable.mode is ROUTED
    made = Layer(spec, logits(), chosen_by=spec_of(Q.NVFP4, "Default").routing)
    assert made.error(usable.row) <= 1
    seen = Recording(library())
    stand_in(seen)
    made.answer(usable.row)
    told = {call["routing_method_type"] for call in seen.calls}
    assert told == {int(library().RoutingMethodType["Renormalize"])}
