"""The routed experts of one layer, token by token in numpy: what the torch backends must equal."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from expertd.core import Activation, LayerSpec
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import dequantize

Row = NDArray[np.float64]


def sigmoid(x: Row) -> Row:
    return 0.5 * (1 + np.tanh(x / 2))


def swiglu(a: Activation, up: Row, gate: Row) -> Row:
    if a.limit is not None:
        up, gate = np.clip(up, -a.limit, a.limit), np.minimum(gate, a.limit)
    return gate * sigmoid(gate) * up


def swiglu_oai(a: Activation, up: Row, gate: Row) -> Row:
    assert a.alpha is not None and a.beta is not None and a.limit is not None
    up, gate = np.clip(up, -a.limit, a.limit), np.minimum(gate, a.limit)
    return gate * sigmoid(a.alpha * gate) * (up + a.beta)


def swiglu_step(a: Activation, up: Row, gate: Row) -> Row:
    limit = math.inf if a.limit is None else a.limit
    return np.minimum(gate * sigmoid(gate), limit) * np.clip(up, -limit, limit)


def geglu(_: Activation, up: Row, gate: Row) -> Row:
    return gate * np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)(gate) * up


def geglu_tanh(_: Activation, up: Row, gate: Row) -> Row:
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate * (1 + np.tanh(inner)) / 2 * up


def relu2(_: Activation, up: Row, gate: Row) -> Row:
    return np.maximum(up, 0) ** 2


def situ(a: Activation, up: Row, gate: Row) -> Row:
    assert a.alpha is not None and a.beta is not None
    gated = a.alpha * np.tanh(gate / a.alpha) * sigmoid(gate)
    return gated * a.beta * np.tanh(up / a.beta)


FORMULAS: dict[str, Callable[[Activation, Row, Row], Row]] = {
    "swiglu": swiglu,
    "swiglu_oai": swiglu_oai,
    "swiglu_step": swiglu_step,
    "geglu": geglu,
    "geglu_tanh": geglu_tanh,
    "relu2": relu2,
    "situ": situ,
}


def expected(
    spec: LayerSpec, weights: ExpertWeights, rows: Tensor, ids: Tensor, router: Tensor
) -> Row:
    """[T, H]: the sum over each row's held experts, by the formulas of core/activation.py."""
    dense = {
        local: [w.double().numpy() for w in dequantize(weights, local)]
        for local in range(spec.held)
    }
    out = np.zeros((rows.shape[0], spec.hidden))
    for token in range(rows.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if spec.expert_begin <= expert < spec.expert_end:
                local, weight = expert - spec.expert_begin, float(router[token, slot])
                row = rows[token].double().numpy()
                out[token] += one_expert(spec, weights, dense[local], local, row, weight)
    return out


def one_expert(
    spec: LayerSpec, weights: ExpertWeights, dense: list[Row], local: int, row: Row, weight: float
) -> Row:
    on_input = spec.routing is not None and spec.routing.weight_site == "input"
    w13, w2 = dense
    inner = w13 @ (row * weight if on_input else row)
    if weights.bias13 is not None:
        inner = inner + weights.bias13[local].double().numpy()
    up, gate = np.split(inner, 2) if spec.activation.gated else (inner, inner)
    out: Row = w2 @ FORMULAS[spec.activation.kind](spec.activation, up, gate)
    if weights.bias2 is not None:
        out = out + weights.bias2[local].double().numpy()
    return out if on_input else out * weight
