"""Real models of transformers, their experts behind a client: equal to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.strategies import torch_tensor
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    FP8Experts,
    FP8ExpertsInterface,
)
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

from expertd.weights.tiny import TINY, Sizes, Tiny
from expertd_client import Client, InvalidArgument, NotFound
from expertd_client.integrations.transformers import NAME, Remote, register
from expertd_client.torch import to_wire
from expertd_client.transport.in_process import InProcessTransport
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.methods import FORWARD, LIST_LAYERS
from expertd_wire.v1 import experts_pb2 as pb

SIZES = Sizes(hidden=32, width=16, experts=8, top_k=2)
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "minimax_m2", "minimax_m3_vl")
RUNNABLE = {"deepseek_v3": {"num_key_value_heads": 4, "qk_rope_head_dim": 8}}
IGNORANT = ("llama4", "step3p7")


class Servers:
    """Serves the experts of models as transformers computes them; keeps every call."""

    def __init__(self, **models: Any) -> None:
        self.calls: list[ForwardCall] = []
        self.experts = {
            (served, number): module
            for served, model in models.items()
            for number, module in numbered_experts(model)
        }

    def __call__(self, path: str, request: bytes) -> bytes:
        return {FORWARD: self.forward, LIST_LAYERS: self.layers}[path](request)

    def forward(self, request: bytes) -> bytes:
        call = decode_forward_call(request)
        self.calls.append(call)
        module = self.experts[call.model, call.layer]
        tensors = (call.hidden_states, call.topk_ids, call.topk_weights)
        rows, ids, weights = (torch_tensor(tensor) for tensor in tensors)
        weights = weights.masked_fill(ids < 0, 0)
        with torch.no_grad():
            output = type(module).forward.__wrapped__(module, rows, ids.clamp(min=0), weights)
        return encode_forward_reply(ForwardReply(output=to_wire(output)))

    def layers(self, request: bytes) -> bytes:
        model = pb.ListLayersRequest.FromString(request).model
        infos = [
            pb.LayerInfo(model=served, layer=layer, num_experts=module.num_experts, state="ready")
            for (served, layer), module in self.experts.items()
            if model in ("", served)
        ]
        data: bytes = pb.ListLayersReply(layers=infos).SerializeToString()
        return data


def numbered_experts(model: Any) -> Iterator[tuple[int, Any]]:
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            yield int(name.split("layers.")[1].split(".")[0]), module


def row(family: str) -> Tiny:
    (found,) = (tiny for tiny in TINY if tiny.model_type == family)
    return replace(found, settings=found.settings | RUNNABLE.get(family, {}))


def tiny(family: str) -> Any:
    return row(family).build(SIZES, seed=11).eval()


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    yield
    for interface in (ExpertsInterface, FP8ExpertsInterface):
        interface._global_mapping.pop(NAME, None)


def registered(servers: Servers) -> Remote:
    return register(Client(InProcessTransport(servers)))


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_the_same(family: str) -> None:
    model = tiny(family)
    model.set_experts_implementation("eager")
    servers = Servers(far=copy.deepcopy(model))
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 4, "do_sample": False}
    here = logits(model), model.generate(prompt, **options)
    remote = registered(servers)
    remote.attach(model)
    remote.release(model)
    assert all(p.is_meta for _, module in numbered_experts(model) for p in module.parameters())
    assert torch.equal(logits(model), here[0])
    layers = {number for number, _ in numbered_experts(model)}
    assert sorted(call.layer for call in servers.calls) == sorted(layers) and layers
    assert torch.equal(model.generate(prompt, **options), here[1])
    assert len(servers.calls) == 5 * len(layers)


def test_the_setting_alone_finds_the_model() -> None:
    others = [tiny("gpt_oss")]
    model = tiny("qwen3_moe")
    others.append(tiny("minimax_m2"))
    model.set_experts_implementation("eager")
    here = logits(model)
    servers = Servers(far=copy.deepcopy(model))
    registered(servers)
    model.set_experts_implementation(NAME)
    assert torch.equal(logits(model), here)
    assert [call.layer for call in servers.calls] == [
        number for number, _ in numbered_experts(model)
    ]


def test_a_model_inside_another_obeys_though_the_outer_class_says_it_does_not() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Kimi_K25Config(
        text_config=row("deepseek_v3").config(SIZES).to_dict(),
        vision_config=vision | {"num_attention_heads": 2},
    )
    model = Kimi_K25ForConditionalGeneration(config).eval()
    assert not model._can_set_experts_implementation()
    model.set_experts_implementation("eager")
    here = logits(model)
    servers = Servers(far=copy.deepcopy(model))
    remote = registered(servers)
    remote.attach(model)
    remote.release(model)
    assert torch.equal(logits(model), here)
    assert [call.layer for call in servers.calls] == [1, 2]


def test_two_models_are_told_apart() -> None:
    qwen, oss = tiny("qwen3_moe"), tiny("gpt_oss")
    servers = Servers(q=copy.deepcopy(qwen), o=copy.deepcopy(oss))
    remote = registered(servers)
    with pytest.raises(InvalidArgument, match="serves o, q; say which"):
        remote.attach(qwen)
    remote.attach(qwen, "q")
    remote.attach(oss, "o")
    logits(qwen)
    assert {call.model for call in servers.calls} == {"q"}
    logits(oss)
    assert {call.model for call in servers.calls} == {"q", "o"}


@pytest.mark.parametrize("family", IGNORANT)
def test_classes_that_ignore_the_setting_are_refused_by_name(family: str) -> None:
    model, served = tiny(family), tiny("qwen3_moe")
    with pytest.raises(InvalidArgument, match=rf"{type(model).__name__} ignores .*Experts would"):
        registered(Servers(far=served)).attach(model)
    assert model.config._experts_implementation != NAME


def test_a_model_without_experts_is_refused_by_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=8,
        )
    )
    with pytest.raises(InvalidArgument, match="LlamaForCausalLM ignores"):
        registered(Servers(far=tiny("qwen3_moe"))).attach(dense)


def test_experts_with_a_config_of_their_own_are_refused_and_nothing_is_changed() -> None:
    model = tiny("qwen3_moe")
    (_, module), *_ = numbered_experts(model)
    module.config = copy.deepcopy(module.config)
    before = model.get_experts_implementation()
    with pytest.raises(InvalidArgument, match="Qwen3MoeForCausalLM ignores"):
        registered(Servers(far=copy.deepcopy(model))).attach(model)
    assert model.get_experts_implementation() == before


def test_other_experts_than_those_served_are_refused() -> None:
    model, servers = tiny("qwen3_moe"), Servers(far=tiny("qwen3_moe"))
    remote = registered(servers)
    last = max(servers.experts)
    servers.experts[last].num_experts = 4
    with pytest.raises(InvalidArgument, match="layer 2: 4 experts are served, the model has 8"):
        remote.attach(model)
    del servers.experts[last]
    with pytest.raises(NotFound, match="'far', layer 2: no replica"):
        remote.attach(model)
    with pytest.raises(InvalidArgument, match="attach the model first"):
        remote.release(model)
    assert not any(p.is_meta for p in model.parameters())


@use_experts_implementation
class Lone(nn.Module):
    """An experts module that no model has."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 8


