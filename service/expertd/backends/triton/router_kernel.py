"""The router's kernel: one program a row, from its logits to ids and weights.

Every comparison is of 64-bit keys that hold the order of a float32 above the place from the end, so
that no two are equal and ties go to the lower index, as routing.selection does it. Scores are made
with the same exp, division and square root that torch uses on the device: what ties there because
of rounding (saturated sigmoids) ties here.

A row is a tile [groups, members]; without groups it is one group.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter has no libdevice; numpy's functions behind tl's are exact enough."""

GONE = tl.constexpr(-(1 << 63))
"""A key below every expert's: what was chosen already, or is padding."""

NOBODY = tl.constexpr(-2139095041)
"""The upper half of -inf's key: chosen for want of others, its weight is 0."""

PLACE = tl.constexpr(0x7FFFFFFF)
SOFTPLUS_END = tl.constexpr(20.0)
"""Where softplus becomes the identity, as in torch."""
SOFTPLUS_TAIL = tl.constexpr(-80.0)


@triton.jit
def _exp(x):
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _log1p(x):
    if INTERPRETED:
        # log(1 + x) * x / ((1 + x) - 1) loses nothing of a small x.
        more = 1.0 + x
        lost = more == 1.0
        return tl.where(lost, x, tl.log(more) * (x / tl.where(lost, 1.0, more - 1.0)))
    else:
        return libdevice.log1p(x)


@triton.jit
def _score(logit, top, total, SCORE: tl.constexpr):
    """What SCORE makes of logits; top and total are the row's largest and its sum of exp."""
    if SCORE == "softmax":
        return tl.div_rn(_exp(logit - top), total)
    elif SCORE == "sigmoid":
        return tl.div_rn(1.0, 1.0 + _exp(-logit))
    elif SCORE == "sqrtsoftplus":
        # Far down it is exp(x / 2), which is still a normal number where exp(x) is not.
        far = logit < SOFTPLUS_TAIL
        power = _exp(tl.where(far, 0.5 * logit, tl.minimum(logit, SOFTPLUS_END)))
        root = tl.sqrt_rn(tl.where(logit > SOFTPLUS_END, logit, _log1p(power)))
        return tl.where(far, power, root)
    else:
        return logit


@triton.jit
def _ordered(value):
    """float32 → int32 of the same order, -0 and +0 alike."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unique(value, place):
    """Keys of which no two are equal; a higher place wins a tie."""
    return (_ordered(value).to(tl.int64) << 32) | place.to(tl.int64)


@triton.jit
def _value(key):
    """The float32 in a key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _in_best_groups(
    value, place, group, fill,
    GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_SCORE: tl.constexpr,
):  # fmt: skip
    """Values [G, N] with those outside the best groups replaced by fill; masks stay masks."""
    key = tl.where(place >= 0, _unique(value, place), GONE)
    best = tl.max(key, axis=1)
    score = _value(best)
    if GROUP_SCORE == "top2":
        score += _value(tl.max(tl.where(key == best[:, None], GONE, key), axis=1))
    left = tl.where(group < GROUPS, _unique(score, GROUPS - 1 - group), GONE)
    for _ in range(TOPK_GROUP):
        left = tl.where(left == tl.max(left, axis=0), GONE, left)
    keep = (left == GONE)[:, None] | (value == float("-inf"))
    return tl.where(keep, value, fill)


@triton.jit
def _largest(key, K: tl.constexpr, K_PAD: tl.constexpr):
    """The K largest keys of a tile, in descending order [K_PAD]."""
    slots = tl.arange(0, K_PAD)
    best = tl.zeros([K_PAD], tl.int64)
    for slot in range(K):
        largest = tl.max(key)
        best = tl.where(slots == slot, largest, best)
        key = tl.where(key == largest, GONE, key)
    return best


@triton.jit
def _finish(score, used, eps, FINISH: tl.constexpr):
    """The weights of the chosen experts' scores [K_PAD]."""
    if FINISH == "over_sum":
        return tl.div_rn(score, tl.sum(score, axis=0) + eps)
    elif FINISH == "over_clamped_sum":
        return tl.div_rn(score, tl.maximum(tl.sum(score, axis=0), eps))
    elif FINISH == "over_chosen":
        power = tl.where(used, _exp(score - tl.max(tl.where(used, score, float("-inf")))), 0.0)
        return tl.div_rn(power, tl.sum(power, axis=0))
    else:
        return score


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scale, eps, fill,
    EXPERTS: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr,
    GROUP_SCORE: tl.constexpr, SCORE: tl.constexpr, BY_SCORE: tl.constexpr, FINISH: tl.constexpr,
    BIASED: tl.constexpr, G_PAD: tl.constexpr, N_PAD: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """Row program_id(0): logits [T, E] and bias [E] → ids [T, K] int32, weights [T, K] float32."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * EXPERTS
    SIZE: tl.constexpr = EXPERTS // GROUPS
    group, member = tl.arange(0, G_PAD), tl.arange(0, N_PAD)
    expert = group[:, None] * SIZE + member[None, :]
    real = (group[:, None] < GROUPS) & (member[None, :] < SIZE)
    logit = tl.load(logits_ptr + expert, mask=real, other=float("-inf")).to(tl.float32)
    top, total = 0.0, 1.0
    if SCORE == "softmax":
        top = tl.max(logit)
        total = tl.sum(_exp(logit - top))
    value = logit
    if BY_SCORE:
        # Alone, softmax is compared before the division: it keeps the order, and rounds once less.
        ALONE: tl.constexpr = SCORE == "softmax" and GROUPS == 1 and not BIASED
        value = _score(logit, top, 1.0 if ALONE else total, SCORE)
    if BIASED:
        value += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
    value = tl.where(logit == float("-inf"), float("-inf"), value)
    place = tl.where(real, EXPERTS - 1 - expert, -1)
    if GROUPS > 1:
        value = _in_best_groups(value, place, group, fill, GROUPS, TOPK_GROUP, GROUP_SCORE)
    best = _largest(tl.where(real, _unique(value, place), GONE), K, K_PAD)

    slots = tl.arange(0, K_PAD)
    used = slots < K
    ids = EXPERTS - 1 - (best & PLACE).to(tl.int32)
    chosen = tl.load(logits_ptr + ids, mask=used, other=0.0).to(tl.float32)
    someone = used & ((best >> 32) != NOBODY)
    score = tl.where(someone, _score(chosen, top, total, SCORE), 0.0)
    weights = _finish(score, used, eps, FINISH) * scale
    tl.store(ids_ptr + row * K + slots, ids, mask=used)
    tl.store(weights_ptr + row * K + slots, weights, mask=used)
