"""Canonical matrices → the published layout of their scheme, and how a config declares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertd.core import QuantScheme
from expertd.weights import formats
from expertd.weights.formats import Format
from expertd.weights.matrix import Matrix

Declaration = dict[str, Any]
"""A config's quantization_config; the modules that stay plain are added by name."""


@dataclass(frozen=True, slots=True)
class Export:
    """The stored form of a scheme; ignored is the declaration's key for modules left plain.

    own_file: ModelOpt's readers want the declaration in hf_quant_config.json too.
    """

    format: Format
    declaration: Declaration
    ignored: str = "ignore"
    own_file: bool = False

    def declare(self, plain_modules: list[str]) -> Declaration:
        """The quantization_config of a checkpoint in which those modules are plain."""
        return {**self.declaration, self.ignored: plain_modules}


def _modelopt(format_: Format, algorithm: str, **extra: Any) -> Export:
    declaration = {"quant_method": "modelopt", "quant_algo": algorithm, **extra}
    return Export(format_, declaration, own_file=True)


def _compressed(
    format_: Format, name: str, activations: Declaration | None, **weights: Any
) -> Export:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": activations,
        "output_activations": None,
        "format": name,
    }
    declaration = {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
    return Export(format_, declaration)


FP8_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
PER_TOKEN = {
    "num_bits": 8,
    "type": "float",
    "strategy": "token",
    "dynamic": True,
    "symmetric": True,
}

EXPORTS: dict[QuantScheme, Export] = {
    QuantScheme.FP8_BLOCK128: Export(
        formats.FP8_BLOCKS[0], FP8_BLOCKS, ignored="modules_to_not_convert"
    ),
    QuantScheme.FP8_TENSOR: _modelopt(formats.FP8_TENSOR[0], "FP8"),
    QuantScheme.FP8_CHANNEL: _compressed(
        formats.FP8_CHANNEL[0],
        "float-quantized",
        PER_TOKEN,
        num_bits=8,
        type="float",
        strategy="channel",
    ),
    QuantScheme.MXFP8: _modelopt(formats.MXFP8[0], "MXFP8"),
    QuantScheme.NVFP4: _modelopt(formats.NVFP4[0], "NVFP4", group_size=16),
    QuantScheme.MXFP4: _compressed(
        formats.CT_MXFP4[0],
        "mxfp4-pack-quantized",
        None,
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
    ),
    QuantScheme.MXINT4: _compressed(
        formats.CT_INT4[0],
        "pack-quantized",
        None,
        num_bits=4,
        type="int",
        strategy="group",
        group_size=32,
    ),
}
"""How a scheme is written where a tensor holds one matrix of one expert."""

OAI = Export(formats.OAI_MXFP4[0], {"quant_method": "mxfp4"}, ignored="modules_to_not_convert")
"""gpt-oss's own form: all experts in a tensor, in blocks of 16 bytes."""


def stored_parts(format_: Format, matrix: Matrix) -> dict[str, Tensor]:
    """The tensors of a matrix by their suffix, as a checkpoint of this form holds them."""
    parts = {"weight": _stored_codes(format_, matrix.codes)}
    if matrix.scale is not None:
        parts["scale"] = matrix.scale
    if matrix.global_scale is not None:
        assert not format_.reciprocal, "no form that is written stores reciprocals"
        parts["global"] = matrix.global_scale
    n, k = matrix.codes.shape[0], matrix.columns
    return {
        format_.parts[name].suffix: tensor.contiguous().reshape(format_.parts[name].shape(n, k))
        for name, tensor in parts.items()
    }


def _stored_codes(format_: Format, codes: Tensor) -> Tensor:
    if format_.codes != "offset_words":
        return codes
    return (codes ^ 0x88).contiguous().view(torch.int32)
