"""The table of canonical.py as data: dtypes and shapes of one stored matrix; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from expertd.core import LayerSpec, QuantScheme

ITEM_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "uint8": 1,
}

Parts = dict[str, tuple[str, tuple[int, ...]]]
"""The dtype and shape of a matrix's parts: codes, scale and global_scale where there are any."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How a scheme stores a matrix [N, K]; a block size of 0 means the whole length."""

    codes: str
    packed: int = 1
    scale: str | None = None
    block: tuple[int, int] = (0, 0)
    global_scale: bool = False

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """[1] for a tensor, [N] for channels, [blocks of rows, blocks of columns] otherwise."""
        rows, columns = self.block
        if not columns:
            return (n if rows else 1,)
        return (-(-n // rows), -(-k // columns))

    def parts(self, n: int, k: int) -> Parts:
        """What a matrix of n rows and k columns consists of."""
        parts: Parts = {"codes": (self.codes, (n, k // self.packed))}
        if self.scale is not None:
            parts["scale"] = (self.scale, self.scale_shape(n, k))
        if self.global_scale:
            parts["global_scale"] = ("float32", (1,))
        return parts


STORAGE = {
    QuantScheme.FP32: Storage("float32"),
    QuantScheme.BF16: Storage("bfloat16"),
    QuantScheme.FP16: Storage("float16"),
    QuantScheme.FP8_TENSOR: Storage("float8_e4m3fn", scale="float32"),
    QuantScheme.FP8_CHANNEL: Storage("float8_e4m3fn", scale="float32", block=(1, 0)),
    QuantScheme.FP8_BLOCK128: Storage("float8_e4m3fn", scale="float32", block=(128, 128)),
    QuantScheme.MXFP8: Storage("float8_e4m3fn", scale="uint8", block=(1, 32)),
    QuantScheme.NVFP4: Storage("uint8", 2, "float8_e4m3fn", (1, 16), global_scale=True),
    QuantScheme.MXFP4: Storage("uint8", 2, "uint8", (1, 32)),
    QuantScheme.MXINT4: Storage("uint8", 2, "bfloat16", (1, 32)),
}


def layer_parts(spec: LayerSpec) -> Parts:
    """The fields of ExpertWeights that every layer of this form has, [L, ...] each."""
    storage, halves = STORAGE[spec.quant], 2 if spec.activation.gated else 1
    first = storage.parts(spec.intermediate, spec.hidden)
    second = storage.parts(spec.hidden, spec.intermediate)
    parts: Parts = {}
    for part, (field13, field2) in FIELDS.items():
        if part in first:
            dtype, (rows, *rest) = first[part]
            parts[field13] = (dtype, (spec.held, halves * rows, *rest))
            parts[field2] = (dtype, (spec.held, *second[part][1]))
    if spec.expert_bias:
        parts["bias13"] = ("float32", (spec.held, spec.rows13))
        parts["bias2"] = ("float32", (spec.held, spec.hidden))
    return parts


FIELDS = {
    "codes": ("w13", "w2"),
    "scale": ("scale13", "scale2"),
    "global_scale": ("global13", "global2"),
}
"""The part of a matrix → the fields of ExpertWeights that hold it."""


def layer_bytes(spec: LayerSpec) -> int:
    """Bytes of a layer's experts held, without static activation scales."""
    return sum(ITEM_BYTES[dtype] * prod(shape) for dtype, shape in layer_parts(spec).values())
