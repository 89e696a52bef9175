"""Every routing method written again, one row at a time in double precision with plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Row = Sequence[float]


def softmax(row: Row) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def sigmoid(row: Row) -> list[float]:
    return [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in row]


def sqrt_softplus(row: Row) -> list[float]:
    return [math.sqrt(max(x, 0.0) + math.log1p(math.exp(-abs(x)))) for x in row]


def raw(row: Row) -> list[float]:
    return list(row)


def best(key: Row, count: int) -> list[int]:
    """Indices of the largest, ties to the lower one."""
    return sorted(range(len(key)), key=lambda i: (-key[i], i))[:count]


SCORES: dict[str, tuple[Callable[[Row], list[float]], bool]] = {
    "Default": (softmax, True),
    "Renormalize": (raw, False),
    "RenormalizeNaive": (softmax, True),
    "GroupedSoftmax": (softmax, True),
    "SoftmaxBias": (softmax, True),
    "DeepSeekV3": (sigmoid, True),
    "MiniMax2": (sigmoid, True),
    "SigmoidRenorm": (sigmoid, True),
    "Sigmoid": (sigmoid, True),
    "TopKSigmoid": (sigmoid, False),
    "Llama4": (sigmoid, False),
    "DeepSeekV4": (sqrt_softplus, True),
    "TopK": (raw, False),
}
SUM = {"DeepSeekV3": 1e-20, "MiniMax2": 1e-20, "DeepSeekV4": 1e-20, "GroupedSoftmax": 1e-20}
CLAMPED = {"SigmoidRenorm": 1e-20, "SoftmaxBias": 1e-12}


def keys_of(
    method: str,
    row: Row,
    bias: Row | None,
    n_group: int,
    topk_group: int,
    group_score: str = "top2",
) -> list[float]:
    """What is compared; experts of the other groups have -inf."""
    score, by_score = SCORES[method]
    key = score(row) if by_score else list(row)
    if bias is not None:
        key = [k + b for k, b in zip(key, bias, strict=True)]
    size = len(key) // n_group
    groups = [sorted(key[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
    chosen = best([sum(group[:2]) for group in groups], topk_group)
    return [k if i // size in chosen else -math.inf for i, k in enumerate(key)]


def weights_of(
    method: str, row: Row, ids: Sequence[int], scale: float, renormalize: bool, eps: float | None
) -> list[float]:
    """The weights of the chosen."""
    picked = [SCORES[method][0](row)[i] for i in ids]
    if method == "Renormalize":
        return [w * scale for w in softmax(picked)]
    total = 1.0
    if method == "RenormalizeNaive":
        total = sum(picked)
    elif method in SUM and (renormalize or method == "MiniMax2"):
        total = sum(picked) + (SUM[method] if eps is None else eps)
    elif method in CLAMPED and renormalize:
        total = max(sum(picked), CLAMPED[method] if eps is None else eps)
    return [w / total * scale for w in picked]
