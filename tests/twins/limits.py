"""Which experts, top_k and groups each routing method has a kernel for: section 2.2."""

from __future__ import annotations

from dataclasses import dataclass

from tests.twins.checks import Arguments, require
from tests.twins.enums import RoutingMethodType
from tests.twins.sizes import Sizes

M = RoutingMethodType
Tiers = tuple[tuple[int, int], ...]

_SMALL: Tiers = ((256, 8),)
_RENORMALIZE: Tiers = ((2048, 32),)
_SIGMOID_BIAS: Tiers = ((1024, 32),)
# (experts, top_k) that kernels were compiled for, without the pairs that a larger one covers;
# grouped DeepSeekV3 has rules instead.
TIERS: dict[RoutingMethodType, Tiers] = {
    M.Default: _SMALL,
    M.Renormalize: _RENORMALIZE,
    M.DeepSeekV3: _SIGMOID_BIAS,
    M.Llama4: ((128, 1),),
    M.RenormalizeNaive: _RENORMALIZE,
    M.TopK: _SMALL,
    M.SigmoidRenorm: _SMALL,
    M.MiniMax2: _SIGMOID_BIAS,
    M.Sigmoid: _SMALL,
    M.TopKSigmoid: _SMALL,
}
PRECOMPUTED: Tiers = ((2048, 32),)
BIAS_DEREFERENCED = frozenset({M.DeepSeekV3, M.MiniMax2})
WITHOUT_GROUPS = frozenset(TIERS) - {M.DeepSeekV3, M.Llama4}
TOP_K_AT_MOST_32 = frozenset(
    {M.Renormalize, M.RenormalizeNaive, M.SigmoidRenorm, M.Sigmoid, M.TopKSigmoid}
)


@dataclass(frozen=True)
class Groups:
    """n_group and topk_group as the launcher reads them: None is 0."""

    count: int
    chosen: int

    @property
    def grouped(self) -> bool:
        return self.count > 1


def groups(args: Arguments) -> Groups:
    values = []
    for name in ("n_group", "topk_group"):
        values.append(0 if args.values[name] is None else args.whole(name, 0, 1 << 16))
    return Groups(*values)


def method(args: Arguments) -> RoutingMethodType:
    """The routing method; raises ContractError for an int without a kernel."""
    known = args.whole("routing_method_type", 0, max(TIERS))
    return RoutingMethodType(known)


def check_logits(chosen: RoutingMethodType, size: Sizes, group: Groups) -> None:
    """Limits of the method when the kernel routes by itself."""
    if chosen in WITHOUT_GROUPS:
        _without_groups(chosen, group)
    if chosen is M.Llama4:
        require(size.top_k == 1, "top_k", size.top_k, "1 for Llama4")
    if chosen is M.DeepSeekV3 and group.grouped:
        _grouped(size, group)
        return
    _tier(TIERS[chosen], chosen.name, size)


def check_precomputed(chosen: RoutingMethodType, size: Sizes, group: Groups) -> None:
    """Limits of the permutation, and what the method's branch still checks."""
    _tier(PRECOMPUTED, "precomputed ids", size)
    if chosen is M.Llama4:
        require(size.top_k == 1, "top_k", size.top_k, "1 for Llama4, also when routed")
    if chosen is M.DeepSeekV3 and group.grouped:
        require(size.top_k <= 22, "top_k", size.top_k, "at most 22 for DeepSeekV3")
        require(group.chosen <= 4, "topk_group", group.chosen, "at most 4")


def check_fp8_block(chosen: RoutingMethodType, size: Sizes, group: Groups) -> None:
    """What the FP8 block launcher checks once more, for precomputed routing too."""
    require(size.experts % 4 == 0, "num_experts", size.experts, "a multiple of 4 on fp8 block")
    require(size.experts > size.top_k, "top_k", size.top_k, f"less than {size.experts} experts")
    if chosen is not M.DeepSeekV3:
        _without_groups(chosen, group)
    if chosen in TOP_K_AT_MOST_32:
        require(size.top_k <= 32, "top_k", size.top_k, "at most 32")
    if chosen is M.Llama4:
        require(size.top_k == 1, "top_k", size.top_k, "1 for Llama4")
    if chosen is M.DeepSeekV3:
        require(group.count >= 1, "n_group", group.count, "at least 1 for DeepSeekV3 on fp8 block")
        _group_rules(size, group)


def _grouped(size: Sizes, group: Groups) -> None:
    require(size.experts % 4 == 0, "num_experts", size.experts, "a multiple of 4")
    require(size.experts <= 512, "num_experts", size.experts, "at most 512 with groups")
    require(group.count <= 8, "n_group", group.count, "at most 8")
    _group_rules(size, group)
    each = size.experts // group.count
    require(each <= 32, "n_group", group.count, f"at most 32 experts a group, not {each}")


def _group_rules(size: Sizes, group: Groups) -> None:
    require(size.experts % group.count == 0, "n_group", group.count, f"a divisor of {size.experts}")
    most = min(4, group.count)
    require(1 <= group.chosen <= most, "topk_group", group.chosen, f"1 to {most}")
    top_k = 8 if size.experts <= 384 else 22
    require(size.top_k <= top_k, "top_k", size.top_k, f"at most {top_k} of {size.experts} experts")
    held = group.chosen * size.experts // group.count
    require(size.top_k < held, "top_k", size.top_k, f"less than the {held} experts of the groups")


def _without_groups(chosen: RoutingMethodType, group: Groups) -> None:
    for name, value in (("n_group", group.count), ("topk_group", group.chosen)):
        require(value <= 1, name, value, f"None, 0 or 1 for {chosen.name}")


def _tier(tiers: Tiers, what: str, size: Sizes) -> None:
    fits = any(size.experts <= experts and size.top_k <= top_k for experts, top_k in tiers)
    given = f"E={size.experts} K={size.top_k}"
    require(fits, "top_k", given, f"a compiled tier (E, K) of {what}: {tiers}")
