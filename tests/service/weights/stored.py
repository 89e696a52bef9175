"""Every stored form written by code of its own, with the numbers that it means.

A writer takes a matrix [N, K] and answers (tensors by suffix, the matrix that they stand for).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Written = tuple[dict[str, Tensor], Array]


def fp8(values: Array) -> Array:
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def tensor(array: Array) -> Tensor:
    """The same bytes in torch."""
    names = {"float8_e4m3fn": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}
    dtype = names.get(array.dtype.name)
    array = np.array(array, order="C")
    if dtype is None:
        return torch.from_numpy(array)
    bits = array.view(np.uint8 if array.dtype.itemsize == 1 else np.int16)
    return torch.from_numpy(bits).view(dtype)


def blocks(w: Array, suffix: str = "weight_scale_inv", scale_dtype: Any = np.float32) -> Written:
    rows, columns = -(-w.shape[0] // 128), -(-w.shape[1] // 128)
    scale = np.zeros((rows, columns), np.float32)
    codes, meant = np.zeros(w.shape, ml_dtypes.float8_e4m3fn), np.zeros(w.shape, np.float32)
    for r in range(rows):
        for c in range(columns):
            tile = np.s_[r * 128 : r * 128 + 128, c * 128 : c * 128 + 128]
            scale[r, c] = np.float32(np.abs(w[tile]).max() / 448).astype(scale_dtype)
            codes[tile] = fp8(w[tile] / scale[r, c])
            meant[tile] = codes[tile].astype(np.float32) * scale[r, c]
    return {"weight": tensor(codes), suffix: tensor(scale.astype(scale_dtype))}, meant


def ue8m0_blocks(w: Array) -> Written:
    """Scales that are powers of two, stored as their exponents: DeepSeek-V4's dense layers."""
    bits = np.zeros((-(-w.shape[0] // 128), -(-w.shape[1] // 128)), np.uint8)
    codes, meant = np.zeros(w.shape, ml_dtypes.float8_e4m3fn), np.zeros(w.shape, np.float32)
    for r, c in np.ndindex(bits.shape):
        tile = np.s_[r * 128 : r * 128 + 128, c * 128 : c * 128 + 128]
        exponent = int(np.ceil(np.log2(np.abs(w[tile]).max() / 448)))
        bits[r, c] = exponent + 127
        codes[tile] = fp8(w[tile] / 2.0**exponent)
        meant[tile] = codes[tile].astype(np.float32) * np.float32(2.0**exponent)
    stored = tensor(bits).view(torch.float8_e8m0fnu)
    return {"weight": tensor(codes), "scale": stored}, meant


def per_tensor(w: Array, suffix: str = "weight_scale") -> Written:
    scale = np.float32(np.abs(w).max() / 448)
    codes = fp8(w / scale)
    written = {"weight": tensor(codes), suffix: torch.tensor(float(scale))}
    return written, codes.astype(np.float32) * scale


def per_channel(w: Array) -> Written:
    scale = (np.abs(w).max(1, keepdims=True) / 448).astype(ml_dtypes.bfloat16)
    codes = fp8(w / scale.astype(np.float32))
    meant = codes.astype(np.float32) * scale.astype(np.float32)
    return {"weight": tensor(codes), "weight_scale": tensor(scale)}, meant


def groups(w: Array, size: int) -> Array:
    return w.reshape(w.shape[0], -1, size)


def mxfp8(w: Array) -> Written:
    grouped = groups(w, 32)
    exponent = np.ceil(np.log2(np.abs(grouped).max(-1) / 448))
    codes = fp8(grouped / 2.0 ** exponent[..., None])
    meant = codes.astype(np.float32) * (2.0 ** exponent[..., None]).astype(np.float32)
    bits = (exponent + 127).astype(np.uint8)
    return {"weight": tensor(codes.reshape(w.shape)), "weight_scale": tensor(bits)}, (
        meant.reshape(w.shape)
    )


def e2m1(values: Array) -> tuple[Array, Array]:
    """(4-bit codes, what they mean)."""
    rounded = np.clip(values, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return rounded.view(np.uint8) & 15, rounded.astype(np.float32)


def pack(codes: Array) -> Array:
    """Two 4-bit codes a byte, the even column low."""
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)


def mxfp4_parts(w: Array) -> tuple[Array, Array, Array]:
    """(packed bytes [N, K/2], exponents' bits [N, K/32], meaning)."""
    grouped = groups(w, 32)
    exponent = np.floor(np.log2(np.abs(grouped).max(-1))) - 2
    codes, values = e2m1(grouped / 2.0 ** exponent[..., None])
    meant = values * (2.0 ** exponent[..., None]).astype(np.float32)
    bits = (exponent + 127).astype(np.uint8)
    return pack(codes.reshape(w.shape)), bits, meant.reshape(w.shape)


def ct_mxfp4(w: Array) -> Written:
    packed, bits, meant = mxfp4_parts(w)
    return {"weight_packed": tensor(packed), "weight_scale": tensor(bits)}, meant


def v4_mxfp4(w: Array) -> Written:
    packed, bits, meant = mxfp4_parts(w)
    scale = tensor(bits).view(torch.float8_e8m0fnu)
    return {"weight": tensor(packed.view(np.int8)), "scale": scale}, meant


def oai_mxfp4(w: Array) -> Written:
    packed, bits, meant = mxfp4_parts(w)
    blocks_of_16 = packed.reshape(w.shape[0], w.shape[1] // 32, 16)
    return {"blocks": tensor(blocks_of_16), "scales": tensor(bits)}, meant


def nvfp4_parts(w: Array) -> tuple[Array, Array, np.float32, Array]:
    """(packed bytes, e4m3 scales, the global multiplier, meaning)."""
    whole = np.float32(np.abs(w).max() / (6 * 448))
    grouped = groups(w, 16)
    scale = fp8(np.abs(grouped).max(-1) / 6 / whole)
    factor = scale.astype(np.float32)[..., None] * whole
    codes, values = e2m1(grouped / factor)
    return pack(codes.reshape(w.shape)), scale, whole, (values * factor).reshape(w.shape)


def nvfp4(w: Array) -> Written:
    packed, scale, whole, meant = nvfp4_parts(w)
    written = {
        "weight": tensor(packed),
        "weight_scale": tensor(scale),
        "weight_scale_2": torch.tensor(float(whole)),
        "input_scale": torch.tensor(float(whole) * 3),
    }
    return written, meant


def ct_nvfp4(w: Array) -> Written:
    packed, scale, whole, meant = nvfp4_parts(w)
    written = {
        "weight_packed": tensor(packed),
        "weight_scale": tensor(scale),
        "weight_global_scale": torch.tensor([1 / float(whole)]),
        "input_global_scale": torch.tensor([1 / (float(whole) * 3)]),
    }
    return written, meant


def ct_int4(w: Array) -> Written:
    grouped = groups(w, 32)
    scale = (np.abs(grouped).max(-1) / 7.5).astype(ml_dtypes.bfloat16)
    factor = scale.astype(np.float32)[..., None]
    values = np.clip(np.rint(grouped / factor), -8, 7)
    digits = (values + 8).astype(np.uint32).reshape(w.shape[0], -1, 8)
    words = sum(digits[..., i] << np.uint32(4 * i) for i in range(8))
    written = {
        "weight_packed": tensor(np.asarray(words, np.uint32).view(np.int32)),
        "weight_scale": tensor(scale),
        "weight_shape": torch.tensor(w.shape),
    }
    return written, (values * factor).astype(np.float32).reshape(w.shape)


def plain(dtype: torch.dtype) -> Callable[[Array], Written]:
    def write(w: Array) -> Written:
        stored = torch.from_numpy(w).to(dtype)
        return {"weight": stored}, stored.float().numpy()

    return write


def compressed(**weights: Any) -> dict[str, Any]:
    """A quantization_config as compressed-tensors writes it."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "group_size": None} | weights}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
    }


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
E4 = {"num_bits": 8, "type": "float"}
F4 = {"num_bits": 4, "type": "float"}


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}


STORED: dict[str, tuple[str, Callable[[Array], Written], dict[str, Any] | None]] = {
    "float32": ("fp32", plain(torch.float32), None),
    "bfloat16": ("bf16", plain(torch.bfloat16), None),
    "float16": ("fp16", plain(torch.float16), None),
    "deepseek fp8": ("fp8_block128", blocks, FP8),
    "deepseek fp8, bf16 scales": (
        "fp8_block128",
        lambda w: blocks(w, scale_dtype=ml_dtypes.bfloat16),
        FP8,
    ),
    "deepseek ue8m0": ("fp8_block128", ue8m0_blocks, FP8 | {"scale_fmt": "ue8m0"}),
    "ct fp8 block": (
        "fp8_block128",
        lambda w: blocks(w, "weight_scale"),
        compressed(**E4, strategy="block", block_structure=[128, 128]),
    ),
    "ct fp8 channel": ("fp8_channel", per_channel, compressed(**E4, strategy="channel")),
    "ct fp8 tensor": ("fp8_tensor", per_tensor, compressed(**E4, strategy="tensor")),
    "modelopt fp8": ("fp8_tensor", per_tensor, modelopt("FP8")),
    "transformers fp8 tensor": (
        "fp8_tensor",
        lambda w: per_tensor(w, "weight_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "modelopt mxfp8": ("mxfp8", mxfp8, modelopt("MXFP8")),
    "modelopt nvfp4": ("nvfp4", nvfp4, modelopt("NVFP4")),
    "ct nvfp4": ("nvfp4", ct_nvfp4, compressed(**F4, strategy="tensor_group", group_size=16)),
    "ct mxfp4": ("mxfp4", ct_mxfp4, compressed(**F4, strategy="group", group_size=32)),
    "deepseek_v4 mxfp4": ("mxfp4", v4_mxfp4, FP8 | {"expert_dtype": "fp4"}),
    "ct int4": (
        "mxint4",
        ct_int4,
        compressed(num_bits=4, type="int", strategy="group", group_size=32),
    ),
}
"""(our scheme, writer, quantization_config) of each form that has a tensor per expert."""
