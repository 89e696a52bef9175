"""Every routing method in numpy, as a server computes it, for clients that shard by experts.

T tokens, E experts of the model, K experts a row, G groups, N experts a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expertd_client.errors import ExpertdError, InvalidArgument, NoUsablePlan
from expertd_wire.tensors import WireError, WireTensor, checked_tensor, to_numpy
from expertd_wire.v1 import experts_pb2 as pb

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Chosen = tuple[NDArray[np.int32], Floats]

_SOFTPLUS_END = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """One layer's routing settings; eps None means the method's own."""

    method: str
    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    scale: float = 1.0
    renormalize: bool = True
    eps: float | None = None
    group_fill: float = -np.inf
    group_score: str = "top2"
    bias: Floats | None = None


def route(
    method: str,
    logits: NDArray[Any],
    *,
    bias: NDArray[Any] | None = None,
    top_k: int,
    n_group: int | None = None,
    topk_group: int | None = None,
    scale: float = 1.0,
    renormalize: bool = True,
    eps: float | None = None,
    group_fill: float | None = None,
    group_score: str = "top2",
) -> Chosen:
    """Experts of each row, best first, and their weights: (ids [T, K] int32, weights float32).

    The arguments are those of the server's expertd.routing.route, arrays numpy's. Raises
    InvalidArgument for settings or logits that make no sense.
    """
    router = Router(
        method=str(method),
        num_experts=logits.shape[1] if logits.ndim == 2 else 0,
        top_k=top_k,
        n_group=n_group or 1,
        topk_group=topk_group or n_group or 1,
        scale=scale,
        renormalize=renormalize,
        eps=eps,
        group_fill=-np.inf if group_fill is None else group_fill,
        group_score=group_score,
        bias=None if bias is None else bias.astype(np.float32),
    )
    if wrong := _wrong(router):
        raise InvalidArgument(f"routing settings make no sense: {', '.join(wrong)} of {router}")
    return route_for(router, logits)


def router_of(layer: pb.LayerInfo) -> Router:
    """The settings that a server tells of its layer.

    Raises NoUsablePlan if logits cannot be routed here, ExpertdError for settings that make no
    sense.
    """
    told = layer.routing
    if told.method not in FORMULAS:
        raise NoUsablePlan(
            f"layer {layer.model}/{layer.layer}: routing method {told.method or 'none'!r:.60} "
            "cannot be computed by this client; send topk_ids and topk_weights"
        )
    router = Router(
        method=told.method,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        n_group=told.n_group or 1,
        topk_group=told.topk_group or told.n_group or 1,
        scale=told.routed_scaling_factor,
        renormalize=told.renormalize,
        eps=told.eps if told.HasField("eps") else None,
        group_fill=_fill(told.group_fill),
        group_score=told.group_score or "top2",
        bias=_bias(told.correction_bias) if told.HasField("correction_bias") else None,
    )
    if wrong := _wrong(router):
        raise ExpertdError(f"the server's routing makes no sense: {', '.join(wrong)} of {router}")
    return router


def route_for(router: Router, logits: NDArray[Any]) -> Chosen:
    """route with a layer's own settings.

    logits [T, E] float32, bfloat16 or float16; -inf masks an expert. Ties go to the lower id; the
    routed scale is in the weights. Raises InvalidArgument for logits that no row can be chosen of.
    """
    logits_TE = _checked_logits(router, logits)
    formula = FORMULAS[router.method]
    score_TE = formula.score(logits_TE)
    key_TE = score_TE if formula.by_score else logits_TE
    if router.bias is not None:
        key_TE = key_TE + router.bias
    key_TE = np.where(np.isneginf(logits_TE), np.float32(-np.inf), key_TE)
    if router.n_group > 1:
        key_TE = _within_groups(key_TE, router)
    ids_TK = _descending(key_TE, router.top_k)
    nobody_TK = np.isneginf(np.take_along_axis(key_TE, ids_TK, axis=1))
    score_TK = np.where(nobody_TK, np.float32(0), np.take_along_axis(score_TE, ids_TK, axis=1))
    finish = formula.finish if router.renormalize or not formula.asked else _as_is
    eps = np.float32(formula.eps if router.eps is None else router.eps)
    weights_TK = finish(score_TK, eps) * np.float32(router.scale)
    return ids_TK.astype(np.int32), weights_TK.astype(np.float32)


def _checked_logits(router: Router, logits: NDArray[Any]) -> Floats:
    if logits.ndim != 2 or logits.shape[1] != router.num_experts:
        accepted = f"[tokens, {router.num_experts}]"
        raise InvalidArgument(
            f"router_logits: shape {list(logits.shape)} given, {accepted} accepted"
        )
    logits_TE = logits.astype(np.float32)
    finite_TE = np.isfinite(logits_TE)
    good_T = (finite_TE | np.isneginf(logits_TE)).all(axis=1)
    good_T &= finite_TE.sum(axis=1) >= router.top_k
    if not good_T.all():
        raise InvalidArgument(
            f"router_logits: row {int(np.argmin(good_T))} has NaN or +inf, or fewer than "
            f"{router.top_k} finite values (-inf masks an expert)"
        )
    return logits_TE


def _descending(key_TE: Floats, k: int) -> Ints:
    """Indices [T, k] of the largest keys, best first; equal keys, -0 and +0 too, by index."""
    experts = key_TE.shape[1]
    bits = (key_TE + np.float32(0)).view(np.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    unique = (ordered << 32) | np.arange(experts - 1, -1, -1)
    best = np.argpartition(unique, experts - k, axis=1)[:, experts - k :]
    order = np.argsort(-np.take_along_axis(unique, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1).astype(np.int64)


def _within_groups(key_TE: Floats, router: Router) -> Floats:
    """Keys with those outside the best groups replaced; masks stay masks."""
    key_TGN = key_TE.reshape(len(key_TE), router.n_group, -1)
    chosen = _descending(GROUP_SCORES[router.group_score](key_TGN), router.topk_group)
    keep_TG = np.zeros(key_TGN.shape[:2], np.bool_)
    np.put_along_axis(keep_TG, chosen, True, axis=1)
    keep_TGN = keep_TG[:, :, None] | np.isneginf(key_TGN)
    kept: Floats = np.where(keep_TGN, key_TGN, np.float32(router.group_fill)).reshape(key_TE.shape)
    return kept


def _two_best(key_TGN: Floats) -> Floats:
    two = np.partition(key_TGN, key_TGN.shape[2] - 2, axis=2)[:, :, -2:]
    best: Floats = two[:, :, 1] + two[:, :, 0]
    return best


def _best(key_TGN: Floats) -> Floats:
    best: Floats = key_TGN.max(axis=2)
    return best


GROUP_SCORES: dict[str, Callable[[Floats], Floats]] = {"top2": _two_best, "max": _best}


def _raw(logits_TE: Floats) -> Floats:
    return logits_TE


def _softmax(logits_TE: Floats) -> Floats:
    powers = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True, initial=-np.inf))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(logits_TE: Floats) -> Floats:
    with np.errstate(over="ignore"):
        score: Floats = np.float32(1) / (np.float32(1) + np.exp(-logits_TE))
    return score


def _sqrt_softplus(logits_TE: Floats) -> Floats:
    curved = np.log1p(np.exp(np.minimum(logits_TE, np.float32(_SOFTPLUS_END))))
    score: Floats = np.sqrt(np.where(logits_TE > _SOFTPLUS_END, logits_TE, curved))
    return score


def _as_is(score_TK: Floats, _: np.float32) -> Floats:
    return score_TK


def _over_sum(score_TK: Floats, eps: np.float32) -> Floats:
    with np.errstate(invalid="ignore"):
        shares: Floats = score_TK / (score_TK.sum(axis=1, keepdims=True) + eps)
    return shares


def _over_clamped_sum(score_TK: Floats, eps: np.float32) -> Floats:
    with np.errstate(invalid="ignore"):
        shares: Floats = score_TK / np.maximum(score_TK.sum(axis=1, keepdims=True), eps)
    return shares


def _over_chosen(score_TK: Floats, _: np.float32) -> Floats:
    return _softmax(score_TK)


class Formula(NamedTuple):
    """Scores of the logits, whether they (or the raw logits) decide, weights of the chosen.

    asked: finish is left out where a layer's renormalize is false; eps is finish's default.
    """

    score: Callable[[Floats], Floats]
    by_score: bool
    finish: Callable[[Floats, np.float32], Floats]
    asked: bool = False
    eps: float = 0.0


FORMULAS: dict[str, Formula] = {
    "Default": Formula(_softmax, True, _as_is),
    "Renormalize": Formula(_raw, False, _over_chosen),
    "RenormalizeNaive": Formula(_raw, False, _over_chosen),
    "GroupedSoftmax": Formula(_softmax, True, _over_sum, asked=True, eps=1e-20),
    "SoftmaxBias": Formula(_softmax, True, _over_clamped_sum, asked=True, eps=1e-12),
    "DeepSeekV3": Formula(_sigmoid, True, _over_sum, asked=True, eps=1e-20),
    "MiniMax2": Formula(_sigmoid, True, _over_sum, eps=1e-20),
    "SigmoidRenorm": Formula(_sigmoid, True, _over_clamped_sum, asked=True, eps=1e-20),
    "Sigmoid": Formula(_sigmoid, True, _as_is),
    "TopKSigmoid": Formula(_sigmoid, False, _as_is),
    "Llama4": Formula(_sigmoid, False, _as_is),
    "DeepSeekV4": Formula(_sqrt_softplus, True, _over_sum, asked=True, eps=1e-20),
    "TopK": Formula(_raw, False, _as_is),
}


def _fill(text: str) -> float:
    try:
        return float(text or "-inf")
    except ValueError:
        raise ExpertdError(f"the server's group_fill {text!r:.60} is no number") from None


def _bias(told: pb.Tensor) -> Floats:
    try:
        tensor: WireTensor = checked_tensor(
            "correction_bias", told.dtype, tuple(told.shape), memoryview(told.data)
        )
    except WireError as problem:
        raise ExpertdError(f"the server's routing cannot be read: {problem}") from problem
    return to_numpy(tensor).astype(np.float32)


def _wrong(router: Router) -> list[str]:
    """The names of settings that cannot be meant."""
    groups, experts = router.n_group, router.num_experts
    size = experts // groups if groups > 0 else 0
    wrong = {
        "method": router.method not in FORMULAS,
        "top_k": not 1 <= router.top_k <= experts,
        "n_group": groups < 1 or size * groups != experts,
        "topk_group": not 1 <= router.topk_group <= groups,
        "group_score": router.group_score not in GROUP_SCORES
        or (router.group_score == "top2" and groups > 1 and size < 2),
        "bias": router.bias is not None and router.bias.shape != (experts,),
    }
    return [name for name, is_wrong in wrong.items() if is_wrong]