def test_a_module_of_no_model_is_refused() -> None:
    remote = registered(Servers(far=tiny("qwen3_moe")))
    module = Lone(SimpleNamespace(_experts_implementation=NAME))
    with pytest.raises(InvalidArgument, match="Lone belongs to no model"):
        module(torch.zeros(1, 32), torch.zeros(1, 2).long(), torch.zeros(1, 2))
    assert module not in remote._experts


def test_the_expert_count_as_id_means_none() -> None:
    model = tiny("qwen3_moe")
    servers = Servers(far=copy.deepcopy(model))
    registered(servers).attach(model)
    (_, module), *_ = numbered_experts(model)
    rows, weights = torch.randn(2, 32), torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)
    output = module(rows, torch.tensor([[3, 8], [8, 8]]), weights)
    (call,) = servers.calls
    assert torch_tensor(call.topk_ids).tolist() == [[3, -1], [-1, -1]]
    assert torch_tensor(call.topk_weights).dtype == torch.float32
    assert output[0].norm() > 0 and not output[1].any()


def test_fp8_experts_ask_their_own_registry() -> None:
    model = tiny("qwen3_moe")
    servers = Servers(far=copy.deepcopy(model))
    fp8 = use_experts_implementation(
        type("Fp8", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    for layer in model.model.layers:
        layer.mlp.experts = fp8(model.config, block_size=(16, 16))
    remote = registered(servers)
    remote.attach(model)
    remote.release(model)
    assert logits(model).isfinite().all()
    assert len(servers.calls) == len(model.model.layers)
