"""The forms in which checkpoints store a matrix of an expert, as data; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from expertd.core import QuantScheme

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
    """A stored form; parts are "weight" and, where there are any, "scale", "global", "input".

    codes says how weights become canonical codes: as they are, as plain bytes, or from int32 words
    of eight values that are 8 too large. Parts in `reciprocal` are stored as 1/x.
    """

    name: str
    quant: QuantScheme
    parts: Mapping[str, Part]
    codes: Literal["same", "bytes", "offset_words"] = "same"
    reciprocal: tuple[str, ...] = field(default=())


def whole(n: int, k: int) -> tuple[int, ...]:
    return (n, k)


def scalar(n: int, k: int) -> tuple[int, ...]:
    return ()


def rows(n: int, k: int) -> tuple[int, ...]:
    return (n,)


def packed(values: int) -> Shape:
    """Columns, so many values in each element."""
    return lambda n, k: (n, k // values)


def blocks128(n: int, k: int) -> tuple[int, ...]:
    return (-(-n // 128), -(-k // 128))


def blocks_of_16_bytes(n: int, k: int) -> tuple[int, ...]:
    return (n, k // 32, 16)


FLOATS = ("F32", "BF16", "F16")
FP8 = Part("weight", ("F8_E4M3",), whole)
INPUT = Part("input_scale", FLOATS, scalar, optional=True)


def _plain(quant: QuantScheme, dtype: str) -> Format:
    return Format(f"{quant.value} weights", quant, {"weight": Part("weight", (dtype,), whole)})


PLAIN = {
    "F32": _plain(QuantScheme.FP32, "F32"),
    "BF16": _plain(QuantScheme.BF16, "BF16"),
    "F16": _plain(QuantScheme.FP16, "F16"),
}
"""Unquantised weights, by the dtype they have on disk."""


def _fp8(name: str, quant: QuantScheme, suffix: str, shape: Shape, **extra: Part) -> Format:
    scale = Part(suffix, (*FLOATS, "F8_E8M0"), shape)
    return Format(name, quant, {"weight": FP8, "scale": scale, **extra})


BLOCK = QuantScheme.FP8_BLOCK128
FP8_BLOCKS = (
    _fp8("DeepSeek fp8 blocks", BLOCK, "weight_scale_inv", blocks128),
    _fp8("DeepSeek-V4 fp8 blocks", BLOCK, "scale", blocks128),
)
CT_FP8_BLOCKS = (_fp8("compressed-tensors fp8 blocks", BLOCK, "weight_scale", blocks128),)

ACTIVATION = Part("activation_scale", FLOATS, scalar, optional=True)
TENSOR = QuantScheme.FP8_TENSOR
FP8_TENSOR = (
    _fp8("fp8 per tensor", TENSOR, "weight_scale", scalar, input=INPUT),
    _fp8("transformers fp8 per tensor", TENSOR, "weight_scale_inv", scalar, input=ACTIVATION),
)
FP8_CHANNEL = (_fp8("fp8 per channel", QuantScheme.FP8_CHANNEL, "weight_scale", rows, input=INPUT),)

E8M0 = ("U8", "F8_E8M0")
GROUPS32 = Part("weight_scale", E8M0, packed(32))
MXFP8 = (
    Format("mxfp8", QuantScheme.MXFP8, {"weight": FP8, "scale": GROUPS32}),
    Format(
        "mxfp8 with weight_scale_inv",
        QuantScheme.MXFP8,
        {"weight": FP8, "scale": Part("weight_scale_inv", E8M0, packed(32))},
    ),
)
NVFP4 = (
    Format(
        "ModelOpt nvfp4",
        QuantScheme.NVFP4,
        {
            "weight": Part("weight", ("U8",), packed(2)),
            "scale": Part("weight_scale", ("F8_E4M3",), packed(16)),
            "global": Part("weight_scale_2", ("F32",), scalar),
            "input": INPUT,
        },
    ),
)
CT_NVFP4 = (
    Format(
        "compressed-tensors nvfp4",
        QuantScheme.NVFP4,
        {
            "weight": Part("weight_packed", ("U8",), packed(2)),
            "scale": Part("weight_scale", ("F8_E4M3",), packed(16)),
            "global": Part("weight_global_scale", ("F32",), scalar),
            "input": Part("input_global_scale", ("F32",), scalar, optional=True),
        },
        reciprocal=("global", "input"),
    ),
)
CT_MXFP4 = (
    Format(
        "compressed-tensors mxfp4",
        QuantScheme.MXFP4,
        {"weight": Part("weight_packed", ("U8",), packed(2)), "scale": GROUPS32},
    ),
)
OAI_MXFP4 = (
    Format(
        "gpt-oss mxfp4",
        QuantScheme.MXFP4,
        {
            "weight": Part("blocks", ("U8",), blocks_of_16_bytes),
            "scale": Part("scales", ("U8",), packed(32)),
        },
        codes="bytes",
    ),
)
V4_MXFP4 = (
    Format(
        "DeepSeek-V4 mxfp4",
        QuantScheme.MXFP4,
        {
            "weight": Part("weight", ("I8", "U8"), packed(2)),
            "scale": Part("scale", E8M0, packed(32)),
        },
        codes="bytes",
    ),
)
CT_INT4 = (
    Format(
        "compressed-tensors int4",
        QuantScheme.MXINT4,
        {
            "weight": Part("weight_packed", ("I32",), packed(8)),
            "scale": Part("weight_scale", ("BF16",), packed(32)),
        },
        codes="offset_words",
    ),
)
