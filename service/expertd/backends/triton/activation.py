"""The activations in Triton: core.Activation's formulas on tiles in float32."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.core import Activation, ActivationKind

NO_LIMIT = float("inf")
_ALPHA = {ActivationKind.SWIGLU_OAI: 1.702, ActivationKind.SITU: 4.0}
_BETA = {ActivationKind.SWIGLU_OAI: 1.0, ActivationKind.SITU: 25.0}


def constants(activation: Activation) -> dict[str, object]:
    """An activation as the kernels' arguments."""
    kind, limit = activation.kind, activation.limit
    return {
        "KIND": str(kind.value),
        "alpha": _ALPHA.get(kind, 1.0) if activation.alpha is None else activation.alpha,
        "beta": _BETA.get(kind, 0.0) if activation.beta is None else activation.beta,
        "limit": NO_LIMIT if limit is None else limit,
    }


@triton.jit
def activate(up, gate, alpha, beta, limit, KIND: tl.constexpr):
    """The inner row from its two halves; without a gate half, gate is up."""
    if KIND == "swiglu":
        gate, up = _clamped(gate, up, limit)
        out = gate * tl.sigmoid(gate) * up
    elif KIND == "swiglu_oai":
        gate, up = _clamped(gate, up, limit)
        out = gate * tl.sigmoid(alpha * gate) * (up + beta)
    elif KIND == "swiglu_step":
        gate, up = _clamped(gate * tl.sigmoid(gate), up, limit)
        out = gate * up
    elif KIND == "geglu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == "geglu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        out = 0.5 * gate * (1.0 + _tanh(inner)) * up
    elif KIND == "relu2":
        # Not maximum(): NaN has to stay NaN.
        positive = tl.where(up < 0.0, 0.0, up)
        out = positive * positive
    else:
        tl.static_assert(KIND == "situ", "an activation without a formula")
        gate = alpha * _tanh(gate / alpha) * tl.sigmoid(gate)
        out = gate * (beta * _tanh(up / beta))
    return out


@triton.jit
def _clamped(gate, up, limit):
    """gate <= limit and |up| <= limit; comparisons, so that NaN stays NaN."""
    if float("inf") > limit:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
    return gate, up


@triton.jit
def _tanh(x):
    """tanh; the exponential of a large argument is infinite, and 1 is then exact."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
