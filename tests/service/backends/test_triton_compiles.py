"""All that a load warms up compiles for every card that is served, told without any: Triton
compiles what differs in the dtype of rows, in a lone call or in an activation apart."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.compiled import CARDS, CELLS, launches_compile
from tests.service.triton.router_cases import METHODS, bias_of, spec_of
from tests.strategies import generator, layer_spec, random_topk, random_weights

from expertd.backends.base import Batch
from expertd.backends.triton.backend import Triton
from expertd.backends.triton.shared import COLUMNS, Card, fitted
from expertd.backends.triton.tiles import Cut, by_rule, table
from expertd.capability.row import Row
from expertd.capability.rows.triton import ROWS
from expertd.core import Activation, ActivationKind, LayerSpec, QuantScheme
from expertd.engine import checks, forms, routers
from expertd.routing.methods import TRAITS

CPU = torch.device("cpu")
ARCHS = sorted({arch for row in ROWS for arch in row.archs})
KINDS = list(ActivationKind)
SIZES = ((1, 1), (16, 2), (100, 100), (200, 100), (100_000, 50_000))
"""Pairs and rows of calls; tiles by rule are of as many heights."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@contextmanager
def on(arch: str) -> Iterator[list[Any]]:
    """The kernels of such a card in place of the processor's: they are compiled, and listed."""
    routers.router_on.cache_clear()
    with (
        launches_compile(arch) as kernels,
        patch.dict(routers.ROUTERS, cpu=routers.ROUTERS["cuda"]),
        patch.dict(checks.CHECKS, cpu=checks.CHECKS["cuda"]),
        torch.inference_mode(),
    ):
        yield kernels
    routers.router_on.cache_clear()
    print(arch, len(kernels), "kernels")


def too_large(kernels: list[Any], card: Card) -> list[str]:
    """Those that ask for more than such a card has; that there are any is seen to."""
    assert kernels
    return [
        kernel.name
        for kernel in kernels
        if kernel.metadata.shared > card.shared
        or (card.sums_apart and kernel.metadata.tmem_size > COLUMNS)
    ]


def prepared(row: Row, spec: LayerSpec, card: Card) -> Triton:
    """The layer's backend, as it would be on that card."""
    backend = Triton(row, spec, CPU)
    with (
        patch.object(Triton, "_check", lambda self: ()),
        patch("expertd.backends.triton.backend.card_of", lambda device: card),
    ):
        backend.check()
        backend.prepare_weights(random_weights(spec, generator(0)), None)
    return backend


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_what_a_load_of_packed_weights_warms_up(arch: str) -> None:
    """A lone call of float32 rows compiled nowhere once."""
    assert not too_large(loaded(arch, QuantScheme.MXFP4), CARDS[arch])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_what_a_load_warms_up_on_every_card(arch: str) -> None:
    assert not too_large(loaded(arch, QuantScheme.BF16), CARDS[arch])


def loaded(arch: str, quant: QuantScheme) -> list[Any]:
    """The kernels of a load."""
    row = next(row for row, found in CELLS if found == quant)
    spec = layer_spec(hidden=256, intermediate=256, quant=quant)
    with on(arch) as kernels:
        routers.warm_up_router(spec, None, CPU)
        checks.warm_up_checks(spec, CPU)
        backend = prepared(row, spec, CARDS[arch])
        backend.warm_up((1,))
        forms._warm_up(backend, 1)
    return kernels


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "sm120"])
def test_every_cell(arch: str) -> None:
    """The rest is drawn: tiles, activation, sizes, biases, side of the weights, form of rows."""
    seed = os.environ.get("EXPERTD_TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
    print("EXPERTD_TEST_SEED =", seed)
    chance, card = random.Random(seed), CARDS[arch]
    with on(arch) as kernels:
        for row, quant in CELLS:
            if arch in row.archs:
                backend = prepared(row, any_layer(quant, chance), card)
                for cut in chance.sample(cuts(backend, card), 2):
                    print(quant, row.activation_quant, backend.spec.activation, cut)
                    backend.run(any_batch(backend, 40 if cut.sorted else 1, chance), cut)
    assert not too_large(kernels, card)


def any_layer(quant: QuantScheme, chance: random.Random) -> LayerSpec:
    hidden, intermediate = chance.choice(((256, 256), (160, 96)))
    spec = layer_spec(
        hidden=hidden,
        intermediate=intermediate,
        quant=quant,
        activation=Activation(chance.choice(KINDS)),
        expert_bias=chance.random() < 0.5,
    )
    assert spec.routing is not None
    if chance.random() < 0.3:
        return replace(spec, routing=replace(spec.routing, top_k=1, weight_site="input"))
    return spec


def any_batch(backend: Triton, tokens: int, chance: random.Random) -> Batch:
    """Rows of any dtype, or quantised by the caller where the row takes that."""
    spec = backend.spec
    assert spec.routing is not None
    ids, weights = random_topk(tokens, spec.num_experts, spec.routing.top_k, generator(0))
    rows = torch.zeros(tokens, spec.hidden, dtype=chance.choice(DTYPES))
    out = torch.zeros(rows.shape, dtype=chance.choice(DTYPES))
    batch = Batch(rows, out, ids=ids, weights=weights)
    groups: dict[str, int] = {"fp8_group128": 128, "mxfp8": 32}
    if backend.row.formats and chance.random() < 0.5:
        scales = torch.ones(tokens, -(-spec.hidden // groups[backend.row.formats[0]]))
        return replace(batch, rows=rows.to(torch.float8_e4m3fn), row_scales=scales)
    return batch


def cuts(backend: Triton, card: Card) -> list[Cut]:
    """By rule for every height, and what was measured for such weights on such a card."""
    first, second = backend._native.first, backend._native.second
    gated, mine = backend.spec.activation.gated, backend._work
    found = [by_rule(pairs, 6, first, second, rows) for pairs, rows in SIZES]
    found += [one.cut for one in table() if _format(one.work) == _format(mine)]
    return list(dict.fromkeys(fitted(cut, first, second, gated, card) for cut in found))


def _format(work: Any) -> tuple[str, str, str]:
    return work.arch, work.weights, work.rows


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm80", "sm100"])
def test_every_methods_router(arch: str) -> None:
    with on(arch) as kernels:
        for method in METHODS:
            groups = {"n_group": 8, "topk_group": 4} if TRAITS[method].grouped else {}
            spec = spec_of(method, 8, **groups)
            bias = bias_of(spec, 256, 0.1, generator(0))
            routers.router_on("cpu")(spec, torch.zeros(1, 256), bias)
    assert not too_large(kernels, CARDS[arch])
