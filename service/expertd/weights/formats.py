"""How checkpoints store a matrix of an expert, as data; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from expertd.core import QuantScheme
from expertd.errors import FailedPrecondition
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.family import Family

Shape = Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a matrix [N, K]: its suffix, the dtypes accepted and its shape."""

    suffix: str
    dtypes: tuple[str, ...]
    shape: Shape
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """A stored form: its parts, by the name under which `convert` takes them.

    convert is the function of convert.py that makes the canonical matrix of the parts.
    """

    name: str
    quant: QuantScheme
    parts: Mapping[str, Part]
    convert: str


def whole(n: int, k: int) -> tuple[int, ...]:
    return (n, k)


def scalar(n: int, k: int) -> tuple[int, ...]:
    return ()


def blocks128(n: int, k: int) -> tuple[int, ...]:
    return (-(-n // 128), -(-k // 128))


def _plain(quant: QuantScheme, dtype: str) -> Format:
    return Format(quant.value, quant, {"weight": Part("weight", (dtype,), whole)}, "plain")


PLAIN = {
    "F32": _plain(QuantScheme.FP32, "F32"),
    "BF16": _plain(QuantScheme.BF16, "BF16"),
    "F16": _plain(QuantScheme.FP16, "F16"),
}
"""Unquantised weights, by the dtype they have on disk."""

FP8_BLOCK128 = Format(
    "fp8 with 128x128 blocks",
    QuantScheme.FP8_BLOCK128,
    {
        "weight": Part("weight", ("F8_E4M3",), whole),
        "scale": Part("weight_scale_inv", ("F32", "BF16", "F8_E8M0"), blocks128),
    },
    "fp8_block128",
)


def layer_format(
    checkpoint: Checkpoint, config: Mapping[str, Any], family: Family, prefix: str
) -> Format:
    """The format of a layer's experts, as the config declares it.

    Raises FailedPrecondition for a quantisation that cannot be read.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return _undeclared(checkpoint, family, prefix)
    if declared.get("quant_method") == "fp8" and declared.get("weight_block_size") == [128, 128]:
        return FP8_BLOCK128
    raise FailedPrecondition(f"config.json: quantization_config {declared!r:.200} cannot be read")


def _undeclared(checkpoint: Checkpoint, family: Family, prefix: str) -> Format:
    """The format of a plain checkpoint: what its first expert's dtype says."""
    names = [prefix + layout.part(layout.down, 0, "weight") for layout in family.layouts]
    name = next((n for n in names if n in checkpoint.tensors), names[0])
    entry = checkpoint.entry(name)
    if entry.dtype not in PLAIN:
        raise FailedPrecondition(
            f"{entry.file.path}: tensor {name!r} is {entry.dtype} and config.json declares no "
            f"quantization_config; plain weights are {', '.join(PLAIN)}"
        )
    return PLAIN[entry.dtype]
