"""The MoE layers of a checkpoint and what each of them is, from headers alone; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from expertd.core import LayerSpec
from expertd.core.routing import RoutingSpec
from expertd.errors import FailedPrecondition, InvalidArgument, NotFound
from expertd.routing.derive import NESTS, family_routing
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.declared import Declared, declared_formats
from expertd.weights.families import family_of
from expertd.weights.family import Family, positive
from expertd.weights.formats import PLAIN
from expertd.weights.shards import read_json


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
        config = language_config(checkpoint)
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

    def formats(self, layer: int) -> Declared:
        """The stored forms that the experts of a layer may have, all of one scheme.

        Raises FailedPrecondition for a quantisation that cannot be read.
        """
        prefix = self.prefix(layer)
        downs = [prefix + layout.down.replace("{e}", "0") for layout in self.family.layouts]
        return declared_formats(self.config, downs[0]) or _plain(
            self.checkpoint, prefix, self.family
        )


def layer_specs(
    checkpoint: Checkpoint,
    layers: Collection[int] | None = None,
    experts: tuple[int, int] | None = None,
) -> dict[int, LayerSpec]:
    """The layers asked for, by number (all of the model's own stack when None).

    experts [begin, end) limits what is held. Raises NotFound for a layer without routed experts,
    InvalidArgument for a range outside the model, FailedPrecondition for what is not supported.
    """
    found = survey(checkpoint, layers, experts)
    for refusal in found.refused.values():
        raise refusal
    return found.specs


@dataclass(frozen=True, slots=True)
class Survey:
    """What each layer is, or why that cannot be told."""

    specs: dict[int, LayerSpec]
    refused: dict[int, FailedPrecondition]


def survey(
    checkpoint: Checkpoint,
    layers: Collection[int] | None = None,
    experts: tuple[int, int] | None = None,
) -> Survey:
    """The layers that layer_specs has; one that is not supported leaves the others alone.

    Raises NotFound and InvalidArgument as layer_specs does, FailedPrecondition only for what is
    wrong with the whole checkpoint.
    """
    model = Model.of(checkpoint)
    found = Survey({}, {})
    for layer in _own_layers(model) if layers is None else sorted(layers):
        try:
            found.specs[layer] = layer_spec(model, layer, experts)
        except FailedPrecondition as refusal:
            found.refused[layer] = refusal
    return found


def layer_spec(model: Model, layer: int, experts: tuple[int, int] | None = None) -> LayerSpec:
    """What one layer is; raises as layer_specs does."""
    family, config = model.family, model.config
    _check_whole(model, layer)
    count = positive(family.experts, config, layer)
    begin, end = (0, count) if experts is None else experts
    if not 0 <= begin < end <= count:
        raise InvalidArgument(f"experts {begin}-{end - 1} asked, layer {layer} has 0-{count - 1}")
    routing, refusal = _routing(model, layer)
    return LayerSpec(
        hidden=positive(family.hidden, config, layer),
        intermediate=positive(family.width, config, layer),
        num_experts=count,
        expert_begin=begin,
        expert_end=end,
        activation=family.activation.read(config, layer),
        quant=model.formats(layer)[0].quant,
        routing=routing,
        expert_bias=family.expert_bias,
        routing_refusal=refusal,
    )


def _check_whole(model: Model, layer: int) -> None:
    """Raises FailedPrecondition if a file that holds tensors of the layer is broken."""
    prefix = model.prefix(layer)
    for name, why in model.checkpoint.broken.items():
        if name.startswith(prefix):
            raise FailedPrecondition(why)


def _routing(model: Model, layer: int) -> tuple[RoutingSpec | None, str | None]:
    """The layer's router, or why it takes top-k ids only."""
    prefix, tensors = model.prefix(layer), model.checkpoint.tensors
    if any(prefix + table in tensors for table in model.family.hash_table):
        return None, HASHED
    try:
        return family_routing(model.config, layer), None
    except FailedPrecondition as refusal:
        return None, str(refusal)


HASHED = (
    "this layer chooses its experts by token id, which a call does not carry; "
    "send topk_ids and topk_weights"
)


def language_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The language model's part of config.json, with the quantisation wherever it is declared."""
    config: dict[str, Any] = checkpoint.config
    quantization = config.get("quantization_config") or _modelopt_file(checkpoint)
    while nested := next((config[n] for n in NESTS if isinstance(config.get(n), dict)), None):
        config = {"model_type": config.get("model_type"), **nested}
        quantization = quantization or config.get("quantization_config")
    return {**config, "quantization_config": quantization}


def _modelopt_file(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The declaration that ModelOpt's older exports keep beside config.json."""
    if not (checkpoint.root / MODELOPT_FILE).exists():
        return None
    declared = read_json(checkpoint.root, MODELOPT_FILE).get("quantization")
    return {"quant_method": "modelopt", **declared} if isinstance(declared, dict) else None


MODELOPT_FILE = "hf_quant_config.json"


def _plain(checkpoint: Checkpoint, prefix: str, family: Family) -> Declared:
    """The form of plain weights: what the dtype of the first expert says."""
    names = [prefix + layout.part(layout.down, 0, "weight") for layout in family.layouts]
    name = next((n for n in names if n in checkpoint.tensors), names[0])
    entry = checkpoint.entry(name)
    if entry.dtype not in PLAIN:
        raise FailedPrecondition(
            f"{entry.file.path}: tensor {name!r} is {entry.dtype}, but config.json declares no "
            f"quantisation for it; plain weights are {', '.join(PLAIN)}"
        )
    return (PLAIN[entry.dtype],)


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
    for name in chain(checkpoint.tensors, checkpoint.broken):
        found = next((m for p in patterns if (m := p.match(name))), None)
        if found is None:
            continue
        before, layer = found.groups()
        prefix = f"{before}{layer}."
        if prefixes.setdefault(int(layer), prefix) != prefix:
            raise FailedPrecondition(
                f"{checkpoint.root}: layer {layer} is there twice, "
                f"as {prefixes[int(layer)]} and {prefix}"
            )
    return prefixes
