"""float32 → stored weights, by the published formulas; the reference that tests and tools use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertd.core import QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import E2M1, e8m0_to_float
from expertd.weights.matrix import Matrix, stack

E4M3_MAX = 448.0
E2M1_MAX = 6.0


def quantize(
    w13: Tensor, w2: Tensor, quant: QuantScheme, *, gated: bool = True, tied: bool = True
) -> ExpertWeights:
    """float32 experts w13 [L, M, H] ([up; gate]) and w2 [L, H, I] in a scheme.

    tied: the up and the gate half share the scale of schemes that have one for a whole matrix.
    """
    experts = [
        (quantize_together(first.chunk(2 if gated else 1), quant, tied), _one(second, quant))
        for first, second in zip(w13, w2, strict=True)
    ]
    return stack(experts)


def quantize_together(halves: tuple[Tensor, ...], quant: QuantScheme, tied: bool) -> list[Matrix]:
    """Each half [I, H] in a scheme; tied halves share the largest magnitude among them."""
    amax = torch.stack([half.abs().amax() for half in halves])
    shared = amax.amax().expand_as(amax) if tied else amax
    return [quantize_matrix(half, quant, m) for half, m in zip(halves, shared, strict=True)]


def _one(matrix: Tensor, quant: QuantScheme) -> Matrix:
    return quantize_matrix(matrix, quant, matrix.abs().amax())


def quantize_matrix(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    """w [N, K] in a scheme; amax is the magnitude that a scale for the whole matrix reaches."""
    return _QUANTIZERS[quant](w.float(), quant, amax)


def _plain(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    return Matrix(quant, w.to(getattr(torch, PLAIN[quant])))


PLAIN = {
    QuantScheme.FP32: "float32",
    QuantScheme.BF16: "bfloat16",
    QuantScheme.FP16: "float16",
}


def _fp8_tensor(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    scale = _or_one(amax / E4M3_MAX).reshape(1)
    return Matrix(quant, to_e4m3(w / scale), scale)


def _fp8_channel(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    scale = _or_one(w.abs().amax(1) / E4M3_MAX)
    return Matrix(quant, to_e4m3(w / scale[:, None]), scale)


def _fp8_block128(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    n, k = w.shape
    padded = torch.nn.functional.pad(w, (0, -k % 128, 0, -n % 128))
    tiles = padded.view(-(-n // 128), 128, -(-k // 128), 128)
    scale = _or_one(tiles.abs().amax((1, 3)) / E4M3_MAX)
    codes = to_e4m3(tiles / scale[:, None, :, None]).view(padded.shape)[:n, :k]
    return Matrix(quant, codes.contiguous(), scale)


def _mxfp8(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    groups = w.view(len(w), -1, 32)
    bits = _e8m0(torch.ceil(torch.log2(groups.abs().amax(-1) / E4M3_MAX)))
    return Matrix(quant, to_e4m3(groups / e8m0_to_float(bits)[..., None]).view(w.shape), bits)


def _mxfp4(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    groups = w.view(len(w), -1, 32)
    bits = _e8m0(torch.floor(torch.log2(groups.abs().amax(-1))) - 2)
    return Matrix(quant, to_e2m1((groups / e8m0_to_float(bits)[..., None]).view(w.shape)), bits)


def _nvfp4(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    global_scale = _or_one(amax / (E2M1_MAX * E4M3_MAX)).reshape(1)
    groups = w.view(len(w), -1, 16)
    scale = groups.abs().amax(-1) / E2M1_MAX / global_scale
    stored = torch.where(scale == 0, 1.0, scale.clamp(2**-9, E4M3_MAX)).to(torch.float8_e4m3fn)
    codes = to_e2m1((groups / (stored.float() * global_scale)[..., None]).view(w.shape))
    return Matrix(quant, codes, stored, global_scale)


def _mxint4(w: Tensor, quant: QuantScheme, amax: Tensor) -> Matrix:
    groups = w.view(len(w), -1, 32)
    scale = _or_one(groups.abs().amax(-1) / 7.5).bfloat16()
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7).view(w.shape)
    return Matrix(quant, pack_nibbles(values.to(torch.int8).view(torch.uint8) & 15), scale)


def _or_one(scale: Tensor) -> Tensor:
    """A scale of nothing but zeros is 1, so that it can divide."""
    return torch.where(scale == 0, 1.0, scale)


def _e8m0(exponent: Tensor) -> Tensor:
    """Exponents as e8m0 bits; those of all-zero groups (-inf) become the smallest."""
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8)


def to_e4m3(values: Tensor) -> Tensor:
    """Round to e4m3, saturating (the cast alone makes NaN of what is too large)."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(values: Tensor) -> Tensor:
    """float32 [N, K] → packed e2m1 [N, K/2]: nearest, ties to the even code, saturating."""
    bounds = torch.tensor(_upper_bounds(), dtype=torch.float32, device=values.device)
    code = torch.bucketize(values.abs().contiguous(), bounds).to(torch.uint8)
    return pack_nibbles(code | (torch.signbit(values).to(torch.uint8) << 3))


def _upper_bounds() -> list[float]:
    """The largest value that rounds to each code but the last: its midpoint, or just below it."""
    middles = [(low + high) / 2 for low, high in zip(E2M1, E2M1[1:], strict=False)]
    return [m if code % 2 == 0 else m * (1 - 2**-24) for code, m in enumerate(middles)]


def pack_nibbles(values: Tensor) -> Tensor:
    """Values 0..15 [N, K] → bytes [N, K/2], the low nibble first."""
    return values[:, ::2] | (values[:, 1::2] << 4)


_Quantizer = Callable[[Tensor, QuantScheme, Tensor], Matrix]
_QUANTIZERS: dict[QuantScheme, _Quantizer] = {
    QuantScheme.FP32: _plain,
    QuantScheme.BF16: _plain,
    QuantScheme.FP16: _plain,
    QuantScheme.FP8_TENSOR: _fp8_tensor,
    QuantScheme.FP8_CHANNEL: _fp8_channel,
    QuantScheme.FP8_BLOCK128: _fp8_block128,
    QuantScheme.MXFP8: _mxfp8,
    QuantScheme.NVFP4: _nvfp4,
    QuantScheme.MXFP4: _mxfp4,
    QuantScheme.MXINT4: _mxint4,
}
