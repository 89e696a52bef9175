"""What a checkpoint's config says about the quantisation of a module; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from expertd.errors import FailedPrecondition
from expertd.weights import formats
from expertd.weights.formats import Format

Declared = tuple[Format, ...]
"""The stored forms of one scheme that a declaration stands for; () means plain weights."""

Config = Mapping[str, Any]


def declared_formats(config: Config, module: str) -> Declared:
    """The forms that the experts' module may have by the config's quantization_config.

    Raises FailedPrecondition for a quantisation that cannot be read.
    """
    declared = _object(config, "quantization_config")
    if not declared:
        return ()
    method = str(declared.get("quant_method"))
    reader = METHODS.get(method)
    if reader is None:
        raise _unreadable(f"quant_method {method!r}", METHODS)
    keys = ("modules_to_not_convert", "ignore", "exclude_modules")
    if any(names(pattern, module) for key in keys for pattern in _names(declared, key)):
        return ()
    return reader(declared, config, module)


def names(pattern: str, module: str) -> bool:
    """Whether an ignore or target pattern means module: re:REGEX, a glob, or part of its path."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as error:
            raise FailedPrecondition(f"config.json: pattern {pattern!r}: {error}") from error
    if "*" in pattern:
        parts = module.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return any(fnmatchcase(path, pattern) for path in paths)
    return f".{pattern}." in f".{module}."


def _names(declared: Config, key: str) -> list[str]:
    listed = declared.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise FailedPrecondition(f"config.json: {key} {listed!r:.100} is not a list of names")
    return listed


def _object(config: Config, key: str) -> Config:
    """An object of the config, empty where there is none."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise FailedPrecondition(f"config.json: {key} {value!r:.100} is not an object")
    return value


def _fp8(declared: Config, config: Config, module: str) -> Declared:
    """DeepSeek's blocks; without a block size one scale a tensor; V4 keeps its experts in fp4."""
    if config.get("expert_dtype") == "fp4" or declared.get("expert_dtype") == "fp4":
        return formats.V4_MXFP4
    block = declared.get("weight_block_size")
    if block is None:
        return formats.FP8_TENSOR
    if block != [128, 128]:
        raise _unreadable(f"weight_block_size {block!r}", ["[128, 128]"])
    return formats.FP8_BLOCKS


MODELOPT = {
    "FP8": formats.FP8_TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": formats.FP8_CHANNEL,
    "FP8_PB_WO": formats.CT_FP8_BLOCKS,
    "MXFP8": formats.MXFP8,
    "NVFP4": formats.NVFP4,
}
"""quant_algo of ModelOpt's exports → the forms."""


def _modelopt(declared: Config, config: Config, module: str) -> Declared:
    algorithm = declared.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        layers = _object(declared, "quantized_layers")
        found = next((key for key in layers if names(key, module)), None)
        if found is None:
            return ()
        algorithm = _object(layers, found).get("quant_algo")
    known = MODELOPT.get(str(algorithm))
    if known is None:
        raise _unreadable(f"quant_algo {algorithm!r}", MODELOPT)
    return known


COMPRESSED: dict[tuple[object, ...], Declared] = {
    ("float", 8, "tensor", None): formats.FP8_TENSOR,
    ("float", 8, "channel", None): formats.FP8_CHANNEL,
    ("float", 8, "block", None): formats.CT_FP8_BLOCKS,
    ("float", 8, "group", 32): formats.MXFP8,
    ("float", 4, "tensor_group", 16): formats.CT_NVFP4,
    ("float", 4, "group", 32): formats.CT_MXFP4,
    ("int", 4, "group", 32): formats.CT_INT4,
}
"""(type, num_bits, strategy, group_size) of compressed-tensors → the forms."""


def _compressed(declared: Config, config: Config, module: str) -> Declared:
    """The first group whose targets name the module (Linear means every one)."""
    groups = _object(declared, "config_groups")
    for group in (_object(groups, name) for name in groups):
        targets = _names(group, "targets")
        if any(target == "Linear" or names(target, module) for target in targets):
            return _compressed_weights(_object(group, "weights"))
    return ()


def _compressed_weights(weights: Config) -> Declared:
    group = weights.get("group_size")
    key = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"), group or None)
    known = next((forms for told, forms in COMPRESSED.items() if told == key), None)
    block = weights.get("block_structure")
    if known is None or not weights.get("symmetric", True) or block not in (None, [128, 128]):
        raise _unreadable(f"config_groups weights {dict(weights)!r:.300}", map(str, COMPRESSED))
    return known


def _fixed(known: Declared) -> Callable[[Config, Config, str], Declared]:
    return lambda declared, config, module: known


METHODS: dict[str, Callable[[Config, Config, str], Declared]] = {
    "fp8": _fp8,
    "mxfp4": _fixed(formats.OAI_MXFP4),
    "mxfp8": _fixed(formats.MXFP8),
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "compressed-tensors": _compressed,
}
"""quant_method → its reader."""


def _unreadable(what: str, accepted: Iterable[str]) -> FailedPrecondition:
    return FailedPrecondition(
        f"config.json: {what} cannot be read; readable: {', '.join(accepted)}; "
        "`expertd quantize` writes these from plain weights"
    )
