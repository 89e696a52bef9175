"""reference and grouped against a loop over tokens, for everything that a layer can be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service.backends.per_token import expected
from tests.strategies import SOFTMAX, generator, layer_spec, random_topk, random_weights, relative
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.backends.grouped.backend import Grouped
from expertd.backends.reference.backend import Reference
from expertd.backends.rows import shares
from expertd.capability.rows import grouped, reference
from expertd.core import Activation, ActivationKind, LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights

CPU = torch.device("cpu")
KINDS = {"reference": (Reference, reference.ROWS[0]), "grouped": (Grouped, grouped.ROWS[0])}
# What a GEMM in the rows' own dtype may lose; reference computes in float32 whatever they are.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

ACTIVATIONS = {
    "swiglu": Activation(ActivationKind.SWIGLU),
    "swiglu limited": Activation(ActivationKind.SWIGLU, limit=0.5),
    "swiglu_oai": Activation(ActivationKind.SWIGLU_OAI, alpha=1.702, beta=1.0, limit=0.7),
    "swiglu_oai other": Activation(ActivationKind.SWIGLU_OAI, alpha=0.8, beta=-0.5, limit=7.0),
    "swiglu_step": Activation(ActivationKind.SWIGLU_STEP, limit=0.3),
    "swiglu_step free": Activation(ActivationKind.SWIGLU_STEP),
    "geglu": Activation(ActivationKind.GEGLU),
    "geglu_tanh": Activation(ActivationKind.GEGLU_TANH),
    "relu2": Activation(ActivationKind.RELU2),
    "situ": Activation(ActivationKind.SITU, alpha=0.9, beta=1.3),
}


def backend(name: str, spec: LayerSpec, weights: ExpertWeights) -> Backend:
    kind, row = KINDS[name]
    made = kind(row, spec, CPU)
    assert made.check() == ()
    made.prepare_weights(weights, None)
    made.warm_up((1,))
    return made


def run(
    made: Backend,
    rows: Tensor,
    ids: Tensor,
    router: Tensor,
    scales: Tensor | None = None,
    reply: torch.dtype = torch.float32,
) -> Tensor:
    """The output, from a buffer that is full of NaN before."""
    out = torch.full(rows.shape, math.nan, dtype=reply)
    made.forward(Batch(rows, out, scales, ids, router))
    return out


def check(spec: LayerSpec, seed: int, dtype: torch.dtype = torch.float32, tokens: int = 13) -> None:
    """Both backends against the loop, on random rows with a row and some slots for nobody."""
    random = generator(seed)
    weights = random_weights(spec, random)
    rows = torch.randn(tokens, spec.hidden, generator=random).to(dtype)
    ids, router = random_topk(tokens, spec.num_experts, 3, random)
    ids[1], ids[2, 0], router[2, 0] = -1, -1, math.nan
    truth = torch.from_numpy(expected(spec, weights, rows, ids, router))
    assert truth.norm() > 0.1
    for name in KINDS:
        got = run(backend(name, spec, weights), rows, ids, router)
        tolerance = TOLERANCE[torch.float32 if name == "reference" else dtype]
        assert relative(got, truth) <= tolerance, name
        assert not got[1].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, bias: bool, dtype: torch.dtype) -> None:
    spec = layer_spec(activation=ACTIVATIONS[activation], expert_bias=bias)
    check(spec, seed=100 + list(ACTIVATIONS).index(activation), dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("quant", QuantScheme)
def test_every_scheme(quant: QuantScheme, dtype: torch.dtype) -> None:
    check(layer_spec(quant=quant), seed=200, dtype=dtype)


@pytest.mark.parametrize("quant", [QuantScheme.FP8_BLOCK128, QuantScheme.BF16])
def test_widths_that_are_no_multiple_of_a_block(quant: QuantScheme) -> None:
    check(layer_spec(hidden=160, intermediate=96, quant=quant), seed=201)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
def test_weights_on_the_input(bias: bool, dtype: torch.dtype) -> None:
    routing = replace(SOFTMAX, weight_site="input")
    check(layer_spec(routing=routing, expert_bias=bias), seed=300, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("held", [(0, 1), (2, 5), (5, 6), (0, 6)])
def test_ranges_of_experts(held: tuple[int, int], dtype: torch.dtype) -> None:
    begin, end = held
    check(layer_spec(expert_begin=begin, expert_end=end), seed=400, dtype=dtype, tokens=40)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    experts=st.integers(1, 40),
    kind=st.sampled_from(list(ACTIVATIONS)),
)
def test_any_shape(seed: int, tokens: int, experts: int, kind: str) -> None:
    """Most of 40 experts are empty with so few rows."""
    spec = layer_spec(
        hidden=32,
        intermediate=32,
        num_experts=experts,
        expert_begin=0,
        expert_end=experts,
        activation=ACTIVATIONS[kind],
    )
    random = torch.Generator().manual_seed(seed)
    weights = random_weights(spec, random)
    rows = torch.randn(tokens, spec.hidden, generator=random)
    ids, router = random_topk(tokens, experts, min(3, experts), random)
    truth = torch.from_numpy(expected(spec, weights, rows, ids, router))
    for name in KINDS:
        got = run(backend(name, spec, weights), rows, ids, router)
        assert (got - truth).norm() <= 1e-5 * truth.norm() + 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_all_want_one_expert(name: str) -> None:
    random = generator(500)
    spec = layer_spec()
    weights = random_weights(spec, random)
    rows = torch.randn(64, spec.hidden, generator=random)
    ids, router = torch.full((64, 1), 4, dtype=torch.int32), torch.ones(64, 1)
    truth = torch.from_numpy(expected(spec, weights, rows, ids, router))
    assert relative(run(backend(name, spec, weights), rows, ids, router), truth) <= 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_nobody_at_all(name: str) -> None:
    random = generator(501)
    spec = layer_spec()
    ids = torch.full((5, 2), -1, dtype=torch.int32)
    made = backend(name, spec, random_weights(spec, random))
    got = run(made, torch.randn(5, spec.hidden, generator=random), ids, torch.ones(5, 2))
    assert torch.equal(got, torch.zeros(5, spec.hidden))


@pytest.mark.parametrize("reply", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["fp8_group128", "mxfp8"])
@pytest.mark.parametrize("name", KINDS)
def test_fp8_rows(name: str, scales: str, reply: torch.dtype) -> None:
    random = generator(600)
    spec = layer_spec(hidden=256)
    weights = random_weights(spec, random)
    rows = torch.randn(9, 256, generator=random).to(torch.float8_e4m3fn)
    if scales == "fp8_group128":
        scale = torch.rand(9, 2, generator=random) + 0.25
    else:
        scale = torch.exp2(torch.randint(-3, 2, (9, 8), generator=random).float())
    ids, router = random_topk(9, spec.num_experts, 2, random)
    plain = rows.double() * scale.double().repeat_interleave(256 // scale.shape[1], 1)
    truth = torch.from_numpy(expected(spec, weights, plain, ids, router))
    got = run(backend(name, spec, weights), rows, ids, router, scale, reply)
    computed = torch.float32 if name == "reference" else torch.bfloat16
    tolerance = TOLERANCE[computed] + (0 if reply == torch.float32 else 4e-3)
    assert got.dtype == reply and relative(got, truth) <= tolerance


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_nan_stays_in_its_row(name: str) -> None:
    random = generator(700)
    spec = layer_spec()
    weights = random_weights(spec, random)
    rows = torch.randn(6, spec.hidden, generator=random)
    ids, router = random_topk(6, spec.num_experts, 2, random)
    made = backend(name, spec, weights)
    before = run(made, rows, ids, router)
    rows[2] = math.nan
    after = run(made, rows, ids, router)
    assert torch.isnan(after[2]).all()
    assert torch.equal(after[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])


@given(
    st.lists(st.lists(st.integers(-1, 7), min_size=3, max_size=3), min_size=1, max_size=12),
    st.integers(0, 7),
    st.integers(1, 7),
)
def test_shares_are_every_held_pair_once_in_order_of_expert(
    ids: list[list[int]], begin: int, count: int
) -> None:
    flat = [expert for row in ids for expert in row]
    held = range(begin, begin + count)
    pairs, experts, counts = shares(torch.tensor(ids, dtype=torch.int32), begin, begin + count)
    by_hand = sorted((e, n) for n, e in enumerate(flat) if e in held)
    assert pairs.tolist() == [n for _, n in by_hand]
    assert experts == sorted({e for e, _ in by_hand})
    assert counts == [sum(e == expert for e, _ in by_hand) for expert in experts]
