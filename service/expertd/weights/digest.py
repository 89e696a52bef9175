"""A fingerprint of a layer's canonical tensors that every device computes alike."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from expertd.weights.canonical import ExpertWeights

CHUNK_WORDS = 1 << 22


def weights_digest(weights: ExpertWeights, correction_bias: Tensor | None = None) -> str:
    """sha256, in hex, of each tensor's name, dtype, shape and sums over chunks of its words.

    The sums are multilinear hashes (64-bit words, wrapping, one fixed odd multiplier for each
    position), computed where the tensor is: any change of a byte or of an order is seen, but
    this is no protection against somebody who looks for a collision.
    """
    tensors = {**weights.tensors, "correction_bias": correction_bias}
    digest = hashlib.sha256(weights.quant.value.encode())
    for name, tensor in tensors.items():
        if tensor is not None:
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(_sums(tensor).cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> Tensor:
    """One int64 for each chunk of 2**22 four-byte words."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(data) % 4:
        data = torch.nn.functional.pad(data, (0, -len(data) % 4))
    words = data.view(torch.int32)
    factors = _factors(min(CHUNK_WORDS, len(words))).to(tensor.device)
    chunks = (words[at : at + CHUNK_WORDS] for at in range(0, len(words), CHUNK_WORDS))
    sums = [(chunk.long() * factors[: len(chunk)]).sum() for chunk in chunks]
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64)


def _factors(count: int) -> Tensor:
    """Fixed odd 64-bit numbers, by splitmix64 of their position."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((mixed ^ (mixed >> np.uint64(31)) | np.uint64(1)).view(np.int64))
