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


def keys_of(method: str, row: Row, bias: Row | None) -> list[float]:
    """What is compared."""
    score, by_score = SCORES[method]
    key = score(row) if by_score else list(row)
    return key if bias is None else [k + b for k, b in zip(key, bias, strict=True)]


def group_scores(key: Row, n_group: int) -> list[float]:
    """The two best of each group, added."""
    size = len(key) // n_group
    return [sum(sorted(key[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]


def within_groups(key: Row, n_group: int, topk_group: int) -> list[float]:
    """Experts of the other groups have -inf."""
    chosen = best(group_scores(key, n_group), topk_group)
    size = len(key) // n_group
    return [k if i // size in chosen else -math.inf for i, k in enumerate(key)]


def groups_tie(key: Row, n_group: int, topk_group: int) -> bool:
    """Whether float32 may see a tie where the last group is chosen."""
    ranked = sorted(group_scores(key, n_group), reverse=True)
    return n_group > topk_group and math.isclose(
        ranked[topk_group - 1], ranked[topk_group], rel_tol=1e-5, abs_tol=1e-6 * abs(ranked[0])
    )


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
