"""Whole models of transformers generate with their experts on four replicas, one of which dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.fleet import Replica, replicas
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteriaList
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from expertd.weights.demo import write_demo
from expertd_client import ExpertPool
from expertd_client.integrations.transformers import NAME, register

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
NEW_TOKENS = 12
DEAD_AFTER = 4
RETURN_SECONDS = 120


@pytest.fixture(scope="module")
def fleet(home: Path) -> Iterator[list[Replica]]:
    """Every family in float32 on four replicas, two a half of the experts."""
    models: list[str] = []
    for family in FAMILIES:
        write_demo(home / f"{family}-fp32", family, "fp32", seed=21)
        models += ["--model", f"{family}={home / f'{family}-fp32'}"]
    with replicas(home, *models) as running:
        yield running


@pytest.fixture
def pool(fleet: list[Replica]) -> Iterator[ExpertPool]:
    with ExpertPool([replica.grpc for replica in fleet], shard="experts") as connected:
        yield connected
    for interface in (ExpertsInterface, FP8ExpertsInterface):
        interface._global_mapping.pop(NAME, None)


def generate(model: Any, each_token: Any = None) -> list[list[int]]:
    """The tokens that follow three prompts; each_token() is called after every step."""
    prompts = torch.randint(3, 100, (3, 5), generator=torch.Generator().manual_seed(8))

    def step(ids: Tensor, scores: Any, **options: Any) -> Tensor:
        if each_token is not None:
            each_token()
        return torch.zeros(len(ids), dtype=torch.bool)

    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([step]),
    )
    tokens: list[list[int]] = found[:, prompts.shape[1] :].tolist()
    return tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_while_a_replica_dies_and_returns(
    family: str, home: Path, fleet: list[Replica], pool: ExpertPool
) -> None:
    path = home / f"{family}-fp32"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.set_experts_implementation("eager")
    here = generate(model)
    assert len({token for row in here for token in row}) > 3

    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    weights = sum(p.nbytes for module in experts for p in module.parameters())
    assert {replica.weights_bytes(family) for replica in fleet} == {weights // 2}

    remote = register(pool, timeout=60)
    remote.attach(model, family)
    remote.release(model)
    before = [replica.answered(family) for replica in fleet]
    assert generate(model) == here
    calls = [replica.answered(family) - had for replica, had in zip(fleet, before, strict=True)]
    passes = NEW_TOKENS * model.config.num_hidden_layers
    assert passes <= sum(calls) <= 2 * passes, "each call asks one replica of a range or of both"
    assert sum(calls[:2]) > passes / 2 and sum(calls[2:]) > passes / 2

    victim = fleet[FAMILIES.index(family)]
    steps = iter(range(NEW_TOKENS))
    assert generate(model, lambda: next(steps) == DEAD_AFTER and victim.end()) == here
    assert victim.process is None
    returning = threading.Thread(target=victim.start)
    returning.start()
    end = time.monotonic() + RETURN_SECONDS
    while returning.is_alive() or not victim.answered(family):
        assert generate(model) == here
        assert time.monotonic() < end, "the replica that returned is never asked"
