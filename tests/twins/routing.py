"""Routing as the kernels do it: from logits by method, or ids and weights that came ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.twins import limits
from tests.twins.checks import Arguments, ContractError, require
from tests.twins.enums import RoutingMethodType
from tests.twins.limits import Groups
from tests.twins.sizes import Sizes
from torch import Tensor

M = RoutingMethodType
FLOAT = (torch.float32, torch.bfloat16)
EPSILON = 1e-20
LLAMA4_WARP_TOKENS = 3
"""Up to here Llama4 routes in one warp, whose kernel writes global ids for local ones."""


@dataclass(frozen=True)
class Choice:
    """Global ids [T, K], weights [T, K] fp32, and the expert whose weights each pair reads.

    local is -1 for a dropped pair; above the last local expert it reads past the weights.
    """

    ids: Tensor
    weights: Tensor
    local: Tensor


def choose(args: Arguments, size: Sizes, *, pair: bool = False) -> Choice:
    """Checks the routing arguments and routes; pair: the entry takes (ids, weights) too."""
    chosen = limits.method(args)
    group = limits.groups(args)
    bias = args.optional("routing_bias", FLOAT, [size.experts])
    _check_factor(args)
    if args.routed:
        limits.check_precomputed(chosen, size, group)
        ids, weights = _precomputed(args, size, pair=pair)
        _check_duplicates(ids, weights, size)
        return Choice(ids, weights, _local(ids, size))
    limits.check_logits(chosen, size, group)
    logits = args.tensor("routing_logits", FLOAT, [size.tokens, size.experts])
    ids, weights = _route(args, chosen, logits, bias, size, group)
    weights = weights.to(torch.bfloat16).float()
    _replay(args, ids, size)
    confused = chosen is M.Llama4 and size.tokens <= LLAMA4_WARP_TOKENS
    local = _local(ids, size)
    return Choice(ids, weights, torch.where(local < 0, local, ids) if confused else local)


def _precomputed(args: Arguments, size: Sizes, *, pair: bool) -> tuple[Tensor, Tensor]:
    shape = [size.tokens, size.top_k]
    given = args.topk_ids
    if isinstance(given, tuple):
        require(pair and len(given) == 2, "topk_ids", "a tuple", _forms(pair))
        args.check("topk_ids", given[0], [torch.int32], shape)
        args.check("topk_weights", given[1], FLOAT, shape)
        return given[0].to(torch.int16).long(), given[1].float()
    packed = args.tensor("topk_ids", [torch.int32], shape)
    weights = (packed << 16 >> 16).to(torch.int16).view(torch.bfloat16)
    return (packed >> 16).long(), weights.float()


def _forms(pair: bool) -> str:
    return "packed int32, or (ids, weights)" if pair else "packed int32: (id << 16) | bf16 bits"


def _check_duplicates(ids: Tensor, weights: Tensor, size: Sizes) -> None:
    """Duplicates are undefined, save where every weight is too small to show a difference."""
    inside = (ids >= 0) & (ids < size.experts)
    visible = weights.abs() >= torch.finfo(torch.float32).tiny
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & inside.unsqueeze(2)
    other = ~torch.eye(size.top_k, dtype=torch.bool, device=ids.device)
    clash = (same & other & (visible.unsqueeze(1) | visible.unsqueeze(2))).flatten(1).any(1)
    if bool(clash.any()):
        row = int(clash.nonzero()[0])
        raise ContractError("topk_ids", ids[row].tolist(), "no expert twice in one token")


def _local(ids: Tensor, size: Sizes) -> Tensor:
    """The local expert of each id, -1 for -1, for an id outside E and for another rank's."""
    local = ids - size.offset
    return torch.where((local >= 0) & (local < size.local), local, torch.full_like(local, -1))


def _check_factor(args: Arguments) -> None:
    factor = args.routed_scaling_factor
    number = factor is None or isinstance(factor, (int, float))
    require(number, "routed_scaling_factor", factor, "a float or None")


def _replay(args: Arguments, ids: Tensor, size: Sizes) -> None:
    replay = args.routing_replay_out
    if replay is None:
        return
    rows = max(size.tokens, replay.shape[0] if isinstance(replay, Tensor) and replay.ndim else 0)
    buffer = args.tensor("routing_replay_out", [torch.int16], [rows, size.top_k])
    buffer[: size.tokens] = ids.to(torch.int16)


