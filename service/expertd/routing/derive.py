"""From a model's settings to a routing method by name; imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from expertd.core import RoutingMethod, RoutingSpec
from expertd.core.routing import Scoring
from expertd.errors import FailedPrecondition, InvalidArgument
from expertd.routing.checks import check_spec
from expertd.routing.families import known_types, rows_of
from expertd.routing.family import Config, FamilyRow, Key

SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid", "sqrtsoftplus")
NESTS = ("text_config", "thinker_config", "language_config", "llm_config")
WORKS = "route in the caller and send topk_ids and topk_weights"


class Branch(NamedTuple):
    """Settings and the method that computes them; None is any, groups counts them (0: not set)."""

    scoring: Scoring
    bias: bool | None
    groups: str | None
    renormalize: bool | None
    method: RoutingMethod


# The first branch that fits. "one" group and "none" differ in the name that kernels know only.
BRANCHES: tuple[Branch, ...] = (
    Branch("softmax", True, "many", None, RoutingMethod.UNSPECIFIED),
    Branch("softmax", True, None, None, RoutingMethod.SOFTMAX_BIAS),
    Branch("softmax", False, "many", None, RoutingMethod.GROUPED_SOFTMAX),
    Branch("softmax", False, None, True, RoutingMethod.RENORMALIZE_NAIVE),
    Branch("softmax", False, None, False, RoutingMethod.DEFAULT),
    Branch("sigmoid", None, "many", None, RoutingMethod.DEEPSEEK_V3),
    Branch("sigmoid", True, "one", None, RoutingMethod.DEEPSEEK_V3),
    Branch("sigmoid", True, None, True, RoutingMethod.MINIMAX2),
    Branch("sigmoid", True, None, False, RoutingMethod.DEEPSEEK_V3),
    Branch("sigmoid", False, None, True, RoutingMethod.SIGMOID_RENORM),
    Branch("sigmoid", False, None, False, RoutingMethod.SIGMOID),
    Branch("sqrtsoftplus", None, "many", None, RoutingMethod.UNSPECIFIED),
    Branch("sqrtsoftplus", None, None, None, RoutingMethod.DEEPSEEK_V4),
)


def derive_method(
    scoring: str, *, renormalize: bool = True, bias: bool = False, n_group: int | None = None
) -> RoutingMethod:
    """The method of these settings, Unspecified if none computes them.

    Raises InvalidArgument for an unknown scoring.
    """
    groups = "many" if (n_group or 0) > 1 else "one" if n_group == 1 else "none"
    for branch in BRANCHES:
        given = (scoring, bias, groups, renormalize)
        if all(want in (None, have) for want, have in zip(branch[:4], given, strict=True)):
            return branch.method
    raise InvalidArgument(f"scoring={scoring!r}; accepted: {', '.join(SCORINGS)}")


def family_routing(config: Config, layer: int | None = None) -> RoutingSpec:
    """The router of a model, from its config.json (or that of its language part).

    Raises InvalidArgument for an unknown architecture or a wrong setting, and FailedPrecondition
    for a router that does not choose by logits as any method does; the text says what works.
    """
    config = _language_part(config)
    row = _row(config)
    _refuse_hashed(config, layer)
    scoring = _scoring(row.scoring, config)
    renormalize = _flag(row.renormalize, config)
    bias = _flag(row.bias, config)
    n_group = (row.n_group.whole(config) if row.n_group else None) or None
    spec = RoutingSpec(
        method=row.method
        or derive_method(scoring, renormalize=renormalize, bias=bias, n_group=n_group),
        scoring=scoring,
        top_k=_top_k(row, config, layer),
        renormalize=renormalize,
        n_group=n_group,
        topk_group=(row.topk_group.whole(config) if n_group and row.topk_group else None),
        routed_scaling_factor=_number(row.scale, config, 1.0),
        scale_site=row.scale_site,
        weight_site=row.weight_site,
        eps=row.eps.number(config) if isinstance(row.eps, Key) else row.eps,
        bias=bias,
        group_fill=row.group_fill if n_group and n_group > 1 else None,
        group_score=row.group_score,
    )
    check_spec(spec, None)
    return spec


def _language_part(config: Config) -> Config:
    """The innermost language model's config, under its own model_type or that of its parent."""
    nested = next((config[key] for key in NESTS if isinstance(config.get(key), dict)), None)
    if nested is None:
        return config
    return _language_part({"model_type": config.get("model_type"), **nested})


def _row(config: Config) -> FamilyRow:
    model_type = str(config.get("model_type"))
    rows = rows_of(model_type)
    if not rows:
        raise InvalidArgument(
            f"config.json: model_type {model_type!r} is not known; an explicit spec needs routing "
            "(or scoring and renormalize), top_k, n_group and topk_group if it has groups, "
            f"routed_scaling_factor, bias; known: {', '.join(known_types())}"
        )
    row = next((row for row in rows if row.means(config)), None)
    if row is None:
        raise InvalidArgument(f"config.json of {model_type!r}: {_conditions(rows, config)}")
    if row.refusal:
        raise FailedPrecondition(f"model_type {model_type!r}: {row.refusal}; {WORKS}")
    return row


def _conditions(rows: tuple[FamilyRow, ...], config: Config) -> str:
    """What the settings are that tell the rows apart, and what each row takes."""
    keys = {key: None for row in rows for key, _ in row.when}
    given = ", ".join(f"{key.names[0]}={key.read(config)!r}" for key in keys)
    accepted = (" with ".join(f"{key.names[0]}={v!r}" for key, v in row.when) for row in rows)
    return f"{given}; accepted: {' or '.join(accepted)}"


def _refuse_hashed(config: Config, layer: int | None) -> None:
    kinds = config.get("mlp_layer_types")
    if layer is not None and isinstance(kinds, list) and kinds[layer : layer + 1] == ["hash_moe"]:
        raise FailedPrecondition(f"layer {layer} chooses its experts by token id; {WORKS}")


def _top_k(row: FamilyRow, config: Config, layer: int | None) -> int:
    top_k = row.top_k.whole(config, layer)
    if not top_k:
        raise InvalidArgument(
            f"config.json: {' or '.join(row.top_k.names)} is {top_k!r}; accepted: from 1 on"
        )
    return top_k


def _scoring(setting: Scoring | Key, config: Config) -> Scoring:
    word = setting.read(config) if isinstance(setting, Key) else setting
    for scoring in SCORINGS:
        if scoring == word:
            return scoring
    raise InvalidArgument(f"config.json: scoring={word!r}; accepted: {', '.join(SCORINGS)}")


def _flag(setting: bool | Key, config: Config) -> bool:
    return setting.flag(config) if isinstance(setting, Key) else setting


def _number(setting: Key | None, config: Config, default: float) -> float:
    value = setting.number(config) if setting else None
    return default if value is None else value
