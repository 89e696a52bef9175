"""The MoE layers of a checkpoint and what each of them is, from headers alone; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from expertd.core import LayerSpec
from expertd.errors import FailedPrecondition, InvalidArgument, NotFound
from expertd.routing.derive import family_routing
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.families import family_of
from expertd.weights.family import Family
from expertd.weights.formats import Format, layer_format


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint with its family, its text config and the prefix of every MoE layer."""

    checkpoint: Checkpoint
    family: Family
    config: Mapping[str, Any]
    prefixes: Mapping[int, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Model:
        """Find the layers; raises FailedPrecondition for an unknown family or none of its names."""
        config = text_config(checkpoint.config)
        family = family_of(config)
        return cls(checkpoint, family, config, _prefixes(checkpoint, family))

    def prefix(self, layer: int) -> str:
        """What stands before the names of a layer; raises NotFound naming the layers there are."""
        if layer not in self.prefixes:
            raise NotFound(
                f"{self.checkpoint.root}: layer {layer} has no routed experts; "
                f"layers that have: {ranges(self.prefixes)}"
            )
        return self.prefixes[layer]

    def format(self, layer: int) -> Format:
        """How the experts of a layer are stored."""
        return layer_format(self.checkpoint, self.config, self.family, self.prefix(layer))


def layer_specs(
    checkpoint: Checkpoint,
    layers: Collection[int] | None = None,
    experts: tuple[int, int] | None = None,
) -> dict[int, LayerSpec]:
    """The layers asked for, by number (all of the model's own stack when None).

    experts [begin, end) limits what is held. Raises NotFound for a layer without routed experts,
    InvalidArgument for a range outside the model, FailedPrecondition for what is not supported.
    """
    model = Model.of(checkpoint)
    wanted = _own_layers(model) if layers is None else sorted(layers)
    return {layer: layer_spec(model, layer, experts) for layer in wanted}


def layer_spec(model: Model, layer: int, experts: tuple[int, int] | None = None) -> LayerSpec:
    """What one layer is; raises as layer_specs does."""
    family, config = model.family, model.config
    prefix = model.prefix(layer)
    count = family.number(config, family.experts, layer)
    begin, end = (0, count) if experts is None else experts
    if not 0 <= begin < end <= count:
        raise InvalidArgument(f"experts {begin}-{end - 1} asked, layer {layer} has 0-{count - 1}")
    hashed = (
        family.hash_table is not None and prefix + family.hash_table in model.checkpoint.tensors
    )
    return LayerSpec(
        hidden=family.number(config, family.hidden, layer),
        intermediate=family.number(config, family.intermediate, layer),
        num_experts=count,
        expert_begin=begin,
        expert_end=end,
        activation=family.activation.read(config, layer),
        quant=model.format(layer).quant,
        routing=None if hashed else family_routing(config),
        expert_bias=family.expert_bias,
        routing_refusal=HASHED if hashed else None,
    )


HASHED = (
    "this layer chooses its experts by token id, which a call does not carry; "
    "send topk_ids and topk_weights"
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config, with the quantisation wherever it is declared."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    shared = {key: config[key] for key in ("quantization_config",) if key in config}
    return {**nested, **shared}


def ranges(numbers: Collection[int]) -> str:
    """Whole numbers as "0-3,7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs) or "none"


def _own_layers(model: Model) -> list[int]:
    """Layers below num_hidden_layers: those behind them predict further tokens (MTP)."""
    depth = model.config.get("num_hidden_layers")
    own = [n for n in sorted(model.prefixes) if not isinstance(depth, int) or n < depth]
    if not own:
        expected = " or ".join(layout.down for layout in model.family.layouts)
        raise FailedPrecondition(
            f"{model.checkpoint.root}: no tensor is called layers.N.{expected}, as the experts of "
            f"model_type {model.config.get('model_type')!r} are"
        )
    return own


def _prefixes(checkpoint: Checkpoint, family: Family) -> dict[int, str]:
    prefixes: dict[int, str] = {}
    patterns = [layout.finds() for layout in family.layouts]
    for name in checkpoint.tensors:
        found = next((m for p in patterns if (m := p.match(name))), None)
        if found is None:
            continue
        root, layer = found.groups()
        prefix = f"{root}layers.{layer}."
        if prefixes.setdefault(int(layer), prefix) != prefix:
            raise FailedPrecondition(
                f"{checkpoint.root}: layer {layer} is there twice, "
                f"as {prefixes[int(layer)]} and {prefix}"
            )
    return prefixes