def _route(
    args: Arguments,
    chosen: RoutingMethodType,
    logits: Tensor,
    bias: Tensor | None,
    size: Sizes,
    group: Groups,
) -> tuple[Tensor, Tensor]:
    if chosen in limits.BIAS_DEREFERENCED:
        factor = 1.0 if args.routed_scaling_factor is None else float(args.routed_scaling_factor)
        return _sigmoid_bias(logits.float(), bias, size, group, factor)
    key, weigh = METHODS[chosen]
    norm = args.norm_topk_prob is not False
    values = logits.float()
    order = key(values)[:, : size.top_k]
    return order, weigh(values, order, norm)


def sigmoid(values: Tensor) -> Tensor:
    """0.5 * tanh(x / 2) + 0.5 in fp32: the kernels' formula when built without fast math."""
    return 0.5 * torch.tanh(0.5 * values) + 0.5


def by_logit(values: Tensor) -> Tensor:
    """Experts by raw logit, descending: +NaN first, -0 below +0, -NaN last, ties to the lower."""
    bits = values.contiguous().view(torch.int32)
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.sort(rank, dim=1, descending=True, stable=True).indices


def by_value(values: Tensor) -> Tensor:
    """Experts by value, descending: NaN first, zeros tie, ties to the lower."""
    return torch.sort(values + 0.0, dim=1, descending=True, stable=True).indices


def _softmax(values: Tensor) -> Tensor:
    return torch.softmax(values, dim=1)


def _gathered(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, bool], Tensor]:
    return lambda values, ids, norm: score(values).gather(1, ids)


def _renormalized(values: Tensor, ids: Tensor, norm: bool) -> Tensor:
    return _softmax(values.gather(1, ids))


def _sigmoid_renormalized(values: Tensor, ids: Tensor, norm: bool) -> Tensor:
    chosen = sigmoid(values).gather(1, ids)
    if not norm:
        return chosen
    return chosen / torch.fmax(chosen.sum(1, keepdim=True), torch.tensor(EPSILON))


Key = Callable[[Tensor], Tensor]
Weigh = Callable[[Tensor, Tensor, bool], Tensor]

METHODS: dict[RoutingMethodType, tuple[Key, Weigh]] = {
    M.Default: (lambda values: by_value(_softmax(values)), _gathered(_softmax)),
    M.Renormalize: (by_logit, _renormalized),
    M.RenormalizeNaive: (by_logit, _renormalized),
    M.TopK: (by_logit, _gathered(lambda values: values)),
    M.TopKSigmoid: (by_logit, _gathered(sigmoid)),
    M.Llama4: (by_logit, _gathered(sigmoid)),
    M.Sigmoid: (lambda values: by_value(sigmoid(values)), _gathered(sigmoid)),
    M.SigmoidRenorm: (lambda values: by_value(sigmoid(values)), _sigmoid_renormalized),
}


def _sigmoid_bias(
    logits: Tensor, bias: Tensor | None, size: Sizes, group: Groups, factor: float
) -> tuple[Tensor, Tensor]:
    """MiniMax2 and DeepSeekV3: the bias selects, the plain sigmoid weighs."""
    scores = sigmoid(logits)
    if group.grouped:
        added = torch.zeros(size.experts) if bias is None else bias.to(torch.bfloat16).float()
        keys = _within_groups(scores + added.to(scores.device), size, group)
    else:
        require(bias is not None, "routing_bias", None, "a tensor: the kernel reads it unasked")
        assert bias is not None
        keys = scores + bias.float()
    ids = by_value(keys)[:, : size.top_k]
    chosen = scores.gather(1, ids)
    return ids, chosen * factor / (chosen.sum(1, keepdim=True) + EPSILON)


def _within_groups(keys: Tensor, size: Sizes, group: Groups) -> Tensor:
    """Keys with the groups that were not chosen at -inf; a group counts its best two."""
    grouped = keys.reshape(size.tokens, group.count, -1)
    best = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
    keep = torch.zeros_like(best, dtype=torch.bool)
    keep.scatter_(1, by_value(best)[:, : group.chosen], True)
    return grouped.masked_fill(~keep.unsqueeze(2), float("-inf")).reshape_as(keys)
